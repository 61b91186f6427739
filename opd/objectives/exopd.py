"""ExOPD: go past the teacher, along the way that it has come from a reference (G-OPD, 2602.12125).

Symbols: p = student, q = teacher, r = a frozen reference: the student before training, or what
``model.reference`` names, as the model that the teacher was trained from. log q - log r is then the
reward that the teacher was trained for, but for a factor; the student gets ``scale`` times of it:

    A_t = scale (log q(y_t) - log r(y_t)) - (log p(y_t) - log r(y_t))

The best student is q (q/r)^(scale - 1), normalised: the teacher at scale 1, beyond it above 1, on
the way to it from the reference below 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opd.errors import UserError
from opd.objectives.distributions import Distributions
from opd.objectives.objective import Objective, PolicyGradient
from opd.objectives.policy_gradient import exopd_advantage
from opd.rollouts import Tokens
from opd.teachers import REFERENCE, TEACHER, Gives


def _check_scale(objective: ExOPD | SampledExOPD) -> None:
    if not 0 < objective.scale < math.inf:
        raise UserError(
            f"{type(objective).__name__}.scale={objective.scale} must be above 0; 1 is plain OPD, "
            "above 1 is beyond the teacher"
        )


@dataclass(frozen=True)
class ExOPD(Objective):
    """The full-vocabulary form: minus the expectation over p of A_t; may be below 0.

    Args:
        scale: Of the reward log q - log r, above 0; 1: ReverseKL; 1.25 in the published scripts.
    """

    needs: ClassVar[Mapping[str, Gives]] = {TEACHER: "full", REFERENCE: "full"}

    scale: float = 1.25

    def __post_init__(self) -> None:
        _check_scale(self)

    def __call__(self, log_p: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        return (log_p.exp() * self._cost(log_p - opinions[TEACHER], opinions)).sum(dim=-1)

    def with_slope(self, both: Distributions, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """By the logits: p (h - sum_v p h), h = -A."""
        cost = self._cost(both.ratio, both.opinions)
        loss = (both.p * cost).sum(dim=-1)
        return loss, (cost - loss[:, None]).mul_(both.p)

    def _cost(self, ratio: Tensor, opinions: Mapping[str, Tensor]) -> Tensor:
        """Return -A = (log p - log q) - (scale - 1) (log q - log r), [n, V]."""
        return ratio - (self.scale - 1) * (opinions[TEACHER] - opinions[REFERENCE])


@dataclass(frozen=True)
class SampledExOPD(PolicyGradient):
    """The sampled-token form: PolicyGradient with this advantage.

    Args:
        clip: As of PolicyGradient.
        dual_clip: As of PolicyGradient.
        importance_cap: As of PolicyGradient.
        scale: As of ExOPD.
    """

    needs: ClassVar[Mapping[str, Gives]] = {TEACHER: "sampled", REFERENCE: "sampled"}

    scale: float = 1.25

    def __post_init__(self) -> None:
        _check_scale(self)

    def advantage(self, logp_y: Tensor, opinions: Mapping[str, Tensor]) -> Tensor:
        """A_t of every token, [n], no gradient."""
        return exopd_advantage(logp_y, opinions[TEACHER], opinions[REFERENCE], self.scale)
