"""All teachers of a run, by name, and which of them reads which prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import UserError
from opd.models import (
    check_models,
    check_tokenizers,
    eos_token_ids,
    load_tokenizer,
    vocabulary_size,
)
from opd.prompts import Prompt
from opd.rollouts import Rollouts
from opd.teachers.local import LocalTeacher
from opd.teachers.teacher import Gives, Opinion, Teacher

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
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        vocabulary: int,
        ends: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self._teachers = dict(teachers)
        self.vocabulary = vocabulary
        self.ends = dict(ends or {})

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
            raise UserError(
                f"prompt row {prompt.row} names teacher {prompt.teacher!r}; model.teacher has "
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
        sources: Hub id, folder, checkpoint or embedded:NAME, by name.
        load_model: Loads one of them.
        student: The student.
        tokenizer: The student's tokenizer.
        temperature: Of the completions that they will read.
        offload: See :class:`LocalTeacher`.
        trust_remote_code: Let a hub tokenizer run its own code.

    Raises:
        UserError: One cannot be loaded, or does not fit the student.
    """
    loaded, ends = {}, {}
    for name, source in sources.items():
        theirs = load_tokenizer(source, trust_remote_code=trust_remote_code)
        check_tokenizers(tokenizer, theirs, source)
        loaded[name] = load_model(source)
        check_models(student, loaded[name], tokenizer, source)
        ends[name] = eos_token_ids(loaded[name], theirs)
    # Beyond the smallest vocabulary there is only padding: check_models has made sure of that
    vocabulary = min(vocabulary_size(model) for model in [student, *loaded.values()])
    teachers = {
        name: LocalTeacher(model, vocabulary=vocabulary, temperature=temperature, offload=offload)
        for name, model in loaded.items()
    }
    return Teachers(teachers, vocabulary, ends)
