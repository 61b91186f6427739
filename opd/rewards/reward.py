"""A reward of completions: added to the advantage that the teacher gives their tokens, or alone.

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
a prompt are all on one rank, so that neither the batch nor the number of ranks matters. With
opd.objectives.ClippedPolicyGradient A is all that there is: GRPO and DAPO (``configs/rl``). With
``advantage: opd.rewards.GAE`` every token has an A of its own: PPO (``opd/rewards/critic.py``).

Long completions have more tokens, and so more of the loss, which is a mean over tokens. ``per:
completion`` divides that out. ``overlong.buffer: 64`` takes up to 1 off completions that are nearly
as long as they may be (DAPO). ``dynamic: 16`` samples prompts until that many are there from which
something can be learnt (DAPO): those whose completions all have the same reward are left out.

Rewards have no part in validation, nor in the scores of EffOPD, which ask the teacher or answers.

Shapes: B completions, those of a prompt side by side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from opd.errors import UserError
from opd.prompts import Prompt
from opd.rewards.advantages import Advantage, GroupNormalized
from opd.rollouts import Rollouts
from opd.rollouts.records import RIGHT

OUTCOME = "outcome"  # column: what the reward says of each completion, NaN where it does not, [B]
REWARD = "reward"  # column: the same, less the penalty for its length, [B]
ADVANTAGE = "advantage"  # column: times the weight; 0 where there is none, [B]; with GAE [B, C]


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
class FromFunction(Reward):
    """A function of yours, by its import path, for rewards that look at texts and answers alone.

    Args:
        function: Takes the texts of B completions and their prompts, and gives B numbers, NaN where
            there is no reward; each rank calls it with its own completions.
    """

    function: Callable[[Sequence[str], Sequence[Prompt]], Sequence[float]]

    def __call__(self, rollouts: Rollouts, texts: Sequence[str]) -> Sequence[float]:
        return self.function(texts, rollouts.prompts.prompts)


@dataclass(frozen=True)
class Overlong:
    """A penalty for completions that come near a limit (DAPO, 2503.14476, eq. 13).

    0 up to ``longest`` - ``buffer`` tokens, 1 from ``longest`` on, and linear in between.

    Args:
        buffer: So many tokens before the limit it sets in; at least 1, at most ``longest``.
        longest: Tokens of a completion for which it is full. None: ``model.max_new_tokens``.
    """

    buffer: int
    longest: int | None = None

    def check(self, max_new_tokens: int) -> None:
        """Make sure that the limit is one.

        Raises:
            UserError: The penalty would be full before the first token, or never.
        """
        longest = max_new_tokens if self.longest is None else self.longest
        if not 1 <= self.buffer <= longest <= max_new_tokens:
            raise UserError(
                f"model.reward.overlong: buffer={self.buffer} must be at least 1 and at most "
                f"longest={longest}, and that at most model.max_new_tokens={max_new_tokens}"
            )

    def penalty(self, counts: Tensor, max_new_tokens: int) -> Tensor:
        """Return what is taken off the rewards of completions with so many tokens, [B] -> [B]."""
        longest = max_new_tokens if self.longest is None else self.longest
        beyond = counts.double() - (longest - self.buffer)
        return (beyond / self.buffer).clamp(0, 1)


def judged(of: Reward, rollouts: Rollouts, texts: Sequence[str]) -> Tensor:
    """Ask a reward, and look at what it gives: [B], float64, on the CPU.

    Raises:
        UserError: The rewards are not B numbers, or one is infinite.
    """
    found = of(rollouts, texts) if len(rollouts) else torch.zeros(0)
    reward = torch.as_tensor(found, dtype=torch.float64).cpu()
    name = type(of).__name__
    if reward.shape != (len(rollouts),):
        raise UserError(
            f"model.reward.of {name}: gives numbers of shape {list(reward.shape)} for "
            f"{len(rollouts)} completions; it must be one for each"
        )
    if reward.isinf().any():
        place = rollouts.prompts.prompts[int(reward.isinf().nonzero()[0])].place
        raise UserError(f"model.reward.of {name}: gives an infinite reward to {place}")
    return reward


@dataclass(frozen=True)
class RewardTerm:
    """What a reward adds to the advantage; see :mod:`opd.rewards.reward`.

    With ``dynamic``, the step's prompts (``data.batch_size``) are sampled that many at a time, all
    ranks together, until there are at least that many whose completions have different rewards, or
    all are used up. Only these are trained on, all of them (DAPO cuts what is beyond the number);
    all count in ``cost/rollout_tokens``, ``rollout/accuracy`` and ``rollout/reward``.
    ``rollout/dropped_fraction`` is the share of prompts that were sampled and left out.

    Args:
        of: What the completions get a reward for: opd.rewards.Correctness, or a class of yours
            derived from opd.rewards.Reward.
        advantage: What becomes of the rewards of a prompt's completions: GroupNormalized, Centred
            or AsGiven, or a class of yours derived from opd.rewards.Advantage; or GAE, which makes
            them advantages of tokens.
        weight: Of the advantage that they make, beside the teacher's, above 0.
        per: What counts alike: each ``token`` (DAPO), or each ``completion``, whose advantage is
            then multiplied by the step's mean length over its own (GRPO, 2402.03300, eq. 3).
        overlong: Takes a penalty for their length off the rewards. None: none.
        dynamic: Dynamic sampling: fewest prompts to train on whose completions have different
            rewards, the penalty apart (DAPO, 2503.14476, section 3.2). None: all prompts, once.
    """

    of: Reward
    advantage: Advantage = field(default_factory=GroupNormalized)
    weight: float = 1.0
    per: Literal["token", "completion"] = "token"
    overlong: Overlong | None = None
    dynamic: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise UserError(f"model.reward.weight={self.weight} must be above 0")
        if self.dynamic is not None and self.dynamic < 1:
            raise UserError(f"model.reward.dynamic={self.dynamic} must be at least 1 prompt")
        if self.dynamic is not None and not self.advantage.compares:
            raise UserError(
                "model.reward.dynamic leaves out prompts whose completions have the same reward, "
                f"from which {type(self.advantage).__name__} makes an advantage all the same; take "
                "it out, or use opd.rewards.GroupNormalized"
            )

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

    def columns(
        self, rollouts: Rollouts, texts: Sequence[str], copies: int, max_new_tokens: int
    ) -> dict[str, Tensor]:
        """Return the columns ``outcome``, ``reward`` and ``advantage`` of B completions.

        Args:
            rollouts: All completions of whole prompts, those of one side by side.
            texts: The completions as text.
            copies: Completions per prompt.
            max_new_tokens: The most tokens that a completion of the run may have.

        Raises:
            UserError: The rewards are not B numbers, or one is infinite.
        """
        reward = outcome = judged(self.of, rollouts, texts)
        if self.overlong is not None:
            reward = outcome - self.overlong.penalty(rollouts.counts.cpu(), max_new_tokens)
        known = ~reward.isnan()
        group = torch.arange(len(rollouts)) // copies
        advantage = torch.zeros_like(reward)
        advantage[known] = self.weight * self.advantage(reward[known], group[known])
        device = rollouts.lengths.device
        return {
            OUTCOME: outcome.to(device, torch.float32),
            REWARD: reward.to(device, torch.float32),
            ADVANTAGE: advantage.to(device, torch.float32),
        }


def differing(reward: Tensor, copies: int) -> list[int]:
    """Say which prompts have completions with different rewards.

    Args:
        reward: Of all completions of whole prompts, those of one side by side, [B]; NaN: none.
        copies: Completions per prompt.

    Returns:
        Their numbers, from 0 to B / copies.
    """
    of_prompts = reward.view(-1, copies)
    lowest = of_prompts.nan_to_num(math.inf).amin(dim=1)
    highest = of_prompts.nan_to_num(-math.inf).amax(dim=1)
    return (lowest < highest).nonzero().flatten().tolist()


def equal_shares(counts: Tensor, reduce_sum: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what gives completions equal shares of a token mean: the mean length over each's own.

    Over all ranks: (1/T) sum_i f_i sum_t l_it with f_i = T / (N |y_i|), T tokens of N completions,
    is (1/N) sum_i (1/|y_i|) sum_t l_it. A collective.

    Args:
        counts: Sampled tokens of this rank's completions, [B].
        reduce_sum: Sums a tensor over ranks.

    Returns:
        [B], float64.
    """
    lengths = counts.double()
    tokens, completions = reduce_sum(
        torch.stack([lengths.sum(), torch.full_like(lengths.sum(), len(lengths))])
    )
    shares: Tensor = tokens / completions / lengths
    return shares
