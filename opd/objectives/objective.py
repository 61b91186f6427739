"""Objectives: the loss per token, from the log-probabilities of student and teacher.

An objective is a small frozen dataclass, named in YAML by its class::

    model:
      objective:
        class_path: opd.objectives.GeneralizedJSD
        init_args: {beta: 0.25}

Averaging over the global batch is the module's business.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opd.errors import UserError
from opd.objectives.divergences import forward_kl, generalized_jsd, reverse_kl
from opd.objectives.policy_gradient import (
    importance_weight,
    opd_advantage,
    policy_gradient_loss,
)


class Objective:
    """Base of all objectives."""

    def __call__(self, log_p: Tensor, log_q: Tensor, tokens: Tensor, logmu_y: Tensor) -> Tensor:
        """Return the loss per token.

        Args:
            log_p: Student's log-probabilities, [N, V], with gradient.
            log_q: Teacher's log-probabilities, [N, V].
            tokens: The tokens sampled, [N].
            logmu_y: Their log-probabilities under the rollout engine, [N].

        Returns:
            [N].
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ReverseKL(Objective):
    """KL(student || teacher) over the full vocabulary: the exact form of the paper's gradient."""

    def __call__(self, log_p: Tensor, log_q: Tensor, tokens: Tensor, logmu_y: Tensor) -> Tensor:
        return reverse_kl(log_p, log_q)


@dataclass(frozen=True)
class ForwardKL(Objective):
    """KL(teacher || student) over the full vocabulary."""

    def __call__(self, log_p: Tensor, log_q: Tensor, tokens: Tensor, logmu_y: Tensor) -> Tensor:
        return forward_kl(log_p, log_q)


@dataclass(frozen=True)
class GeneralizedJSD(Objective):
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649).

    Args:
        beta: Weight of the teacher in the mixture, between 0 and 1, both excluded.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise UserError(
                f"GeneralizedJSD.beta={self.beta} must lie between 0 and 1; its limits are "
                "ForwardKL and ReverseKL"
            )

    def __call__(self, log_p: Tensor, log_q: Tensor, tokens: Tensor, logmu_y: Tensor) -> Tensor:
        return generalized_jsd(log_p, log_q, self.beta)


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """Sampled-token OPD (2605.11739, section 2): needs the teacher's log-prob of one token only.

    With one optimizer step per rollout the ratio is 1 and no clip fires; they are there because the
    published code has them.

    Args:
        clip: The ratio is clipped to [1 - clip, 1 + clip].
        dual_clip: Bound on the loss, in units of -A, where A < 0.
        importance_cap: Cap of the weight p / mu against the rollout engine; None: no weight.
    """

    clip: float = 0.2
    dual_clip: float = 3.0
    importance_cap: float | None = 5.0

    def __call__(self, log_p: Tensor, log_q: Tensor, tokens: Tensor, logmu_y: Tensor) -> Tensor:
        logp_y = log_p.gather(1, tokens[:, None]).squeeze(1)
        logq_y = log_q.gather(1, tokens[:, None]).squeeze(1)
        advantage = opd_advantage(logp_y, logq_y)
        loss = policy_gradient_loss(
            logp_y, logp_y.detach(), advantage, clip=self.clip, dual_clip=self.dual_clip
        )
        if self.importance_cap is None:
            return loss
        return importance_weight(logp_y, logmu_y, self.importance_cap) * loss
