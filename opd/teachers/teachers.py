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
from opd.teachers.teacher import Gives, Opinion, Teacher

log = logging.getLogger(__name__)

DEFAULT = "default"  # name of the only teacher, or of the one of prompts that name none
TEACHER = "teacher"  # what an objective calls the one that has read its prompt


class Teachers(Mapping[str, Teacher]):
    """Teachers by the names that the prompts' ``teacher`` fields hold.

    Args:
        teachers: The teachers.
        vocabulary: Tokens that student and teachers share; what lies beyond is padding, and is
            neither sampled nor compared. (Padding that all have is both: that the student comes to
            find it as unlikely as its teachers do is due to the comparison.)
        ends: Tokens that end a completion for a teacher, by name of the teacher.
        tokenizers: Where a teacher comes from and its own tokenizer, by name, as far as known.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        vocabulary: int,
        ends: Mapping[str, Sequence[int]] | None = None,
        tokenizers: Mapping[str, tuple[str, PreTrainedTokenizerBase]] | None = None,
    ) -> None:
        self._teachers = dict(teachers)
        self.vocabulary = vocabulary
        self.ends = dict(ends or {})
        self._tokenizers = dict(tokenizers or {})

    def __getitem__(self, name: str) -> Teacher:
        return self._teachers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._teachers)

    def __len__(self) -> int:
        return len(self._teachers)

    def name_of(self, prompt: Prompt) -> str:
        """Return which teacher reads a prompt.

        Raises:
            UserError: There is no teacher of that name.
        """
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
                    remedy = f"set --model.tokenizer {source}"
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
        for name, much in needs.items():
            if name != TEACHER:
                raise UserError(f"objective {objective} needs a {name!r}, which this run has not")
            for teacher, gives in ((teacher, self[teacher].gives) for teacher in self):
                if much == "full" and gives == "sampled":
                    raise UserError(
                        f"objective {objective} needs the log-probabilities of all tokens, and "
                        f"teacher {teacher!r} gives those of sampled tokens only; use "
                        "opd.objectives.PolicyGradient"
                    )

    def read(self, micro: Rollouts) -> dict[str, Opinion]:
        """Let the teacher of a micro-batch, which has one, read it."""
        return {TEACHER: self[self.name_of(micro.prompts.prompts[0])].read(micro)}


def load_teachers(
    sources: Mapping[str, str],
    load_model: Callable[[str], PreTrainedModel],
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    offload: bool,
    trust_remote_code: bool,
) -> Teachers:
    """Load the teachers of a student, which run in this process.

    Args:
        sources: Hub id, folder, checkpoint, GGUF file or embedded:NAME, by name.
        load_model: Loads one of them, or returns the student if it is the student's base.
        student: The student.
        tokenizer: The student's tokenizer.
        temperature: Of the completions that they will read.
        offload: See :class:`LocalTeacher`.
        trust_remote_code: Let a hub tokenizer run its own code.

    Raises:
        UserError: One cannot be loaded, or does not fit the student.
    """
    loaded, ends, tokenizers = {}, {}, {}
    for name, source in sources.items():
        theirs = load_tokenizer(source, trust_remote_code=trust_remote_code)
        check_tokenizers(tokenizer, theirs, source)
        tokenizers[name] = (source, theirs)
        loaded[name] = load_model(source)
        check_models(student, loaded[name], tokenizer, source)
        ends[name] = eos_token_ids(loaded[name], theirs)
    # Beyond the smallest vocabulary there is only padding: check_models has made sure of that
    vocabulary = min(vocabulary_size(model) for model in [student, *loaded.values()])
    teachers = {
        name: (BaseTeacher if model is student else LocalTeacher)(
            model, vocabulary=vocabulary, temperature=temperature, offload=offload
        )
        for name, model in loaded.items()
    }
    return Teachers(teachers, vocabulary, ends, tokenizers)


def _around(text: str, other: str, width: int = 60) -> str:
    """Quote a text where it differs from another, escaped."""
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False))
    )
    start = max(0, same - width // 3)
    part = text[start : start + width]
    return f"{'...' * (start > 0)}{part!r}{'...' * (start + width < len(text))}"
