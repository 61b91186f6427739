"""All teachers of a run, by name, and which of them reads which prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import UserError
from opd.models import (
    check_models,
    check_tokenizers,
    eos_token_ids,
    load_tokenizer,
    vocabulary_size,
)
from opd.prompts import Prompt, PromptFormat, Row, encode
from opd.rollouts import Rollouts
from opd.teachers.local import BaseTeacher, LocalTeacher
from opd.teachers.served import ServedTeacher, TeacherServer, is_served
from opd.teachers.teacher import Gives, Opinion, Teacher

log = logging.getLogger(__name__)

DEFAULT = "default"  # name of the only teacher, or of the one of prompts that name none
TEACHER = "teacher"  # what an objective calls the one that has read its prompt
REFERENCE = "reference"  # and a frozen model that reads all, whatever their teachers


class Teachers(Mapping[str, Teacher]):
    """Teachers by the names that the prompts' ``teacher`` fields hold; perhaps none.

    Args:
        teachers: The teachers.
        vocabulary: Tokens that student and teachers share; what lies beyond is padding, and is
            neither sampled nor compared. (Padding that all have is both: that the student comes to
            find it as unlikely as its teachers do is due to the comparison.)
        ends: Tokens that end a completion for a teacher, by name of the teacher.
        tokenizers: Where a teacher comes from and its own tokenizer, by name, as far as known.
        reference: What the objective compares the teacher with; None: with nothing.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        vocabulary: int,
        ends: Mapping[str, Sequence[int]] | None = None,
        tokenizers: Mapping[str, tuple[str, PreTrainedTokenizerBase]] | None = None,
        reference: Teacher | None = None,
    ) -> None:
        self._teachers = dict(teachers)
        self.vocabulary = vocabulary
        self.ends = dict(ends or {})
        self._tokenizers = dict(tokenizers or {})
        self.reference = reference

    def __getitem__(self, name: str) -> Teacher:
        return self._teachers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._teachers)

    def __len__(self) -> int:
        return len(self._teachers)

    @property
    def readers(self) -> dict[str, Teacher]:
        """All that read, by what to call them in a message."""
        readers = {f"teacher {name}": teacher for name, teacher in self.items()}
        return readers | ({} if self.reference is None else {REFERENCE: self.reference})

    @property
    def ahead(self) -> int:
        """How many micro-batches are to be read ahead: servers work while the student does."""
        return int(any(isinstance(teacher, ServedTeacher) for teacher in self.values()))

    def name_of(self, prompt: Prompt) -> str:
        """Return which teacher reads a prompt; DEFAULT where there is none at all.

        Raises:
            UserError: There is no teacher of that name.
        """
        if not self:
            return DEFAULT
        if prompt.teacher is None and len(self) == 1:
            return next(iter(self))
        name = prompt.teacher or DEFAULT
        if name not in self:
            default = f", so it is for {DEFAULT!r}" if prompt.teacher is None else ""
            raise UserError(
                f"{prompt.place} names teacher {prompt.teacher!r}{default}; model.teacher has "
                f"{sorted(self)}"
            )
        return name

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Find unknown teachers now, on all ranks, rather than later on one.

        Raises:
            UserError: A prompt names a teacher that there is not.
        """
        for prompt in prompts:
            self.name_of(prompt)

    def check_rendering(
        self,
        examples: Sequence[tuple[Prompt, Row]],
        fmt: PromptFormat,
        student: PreTrainedTokenizerBase,
    ) -> None:
        """Warn, once per teacher, if it was tuned on prompts that look otherwise than these.

        Args:
            examples: Prompts as the student's tokenizer has made them, and their rows.
            fmt: How prompts are rendered.
            student: The student's tokenizer.
        """
        for name, (source, tokenizer) in self._tokenizers.items():
            for prompt, row in examples:
                if self.name_of(prompt) != name:
                    continue
                try:
                    theirs = encode([fmt.render(row, prompt.place, tokenizer)], tokenizer)[0]
                except UserError:  # it has no template, or its template refuses the chat
                    theirs = []
                if list(prompt.token_ids) != theirs:
                    texts = [str(student.decode(ids)) for ids in ([*prompt.token_ids], theirs)]
                    remedy = (
                        "set --data.format.teacher_rendering own, so that it reads that, or "
                        f"--model.tokenizer {source}, so that both do"
                    )
                    if tokenizer.chat_template is None:
                        remedy = "it has no chat template; set --data.format.chat_template false"
                    log.warning(
                        "teacher %s would render %s as %s and reads %s, as the student does. If "
                        "it was tuned on its own rendering, %s",
                        source,
                        prompt.place,
                        _around(texts[1], texts[0]) if theirs else "nothing",
                        _around(texts[0], texts[1]),
                        remedy,
                    )
                    break

    def check_objective(self, objective: str, needs: Mapping[str, Gives]) -> None:
        """Make sure that the teachers give what an objective is made of.

        Raises:
            UserError: Nobody gives a part of it, or a teacher gives less of it.
        """
        readers = {TEACHER: {f"teacher {name!r}": teacher for name, teacher in self.items()}}
        if self.reference is not None:
            readers[REFERENCE] = {"the reference": self.reference}
        for name, much in needs.items():
            if name not in readers:
                raise UserError(f"objective {objective} needs a {name!r}, which this run has not")
            for who, reader in readers[name].items():
                if much == "full" and reader.gives == "sampled":
                    raise UserError(
                        f"objective {objective} needs the log-probabilities of all tokens, and "
                        f"{who} gives those of sampled tokens only; use "
                        "opd.objectives.PolicyGradient"
                    )

    def read(self, micro: Rollouts, *, reference: bool = False) -> dict[str, Opinion]:
        """Let the teacher of a micro-batch read it, if there is one; the reference, if asked.

        A teacher reads what it alone is told; the reference reads what the student does.
        """
        opinions: dict[str, Opinion] = {}
        if self:
            teacher = self[self.name_of(micro.prompts.prompts[0])]
            opinions[TEACHER] = teacher.read(micro.for_teacher())
        if reference and self.reference is not None:
            opinions[REFERENCE] = self.reference.read(micro)
        return opinions


def load_teachers(
    sources: Mapping[str, str],
    load_model: Callable[[str], PreTrainedModel],
    load_head: Callable[[str], PreTrainedModel],
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    offload: bool,
    trust_remote_code: bool,
    reference: str | None = None,
) -> Teachers:
    """Load the teachers of a student.

    Args:
        sources: Hub id, folder, checkpoint, GGUF file, embedded:NAME or address of a server, by
            name.
        load_model: Loads one of them, or returns the student if it is the student's base.
        load_head: Loads the head of one whose body is on a server.
        student: The student.
        tokenizer: The student's tokenizer.
        temperature: Of the completions that they will read.
        offload: See :class:`LocalTeacher`.
        trust_remote_code: Let a hub tokenizer run its own code.
        reference: Where the reference comes from, which is loaded alike; None: there is none.

    Raises:
        UserError: One cannot be loaded, or does not fit the student.
    """
    loaded, ends, tokenizers = {}, {}, {}

    def load(
        source: str, load_model: Callable[[str], PreTrainedModel] = load_model
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        theirs = load_tokenizer(source, trust_remote_code=trust_remote_code)
        check_tokenizers(tokenizer, theirs, source)
        model = load_model(source)
        check_models(student, model, tokenizer, source)
        return model, theirs

    servers: dict[str, TeacherServer] = {}
    for name, source in sources.items():
        if is_served(source):
            servers[name] = TeacherServer.at(source)
            loaded[name], theirs = load(servers[name].model, load_head)
            servers[name].check(loaded[name].get_output_embeddings().in_features)
        else:
            loaded[name], theirs = load(source)
        tokenizers[name] = (source, theirs)
        ends[name] = eos_token_ids(loaded[name], theirs)
    compared = None if reference is None else load(reference)[0]
    models = [student, *loaded.values(), *([] if compared is None else [compared])]
    # Beyond the smallest vocabulary there is only padding: check_models has made sure of that
    vocabulary = min(vocabulary_size(model) for model in models)

    def reader(model: PreTrainedModel, server: TeacherServer | None = None) -> LocalTeacher:
        if server is not None:
            return ServedTeacher(model, server, vocabulary=vocabulary, temperature=temperature)
        kind = BaseTeacher if model is student else LocalTeacher
        return kind(model, vocabulary=vocabulary, temperature=temperature, offload=offload)

    return Teachers(
        {name: reader(model, servers.get(name)) for name, model in loaded.items()},
        vocabulary,
        ends,
        tokenizers,
        None if compared is None else reader(compared),
    )


def _around(text: str, other: str, width: int = 60) -> str:
    """Quote a text where it differs from another, escaped."""
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False))
    )
    start = max(0, same - width // 3)
    part = text[start : start + width]
    return f"{'...' * (start > 0)}{part!r}{'...' * (start + width < len(text))}"
