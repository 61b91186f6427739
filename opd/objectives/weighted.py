"""Weights of tokens: any objective, times a number per token that is taken as given.

In a configuration::

    model:
      objective:
        class_path: opd.objectives.Weighted
        init_args:
          objective: {class_path: opd.objectives.SkewKL, init_args: {alpha: 0.2}}
          weight: {class_path: opd.objectives.ByEntropy, init_args: {of: teacher}}

A weight is made of one token: of what is thought after its prefix, of where it stands, and of how
far its prefix has drifted from what the teacher would have said. What the sum of losses is divided
by stays the number of tokens, so that a weight neither depends on the batch nor on how it is dealt
to ranks; weights that are small all over act like a smaller learning rate. No gradient flows
through a weight.

Not offered: other weights that need a completion as a whole, as ranks among its tokens: an
objective sees a tile of tokens, which may begin and end anywhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd.errors import UserError
from opd.objectives.distributions import Distributions
from opd.objectives.objective import Objective, as_needed
from opd.rollouts import Tokens
from opd.teachers import TEACHER, Gives

WEIGHT = "opd/token_weight"


class TokenWeight(ABC):
    """Base of what makes weights of tokens."""

    @property
    def needs(self) -> Mapping[str, Gives]:
        """Whose opinions it is made of, as :attr:`Objective.needs`."""
        return {}

    @property
    def needs_drift(self) -> bool:
        """Whether it looks at ``tokens.drift``, as :attr:`Objective.needs_drift`."""
        return False

    @abstractmethod
    def __call__(self, both: Distributions, tokens: Tokens) -> Tensor:
        """Return the weights of n tokens, at least 0, without gradient, [n]."""


@dataclass(frozen=True)
class Weighted(Objective):
    """An objective times a weight per token; see :mod:`opd.objectives.weighted`.

    Logs the mean weight, ``opd/token_weight``.

    Args:
        objective: Any objective.
        weight: What it is multiplied by.
    """

    objective: Objective
    weight: TokenWeight

    @property
    def needs(self) -> Mapping[str, Gives]:
        """All that either needs."""
        needs = {**self.objective.needs, **self.weight.needs}
        full = {name for part in (self.objective, self.weight) for name in _full(part.needs)}
        return needs | dict.fromkeys(full, "full")

    @property
    def ratio_of(self) -> Literal["previous", "sampled"] | None:
        return self.objective.ratio_of  # a weight is of the prefix

    @property
    def needs_drift(self) -> bool:
        return self.objective.needs_drift or self.weight.needs_drift

    @property
    def needs_reward(self) -> bool:
        return self.objective.needs_reward

    @property
    def metrics(self) -> Sequence[str]:
        return tuple(dict.fromkeys((*self.objective.metrics, WEIGHT)))

    def measure(self, both: Distributions, tokens: Tokens) -> Mapping[str, Tensor]:
        """Measure what the objective does, and the weight: if both have one, their product."""
        found = self.objective.measure(both, tokens)
        return {**found, WEIGHT: self.weight(both, tokens) * found.get(WEIGHT, 1.0)}

    def __call__(self, log_p: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        weight = self.weight(Distributions(log_p.detach(), opinions), tokens)
        needed = as_needed(opinions, self.objective.needs, tokens.y)
        return weight * self.objective(log_p, needed, tokens)

    def with_slope(self, both: Distributions, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Multiply both by the weight."""
        weight = self.weight(both, tokens)
        loss, slope = self.objective.with_slope(both, tokens)
        return weight * loss, slope * weight[:, None]


def _full(needs: Mapping[str, Gives]) -> list[str]:
    return [name for name, much in needs.items() if much == "full"]


