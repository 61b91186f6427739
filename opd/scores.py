"""What judges a candidate: the accuracy of its answers (paper), or the teacher's KL (no labels).

A score is prepared once per search and then called for the incumbent and for every candidate, with
the weights in place. Same examples, same random numbers each time: the comparison is paired.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from opd.errors import UserError
from opd.extrapolation import Score
from opd.objectives import kl
from opd.prompts import Prompt, PromptBatch, PromptDataModule
from opd.randomness import derive_seed, generator
from opd.rollouts import Rollouts
from opd.step_rollouts import thin_out
from opd.teachers import TeacherScored

if TYPE_CHECKING:
    from opd.module import OPDModule


class CandidateScore(Protocol):
    """Judges the weights that a module holds at the moment; higher is better.

    The module is whatever LightningModule the callback is attached to. A score draws its randomness
    from the seed it is given and leaves the module and the global random state as it found them.
    """

    def before_step(self, module: Any) -> None:
        """Called before a step after which there will be a search."""
        ...

    def prepare(self, module: Any, step: int, seed: int) -> None:
        """Called once per search, with W in place: choose the examples."""
        ...

    def __call__(self, module: Any) -> Score:
        """Score the weights that the module holds, on this rank's examples."""
        ...


class AnswerAccuracy:
    """Share of right answers among completions to fixed training prompts (the paper's D_v).

    The examples are drawn once, at random, from the training prompts that have an answer, and are
    divided over the ranks.

    Args:
        num_examples: Prompts.
        samples: Completions per prompt. With 1, the standard error on 50 prompts is up to 0.07.
        temperature: Of these completions; 0 is greedy.
    """

    def __init__(self, num_examples: int = 50, samples: int = 1, temperature: float = 1.0) -> None:
        if num_examples < 1 or samples < 1 or temperature < 0:
            raise UserError(
                f"AnswerAccuracy(num_examples={num_examples}, samples={samples}, "
                f"temperature={temperature}): out of range"
            )
        self.num_examples = num_examples
        self.samples = samples
        self.temperature = temperature
        self._prompts: list[Prompt] = []
        self._key: tuple[int | str, ...] = ()

    def before_step(self, module: OPDModule) -> None:
        pass

    def prepare(self, module: OPDModule, step: int, seed: int) -> None:
        """Draw the examples, and the random numbers of this search.

        Raises:
            UserError: The training prompts have no answers.
        """
        if not self._prompts:
            self._prompts = draw_training_prompts(
                module, self.num_examples, derive_seed(seed, "examples"), answered=True
            )
        self._key = (seed, step, module.global_rank, "answers")

    def __call__(self, module: OPDModule) -> Score:
        ranks, rank = module.trainer.world_size, module.global_rank
        mine = self._prompts[rank::ranks]
        prompts = PromptBatch.collate(mine, module.sampler.pad_token_id).to(module.device)
        rollouts = module.generate(
            prompts.repeat(self.samples),
            generator(module.device, *self._key),
            temperature=self.temperature,
        )
        module.ledger.count("search_tokens", rollouts.num_tokens)
        module.ledger.count("search_generated_tokens", rollouts.num_tokens)
        right = module.verify(rollouts).view(len(mine), self.samples)
        return Score(right.mean(dim=1), torch.ones(len(mine)))


class TeacherKL:
    """Minus the reverse KL to the teacher, per token: needs no labels, and hardly any generation.

    Every candidate costs one student forward; the teacher's hidden states are reused.

    Args:
        rollouts: Completions to judge on. ``step``: those the step has just trained on. ``part``: a
            fixed fraction of them. ``held_out``: a fraction of the step's rollouts that is kept out
            of the gradient, against over-stepping. ``fresh``: new ones from W for fixed training
            prompts.
        fraction: Of the step's rollouts, for ``part`` and ``held_out``.
        num_examples: Prompts, for ``fresh``.
    """

    def __init__(
        self,
        rollouts: Literal["step", "part", "held_out", "fresh"] = "step",
        fraction: float = 0.5,
        num_examples: int = 64,
    ) -> None:
        if not 0 < fraction < 1 or num_examples < 1:
            raise UserError(
                f"TeacherKL(fraction={fraction}, num_examples={num_examples}): fraction must lie "
                "between 0 and 1, num_examples be at least 1"
            )
        self.rollouts = rollouts
        self.fraction = fraction
        self.num_examples = num_examples
        self._scored: list[TeacherScored] = []

    def before_step(self, module: OPDModule) -> None:
        """Ask the step to keep what the search will need of it."""
        if self.rollouts != "fresh":
            held_out = self.fraction if self.rollouts == "held_out" else 0.0
            module.step_rollouts.request(held_out)

    def prepare(self, module: OPDModule, step: int, seed: int) -> None:
        """Choose the completions and have the teacher score what it has not scored yet."""
        if self.rollouts == "fresh":
            micro_batches = self._sample(module, step, seed)
        else:
            micro_batches = module.step_rollouts.unscored
        self._scored = [module.score_with_teacher(micro) for micro in micro_batches]
        if self.rollouts == "step":
            self._scored = module.step_rollouts.scored
        elif self.rollouts == "part":
            self._scored = thin_out(module.step_rollouts.scored, self.fraction)

    def _sample(self, module: OPDModule, step: int, seed: int) -> list[Rollouts]:
        count = self.num_examples
        prompts = draw_training_prompts(module, count, derive_seed(seed, step, "fresh prompts"))
        mine = prompts[module.global_rank :: module.trainer.world_size]
        batch = PromptBatch.collate(mine, module.sampler.pad_token_id).to(module.device)
        rng = generator(module.device, seed, step, module.global_rank, "fresh")
        rollouts = module.generate(batch, rng)
        module.ledger.count("search_generated_tokens", rollouts.num_tokens)
        return module.micro_batches(rollouts)

    @torch.no_grad()
    def __call__(self, module: OPDModule) -> Score:
        training = module.student.training
        module.student.eval()
        values, weights = [torch.zeros(0)], [torch.zeros(0)]
        for scored in self._scored:
            log_p = module.student_logprobs(scored.rollouts)
            token_kl = kl(log_p, module.teacher_logprobs(scored))
            filled = scored.rollouts.lengths > 0  # the others only keep ranks in step
            values.append(-scored.rollouts.spread(token_kl).sum(dim=1)[filled].cpu())
            weights.append(scored.rollouts.lengths[filled].float().cpu())
            module.ledger.count("search_tokens", scored.rollouts.num_tokens)
        module.student.train(training)
        return Score(torch.cat(values), torch.cat(weights))


def draw_training_prompts(
    module: OPDModule, count: int, seed: int, *, answered: bool = False
) -> list[Prompt]:
    """Draw prompts of the training set at random, the same on every rank.

    Raises:
        UserError: The module is not trained on a PromptDataModule, or no prompt has an answer.
    """
    data = module.trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
    if not isinstance(data, PromptDataModule):
        raise UserError("this score draws training prompts: train with a PromptDataModule")
    prompts = [p for p in data.train_prompts if p.answer is not None or not answered]
    if not prompts:
        raise UserError(
            f"{data.train}: no row has an answer ({data.format.answer_field!r}), so AnswerAccuracy "
            "cannot judge; use TeacherKL, which needs no labels (configs/effopd/label_free.yaml)"
        )
    shuffler = torch.Generator().manual_seed(seed)
    return [prompts[i] for i in torch.randperm(len(prompts), generator=shuffler)[:count].tolist()]
