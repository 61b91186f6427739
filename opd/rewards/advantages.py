"""Advantages: what becomes of the rewards of completions of the same prompts.

Shapes: B completions; a group are the completions of one prompt.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.errors import UserError


class Advantage(ABC):
    """Base of what makes advantages of rewards."""

    @property
    def compares(self) -> bool:
        """Whether completions of a prompt are compared with each other, so that one has none."""
        return True

    @abstractmethod
    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        """Return the advantages of B completions, [B].

        Args:
            reward: Their rewards, [B], float64.
            group: Which prompt each belongs to, [B], from 0.
        """


@dataclass(frozen=True)
class GroupNormalized(Advantage):
    """(r - mean) / (std + epsilon) over a group: GRPO (arXiv 2402.03300, section 4.1.2).

    The standard deviation is that of a sample (n - 1); of one completion alone it is 0. Where all
    have the same reward, so is the advantage.

    Args:
        epsilon: At least 0.
    """

    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < math.inf:
            raise UserError(f"GroupNormalized.epsilon={self.epsilon} must be at least 0")

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        centred = reward - group_mean(reward, group)
        count = torch.bincount(group)[group]
        variance = group_mean(centred.square(), group) * count / (count - 1).clamp(min=1)
        scale = variance.sqrt() + self.epsilon
        return torch.where(_differs(reward, group), centred / scale, torch.zeros_like(centred))


@dataclass(frozen=True)
class Centred(Advantage):
    """r - mean over a group, whatever its spread: Dr. GRPO (arXiv 2503.20783, section 3.2)."""

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        return reward - group_mean(reward, group)


@dataclass(frozen=True)
class AsGiven(Advantage):
    """The reward itself: for rewards that are advantages, above 0 for good and below 0 for bad."""

    @property
    def compares(self) -> bool:
        return False

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        return reward


def _differs(values: Tensor, group: Tensor) -> Tensor:
    """Say whether those of each one's group differ at all, [B] -> [B]; their mean rounds."""
    size = int(group.max()) + 1 if len(group) else 0
    most, least = (
        torch.zeros(size, dtype=values.dtype).scatter_reduce(
            0, group, values, which, include_self=False
        )
        for which in ("amax", "amin")
    )
    return (most > least)[group]


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """Return the mean of each one's group, [B] -> [B]."""
    sums = torch.zeros(int(group.max()) + 1 if len(group) else 0, dtype=values.dtype)
    return sums.index_add_(0, group, values)[group] / torch.bincount(group)[group]
