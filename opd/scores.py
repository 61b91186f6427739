"""What judges a candidate: the accuracy of its answers (paper), or the teacher's KL (no labels).

A score is prepared once per search and then called for the incumbent and for every candidate, with
the weights in place. Same examples, same random numbers each time: the comparison is paired.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from opd import stages
from opd.errors import UserError
from opd.extrapolation import Score
from opd.prompts import Prompt, PromptBatch, PromptDataModule
from opd.randomness import derive_seed
from opd.rollouts import Rollouts
from opd.stages import Reading
from opd.step import LOT, StepOutput, StepRequest

if TYPE_CHECKING:
    from opd.module import OPDModule


class CandidateScore(ABC):
    """Base of all scores: judges the weights that a module holds at the moment; higher is better.

    The module is whatever LightningModule the callback is attached to. A score draws its randomness
    from the seed it is given and leaves the module and the global random state as it found them.

    Attributes:
        knows_moved: Whether its scores say how far a candidate has moved.
    """

    knows_moved: ClassVar[bool] = False

    def check(self, module: Any) -> None:  # noqa: B027 - any module may do
        """Called before a run.

        Raises:
            UserError: It cannot judge this module.
        """

    def request(self) -> StepRequest:
        """Say what it needs of a step after which there will be a search."""
        return StepRequest()

    def prepare(self, module: Any, output: Any, seed: int) -> None:  # noqa: B027 - some need nothing
        """Called once per search, with W in place: choose the examples.

        Args:
            module: The module.
            output: What its step has left behind: of an OPDModule, a StepOutput.
            seed: Of all that is drawn; the same for every search of a run.
        """

    @abstractmethod
    def __call__(self, module: Any) -> Score:
        """Score the weights that the module holds, on this rank's examples.

        All ranks call it together; under FSDP it makes equally many passes on each.
        """

    def release(self) -> None:  # noqa: B027 - some hold nothing
        """Called after a search: let go of what :meth:`prepare` has taken."""


class AnswerAccuracy(CandidateScore):
    """Share of right answers among completions to fixed training prompts (the paper's D_v).

    The examples are drawn once, at random, from the prompts that have an answer, and are divided
    over the ranks.

    With ``prompts="validation"`` it is an oracle: candidates are chosen by the very prompts that
    the run is judged by. That bounds what a better score could bring; whatever such a run reaches
    on these prompts is no result.

    Args:
        num_examples: Prompts; if there are fewer, all of them.
        samples: Completions per prompt. With 1, the standard error on 50 prompts is up to 0.07.
        temperature: Of these completions; 0 is greedy.
        prompts: Where the examples are drawn from: train (paper), or validation, an oracle.
    """

    def __init__(
        self,
        num_examples: int = 50,
        samples: int = 1,
        temperature: float = 1.0,
        prompts: Literal["train", "validation"] = "train",
    ) -> None:
        if num_examples < 1 or samples < 1 or temperature < 0:
            raise UserError(
                f"AnswerAccuracy(num_examples={num_examples}, samples={samples}, "
                f"temperature={temperature}): the first two must be at least 1, the last at least 0"
            )
        self.num_examples = num_examples
        self.samples = samples
        self.temperature = temperature
        self.prompts: Literal["train", "validation"] = prompts
        self._prompts: list[Prompt] = []
        self._seed = 0

    def prepare(self, module: OPDModule, output: StepOutput, seed: int) -> None:
        """Draw the examples, and the random numbers of this search.

        Raises:
            UserError: The prompts have no answers.
        """
        if not self._prompts:
            self._prompts = draw_prompts(
                module,
                self.num_examples,
                derive_seed(seed, "examples"),
                held_out=self.prompts == "validation",
                answered=True,
            )
        self._seed = derive_seed(seed, output.t, "answers")

    def __call__(self, module: OPDModule) -> Score:
        mine = self._prompts[module.world.rank :: module.world.size]
        prompts = PromptBatch.collate(mine, module.sampler.pad_token_id).to(module.device)
        rollouts = stages.generate(
            module, prompts, self._seed, copies=self.samples, temperature=self.temperature
        )
        module.ledger.count("search_tokens", rollouts.num_tokens)
        module.ledger.count("search_generated_tokens", rollouts.num_tokens)
        right = stages.verify(module, rollouts).view(len(mine), self.samples)
        return Score(right.mean(dim=1), torch.ones(len(mine)))


class TeacherKL(CandidateScore):
    """Minus a divergence from the teacher, per token: needs no labels, and hardly any generation.

    Every candidate costs one student forward; the teacher's hidden states are reused.

    Args:
        rollouts: Completions to judge on. ``step``: those the step has just trained on. ``part``: a
            share of them, drawn by lot. ``held_out``: a share of the step's rollouts that is
            kept out of the gradient, against over-stepping. ``fresh``: new ones from W for training
            prompts that are drawn anew.
        fraction: Of the step's rollouts, for ``part`` and ``held_out``.
        num_examples: Prompts, for ``fresh``.
        divergence: reverse_kl; forward_kl, which sees what the student never says; or jeffreys, the
            sum of the two.
    """

    knows_moved = True

    def __init__(
        self,
        rollouts: Literal["step", "part", "held_out", "fresh"] = "step",
        fraction: float = 0.5,
        num_examples: int = 64,
        divergence: Literal["reverse_kl", "forward_kl", "jeffreys"] = "reverse_kl",
    ) -> None:
        if not 0 < fraction < 1 or num_examples < 1:
            raise UserError(
                f"TeacherKL(fraction={fraction}, num_examples={num_examples}): fraction must lie "
                "between 0 and 1, num_examples be at least 1"
            )
        self.rollouts = rollouts
        self.fraction = fraction
        self.num_examples = num_examples
        self.divergence = divergence
        self._readings: list[Reading] = []

    def check(self, module: OPDModule) -> None:
        """Refuse a module without a teacher."""
        if not module.teachers:
            raise UserError(
                "TeacherKL judges by the teacher, and model.teacher is null; use "
                "opd.scores.AnswerAccuracy"
            )

    def request(self) -> StepRequest:
        """Ask the step to keep what the search will need of it."""
        return StepRequest(
            keep_opinions=self.rollouts in ("step", "part"),
            held_out=self.fraction if self.rollouts == "held_out" else 0.0,
        )

    def prepare(self, module: OPDModule, output: StepOutput, seed: int) -> None:
        """Choose the completions and have the teacher read what it has not read yet."""
        if self.rollouts == "fresh":
            self._readings = self._fresh(module, derive_seed(seed, output.t, "fresh"))
        elif self.rollouts == "held_out":
            read = output.held_out_readings
            self._readings = read or [_read(module, micro) for micro in output.held_out]
        elif self.rollouts == "part":
            self._readings = [part_of(reading, self.fraction) for reading in output.readings]
        else:
            self._readings = output.readings

    def _fresh(self, module: OPDModule, seed: int) -> list[Reading]:
        prompts = draw_prompts(module, self.num_examples, derive_seed(seed, "prompts"))
        mine = prompts[module.world.rank :: module.world.size]
        batch = PromptBatch.collate(mine, module.sampler.pad_token_id).to(module.device)
        rollouts = stages.generate(module, batch, seed)
        module.ledger.count("search_generated_tokens", rollouts.num_tokens)
        return [_read(module, micro) for micro in stages.micro_batches(module, rollouts)]

    def __call__(self, module: OPDModule) -> Score:
        return stages.judge(module, self._readings, self.divergence)

    def release(self) -> None:
        """Let go of the teacher's hidden states."""
        self._readings = []


def _read(module: OPDModule, micro: Rollouts) -> Reading:
    """Let the teacher read what it has not read yet, at its price."""
    module.ledger.count("teacher_tokens", micro.num_tokens)
    return stages.read(module, micro)


def part_of(reading: Reading, fraction: float) -> Reading:
    """Keep a share of the step's completions, by their lots: the same on any number of ranks."""
    chosen = reading.micro.columns[LOT] >= 1 - fraction
    chosen &= reading.micro.counts > 0
    return reading.select(chosen.nonzero().flatten().tolist())


def draw_prompts(
    module: OPDModule, count: int, seed: int, *, held_out: bool = False, answered: bool = False
) -> list[Prompt]:
    """Draw prompts at random, the same on every rank.

    Args:
        module: Whose prompts.
        count: How many; if there are fewer, all.
        seed: Of the draw.
        held_out: Whether to draw validation prompts, rather than those that are trained on.
        answered: Whether to draw only those that have an answer.

    Raises:
        UserError: The module is not trained on a PromptDataModule, or no prompt has an answer.
    """
    data = module.trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
    if not isinstance(data, PromptDataModule):
        raise UserError("this score draws prompts: train with a PromptDataModule")
    found, key = (
        (data.validation_prompts, f"data.validation {data.validation}")
        if held_out
        else (data.train_prompts, f"data.train {data.train}")
    )
    prompts = [p for p in found if p.answer is not None or not answered]
    if not prompts:
        raise UserError(
            f"{key}: no row has an answer ({data.format.answer_field!r}), so AnswerAccuracy "
            "cannot judge; use TeacherKL, which needs no labels (--config effopd/label_free)"
        )
    shuffler = torch.Generator().manual_seed(seed)
    return [prompts[i] for i in torch.randperm(len(prompts), generator=shuffler)[:count].tolist()]
