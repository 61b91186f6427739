"""PPO's advantages: a value head that learns what completions will be rewarded with, and GAE.

In a configuration (a recipe: ``configs/rl/ppo.yaml``)::

    model:
      objective: opd.objectives.ClippedPolicyGradient
      rollouts_per_prompt: 1
      reward:
        of: opd.rewards.Correctness
        advantage:
          class_path: opd.rewards.GAE
          init_args: {gamma: 1.0, gae_lambda: 0.95}
      reuse: {steps: 4, held_out: 0.0}

No completion is compared with another of its prompt: every token has an advantage of its own, from
what the value head expected before and after it. The completion's reward comes at its last token,
and nothing after: one that max_new_tokens has cut off is over, too.

**The value head** V(s) = w . [h, 1] is linear in the student's last hidden state h at the token
before, and h is taken as it is: the student gets no gradient from it, so there is nothing to shard,
and adapters may be trained beside it. (A critic with a body of its own is not here.) Being linear,
it needs no learning rate: once a batch, after its values were used, it goes to the least squares of
the batch's returns, held back where the batch says little (:meth:`Critic.fit`); the GAE paper fits
V in a trust region (section 5), and this is that as a penalty. All that it needs of a batch are
sums over tokens (:class:`Moments`), F x F numbers, which are added up over micro-batches and ranks;
so every rank has the same w. It begins with 0, and is part of every checkpoint.

Values, advantages and the fit are made once a batch, before the first optimizer step on it; that
takes one more pass of the student's body. Logs ``rl/explained_variance`` of the values before the
fit: 1 - Var(return - V) / Var(return) over the global batch's tokens; 0 is no better than a
constant.

Shapes: B completions, C completion tokens (padded right), N sampled tokens, H hidden size,
F = H + 1 features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opd.errors import UserError
from opd.rewards.advantages import Advantage

EXPLAINED_VARIANCE = "rl/explained_variance"
EPSILON = 1e-8  # beside a standard deviation
FLOOR = 1e-6  # share of a feature's squares that holds it back at least: float32 sums are no finer
TINY = 1e-12  # what holds back a feature that is always 0


@dataclass(frozen=True)
class GAE(Advantage):
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16) with a value head: PPO.

    Args:
        gamma: Discount per token, at most 1, which discounts nothing.
        gae_lambda: From 0, one token's surprise r_t + gamma V_{t+1} - V_t, to 1, the return less
            V_t: less bias, more variance.
        normalize: Shift and scale advantages to mean 0 and variance 1 over the tokens of the global
            batch.
        damping: How much the value head is held back in its fit to a batch, above 0: a feature that
            goes along with no other takes 1 / (1 + damping) of the way.
    """

    gamma: float = 1.0
    gae_lambda: float = 0.95
    normalize: bool = True
    damping: float = 1.0

    def __post_init__(self) -> None:
        for name, value, valid, wanted in [
            ("gamma", self.gamma, 0 <= self.gamma <= 1, "at least 0 and at most 1"),
            ("gae_lambda", self.gae_lambda, 0 <= self.gae_lambda <= 1, "at least 0 and at most 1"),
            ("damping", self.damping, 0 < self.damping < math.inf, "above 0"),
        ]:
            if not valid:
                raise UserError(f"GAE.{name}={value} must be {wanted}")

    @property
    def compares(self) -> bool:
        return False

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """Return the rewards as they are: what a step shares out among tokens."""
        return reward


def generalized_advantages(
    reward: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> Tensor:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.

    arXiv 1506.02438, eq. 16. r_t is 0 but for the last token; V is 0 after it.

    Args:
        reward: Of completions, [B].
        values: V of what stands before each token, [B, C].
        mask: True at the tokens that count; others may lie between them, and are passed over,
            [B, C].
        gamma: Discount.
        gae_lambda: lambda.

    Returns:
        [B, C], 0 where the mask is False.
    """
    advantages = torch.zeros_like(values)
    zero = torch.zeros_like(reward)
    to_come, after, following = reward, zero, zero  # r_t, V_{t+1} and A_{t+1}
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = to_come + gamma * after - values[:, t]
        found = delta + gamma * gae_lambda * following
        advantages[:, t] = torch.where(here, found, zero)
        following = torch.where(here, found, following)
        after = torch.where(here, values[:, t], after)
        to_come = torch.where(here, zero, to_come)
    return advantages


def mean_and_variance(
    values: Tensor, reduce_sum: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Return mean and variance of the numbers of all ranks, 0 if there are none; a collective.

    Args:
        values: Those of this rank, of any shape, float64.
        reduce_sum: Sums a tensor over ranks.
    """
    sums = torch.stack([values.sum(), torch.tensor(float(values.numel())).to(values)])
    total, count = reduce_sum(sums).tolist()
    mean = total / max(count, 1)
    return mean, float(reduce_sum((values - mean).square().sum())) / max(count, 1)


@dataclass
class Moments:
    """Sums over tokens of features x and returns y: all that a linear fit needs.

    Attributes:
        xx: Sum of x x^T, float32, [F, F].
        xy: Sum of y x, float32, [F].
    """

    xx: Tensor
    xy: Tensor

    @classmethod
    def none(cls, features: int, device: torch.device) -> Moments:
        """Return the sums over no token."""
        return cls(
            torch.zeros(features, features, device=device), torch.zeros(features, device=device)
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: features [N, F] and returns [N], float32."""
        self.xx.addmm_(x.T, x)
        self.xy.addmv_(x.T, y)

    def summed(self, reduce_sum: Callable[[Tensor], Tensor]) -> Moments:
        """Add up those of all ranks; a collective."""
        return Moments(reduce_sum(self.xx), reduce_sum(self.xy))


class Critic(nn.Module):
    """A linear value head; the same on every rank, and in every checkpoint.

    Args:
        width: H.
    """

    weight: Tensor  # w, [F], float32

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(width + 1))

    @staticmethod
    def features(hidden: Tensor) -> Tensor:
        """Return x = [h, 1] of hidden states, [N, H] -> [N, F], float32."""
        hidden = hidden.detach().float()
        return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return V = w . x, [N, F] -> [N]."""
        return x @ self.weight

    def fit(self, moments: Moments, damping: float) -> None:
        """Move w to the damped least squares of a batch's returns.

        argmin over w' of sum (w' . x - y)^2 + damping sum_j D_j (w'_j - w_j)^2, with D_j the sum of
        (x_j - mean)^2, so that neither scale nor mean of a feature matters; the constant is free.

        Args:
            moments: Of the global batch.
            damping: Above 0.
        """
        xx, xy = moments.xx.cpu().double(), moments.xy.cpu().double()
        squares, sums, count = xx.diagonal(), xx[-1], xx[-1, -1]
        varying = squares - sums.square() / count.clamp(min=1)
        held = damping * torch.maximum(varying, FLOOR * squares).clamp(min=TINY)
        old = self.weight.cpu().double()
        step = torch.linalg.solve(xx + held.diag(), xy - xx @ old)
        self.weight.copy_(old + step)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if f"{prefix}weight" in state_dict:  # not in the checkpoint of a run without a critic
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