@dataclass(frozen=True)
class ByEntropy(TokenWeight):
    """Weights by how open the next token is: uncertain + (certain - uncertain) exp(-H).

    exp(H) is the number of equally likely tokens that would be as open; so the weight is
    ``certain`` where one token has all the mass, half-way to ``uncertain`` where there are two to
    choose from, and near ``uncertain`` where there are many, whatever the vocabulary and the batch.

    Args:
        of: Whose entropy H: the ``student``'s, or the ``teacher``'s, who must give all tokens.
        certain: Weight where H is 0.
        uncertain: What the weight tends to for large H.
    """

    of: Literal["student", "teacher"] = "student"
    certain: float = 0.0
    uncertain: float = 1.0

    def __post_init__(self) -> None:
        ends = (self.certain, self.uncertain)
        if not (all(0 <= end < math.inf for end in ends) and any(ends)):
            raise UserError(
                f"ByEntropy(certain={self.certain}, uncertain={self.uncertain}): both must be at "
                "least 0, and not both 0"
            )

    @property
    def needs(self) -> Mapping[str, Gives]:
        return {TEACHER: "full"} if self.of == "teacher" else {}

    def __call__(self, both: Distributions, tokens: Tokens) -> Tensor:
        entropy = both.student_entropy if self.of == "student" else both.teacher_entropy
        return torch.lerp(
            torch.full_like(entropy, self.uncertain),
            torch.full_like(entropy, self.certain),
            (-entropy).exp(),
        )


@dataclass(frozen=True)
class ByPosition(TokenWeight):
    """Weights by where a token stands: 2^(-t / half_life) for t < first, else 0, t from 0.

    Args:
        first: So many tokens of a completion count; None: all. The others are generated all the
            same; ``callbacks.Horizon`` leaves them out.
        half_life: Tokens after which a weight has halved; None: it does not.
    """

    first: int | None = None
    half_life: float | None = None

    def __post_init__(self) -> None:
        if self.first is None and self.half_life is None:
            raise UserError("ByPosition weighs nothing: set first, half_life, or both")
        for name, value in [("first", self.first), ("half_life", self.half_life)]:
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"ByPosition.{name}={value} must be above 0")

    def __call__(self, both: Distributions, tokens: Tokens) -> Tensor:
        assert tokens.position is not None, "nobody has said where the tokens stand"
        position = tokens.position.to(both.log_p.dtype)
        weight = torch.ones_like(position)
        if self.half_life is not None:
            weight = torch.exp2(-position / self.half_life)
        return weight if self.first is None else weight * (position < self.first)


@dataclass(frozen=True)
class ByDrift(TokenWeight):
    r"""Weights early tokens more, by how much of the disagreement is still to come: IW-OPD.

    1 + gamma (1 - F_t), F_t = sum_{k<t} d_k / sum_k d_k over a completion (arXiv 2606.22600,
    algorithm 1), d_k = \|log q(y_k) - log mu(y_k)\| of the tokens sampled: 1 + gamma at its first
    token, towards 1 at its last. Where the two agree on every token, 1 + gamma everywhere.

    mu is what the engine has sampled with, which the student still is in the first step on its
    rollouts (but for top_p and top_k, which leave tokens out of mu); in further ones
    (``model.reuse``) weights stay what they were. The paper multiplies
    the advantage of sampled tokens: Weighted with PolicyGradient or SampledExOPD. Known from the
    notes on the paper and from the published code's description, not from the paper itself.

    Args:
        gamma: How much more the first token counts, above 0; 0.5 in the paper.
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise UserError(f"ByDrift.gamma={self.gamma} must be above 0")

    @property
    def needs_drift(self) -> bool:
        return True

    def __call__(self, both: Distributions, tokens: Tokens) -> Tensor:
        assert tokens.drift is not None, "nobody has said how far the prefixes have drifted"
        return 1 + self.gamma * (1 - tokens.drift.to(both.log_p.dtype))


def drift(logq_y: Tensor, logmu_y: Tensor) -> Tensor:
    r"""Return F_t of each token, sum_{k<t} d_k / sum_k d_k with d = \|log q - log mu\|, [B, C].

    Args:
        logq_y: Of the tokens sampled, 0 at padding, [B, C].
        logmu_y: Likewise.
    """
    apart = (logq_y - logmu_y).double().abs()
    total = apart.sum(dim=1, keepdim=True)
    before = apart.cumsum(dim=1) - apart
    return (before / total.where(total > 0, torch.ones_like(total))).to(logmu_y.dtype)
