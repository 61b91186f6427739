"""A reward of completions, added to the advantage that the teacher gives their tokens.

In a configuration, or ``--model.reward.of opd.rewards.Correctness`` on the command line::

    model:
      objective: opd.objectives.PolicyGradient
      rollouts_per_prompt: 8
      reward:
        of: opd.rewards.Correctness
        advantage: opd.rewards.GroupNormalized
        weight: 0.5

The advantage of a token is then A_t = log q(y_t) - log p(y_t) + weight A, where A is made of the
rewards of all completions of its prompt, and is the same for all tokens of one. The completions of
a prompt are all on one rank, so that neither the batch nor the number of ranks matters.

Rewards have no part in validation, nor in the scores of EffOPD, which ask the teacher or answers.

Shapes: B completions, those of a prompt side by side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd.errors import UserError
from opd.prompts import Prompt
from opd.rewards.advantages import Advantage, GroupNormalized
from opd.rollouts import Rollouts
from opd.rollouts.records import RIGHT

REWARD = "reward"  # column: of each completion, NaN where there is none, [B]
ADVANTAGE = "advantage"  # column: of each completion, times the weight; 0 where there is none, [B]


class Reward(ABC):
    """Base of what says how good a completion is."""

    def check(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027 - any prompts may do
        """Called before a run, with the prompts that are trained on.

        Raises:
            UserError: It can do nothing with them.
        """

    @abstractmethod
    def __call__(self, rollouts: Rollouts, texts: Sequence[str]) -> Tensor | Sequence[float]:
        """Judge B completions, at least one; each rank has its own.

        Args:
            rollouts: The completions, with their prompts and answers. Their column ``right`` says
                what ``model.verifier`` has found: 1, 0, or NaN for prompts without an answer.
            texts: The completions as text, without special tokens.

        Returns:
            [B], higher is better; NaN where there is no reward.
        """


@dataclass(frozen=True)
class Correctness(Reward):
    """1 for a right answer, 0 for a wrong one, as ``model.verifier`` finds."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts of which none has an answer."""
        if prompts and all(prompt.answer is None for prompt in prompts):
            raise UserError(
                "model.reward.of opd.rewards.Correctness: no prompt of data.train has an answer; "
                "name their field with data.format.answer_field"
            )

    def __call__(self, rollouts: Rollouts, texts: Sequence[str]) -> Tensor:
        return rollouts.columns[RIGHT]


@dataclass(frozen=True)
class RewardTerm:
    """What a reward adds to the advantage; see :mod:`opd.rewards.reward`.

    Args:
        of: What the completions get a reward for: opd.rewards.Correctness, or a class of yours
            derived from opd.rewards.Reward.
        advantage: What becomes of the rewards of a prompt's completions: GroupNormalized, Centred
            or AsGiven, or a class of yours derived from opd.rewards.Advantage.
        weight: Of the advantage that they make, beside the teacher's, above 0.
    """

    of: Reward
    advantage: Advantage = field(default_factory=GroupNormalized)
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise UserError(f"model.reward.weight={self.weight} must be above 0")

    def check_copies(self, copies: int) -> None:
        """Make sure that there is something to compare.

        Args:
            copies: Completions per prompt.

        Raises:
            UserError: Every advantage would be 0.
        """
        if copies == 1 and self.advantage.compares:
            raise UserError(
                f"model.reward.advantage {type(self.advantage).__name__} compares the completions "
                "of a prompt, and model.rollouts_per_prompt is 1: every advantage would be 0; set "
                "--model.rollouts_per_prompt 4, or --model.reward.advantage opd.rewards.AsGiven"
            )

    def columns(self, rollouts: Rollouts, texts: Sequence[str], copies: int) -> dict[str, Tensor]:
        """Return the columns ``reward`` and ``advantage`` of B completions.

        Args:
            rollouts: All completions of whole prompts, those of one side by side.
            texts: The completions as text.
            copies: Completions per prompt.

        Raises:
            UserError: The rewards are not B numbers, or one is infinite.
        """
        found = self.of(rollouts, texts) if len(rollouts) else torch.zeros(0)
        reward = torch.as_tensor(found, dtype=torch.float64).cpu()
        name = type(self.of).__name__
        if reward.shape != (len(rollouts),):
            raise UserError(
                f"model.reward.of {name}: gives numbers of shape {list(reward.shape)} for "
                f"{len(rollouts)} completions; it must be one for each"
            )
        if reward.isinf().any():
            place = rollouts.prompts.prompts[int(reward.isinf().nonzero()[0])].place
            raise UserError(f"model.reward.of {name}: gives an infinite reward to {place}")
        known = ~reward.isnan()
        group = torch.arange(len(rollouts)) // copies
        advantage = torch.zeros_like(reward)
        advantage[known] = self.weight * self.advantage(reward[known], group[known])
        device = rollouts.lengths.device
        return {
            REWARD: reward.to(device, torch.float32),
            ADVANTAGE: advantage.to(device, torch.float32),
        }
