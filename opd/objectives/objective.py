"""Objectives: the loss per token, from what student and teachers think of it.

An objective is a small frozen dataclass, named in YAML by its class::

    model:
      objective:
        class_path: opd.objectives.GeneralizedJSD
        init_args: {beta: 0.25}

It sees a tile of n tokens at a time, and no row looks at another; averaging over the global batch
is the step's business. Symbols as in the paper (arXiv 2605.11739): p = student, q = teacher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from opd.errors import UserError
from opd.objectives.distributions import Distributions
from opd.objectives.divergences import forward_kl, generalized_jsd, mixture, reverse_kl, skew_kl
from opd.objectives.policy_gradient import (
    fixed_negative_advantage,
    importance_weight,
    opd_advantage,
    policy_gradient_loss,
)
from opd.rollouts import Tokens
from opd.teachers import TEACHER, Gives

Direction = Literal["reverse", "forward"]  # KL(student || teacher), KL(teacher || student)


class Objective(ABC):
    """Base of all objectives."""

    # Properties: an annotation here would be looked up in the modules of all that derive from this,
    # and where it is not found, jsonargparse takes whatever is given for any option of theirs
    @property
    def needs(self) -> Mapping[str, Gives]:
        """Whose opinions the loss is made of, and how much of each.

        ``full``: the log-probabilities of all tokens; ``sampled``: that of the token sampled.
        """
        return {TEACHER: "full"}

    @property
    def metrics(self) -> Sequence[str]:
        """Names of what :meth:`measure` adds to the metrics of every step."""
        return ()

    def measure(self, both: Distributions, tokens: Tokens) -> Mapping[str, Tensor]:
        """Measure n tokens that are trained on: all of ``metrics``, [n] each, no gradient."""
        return {}

    @property
    def ratio_of(self) -> Literal["previous", "sampled"] | None:
        """Whose ratio p / mu is to weigh the loss where mu is not p; see :mod:`opd.reuse`.

        That of the last token that the loss depends on: the one before, where the loss is made of
        the whole distribution after it; else the one sampled. None: the loss has this weight.
        """
        return "previous" if "full" in self.needs.values() else "sampled"

    @property
    def needs_drift(self) -> bool:
        """Whether it looks at ``tokens.drift``, which takes one more product with a head."""
        return False

    @property
    def needs_reward(self) -> bool:
        """Whether it is made of ``tokens.advantage`` alone, so that it needs a ``model.reward``."""
        return False

    @abstractmethod
    def __call__(self, log_p: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        """Return the loss per token.

        Args:
            log_p: Student's log-probabilities, [n, V], with gradient.
            opinions: Teachers' log-probabilities by the names of ``needs``: [n, V] where all are
                needed, [n] where that of the sampled token is.
            tokens: What is known of the sampled tokens, n of them.

        Returns:
            [n].
        """

    def with_slope(self, both: Distributions, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the loss per token and its gradient by the student's logits; no graph is left.

        This is :meth:`__call__` and autograd; a subclass may know a closed form that takes less.

        Args:
            both: What student and teachers think.
            tokens: What is known of the sampled tokens, n of them.

        Returns:
            [n] and [n, V].
        """
        with torch.enable_grad():
            logits = both.log_p.detach().requires_grad_()
            opinions = as_needed(both.opinions, self.needs, tokens.y)
            loss = self(logits.log_softmax(dim=-1), opinions, tokens)
            if not loss.requires_grad:  # of what is cut off from the student, or has no tokens
                return loss, torch.zeros_like(logits)
            (slope,) = torch.autograd.grad(loss.sum(), logits)
        return loss.detach(), slope


def as_needed(
    opinions: Mapping[str, Tensor], needs: Mapping[str, Gives], y: Tensor
) -> dict[str, Tensor]:
    """Cut opinions down to what an objective needs of them.

    Args:
        opinions: By name, [n, V] or [n].
        needs: Names, and how much of each.
        y: The tokens sampled, [n].
    """
    needed = {}
    for name, much in needs.items():
        opinion = opinions[name]
        assert opinion.ndim == 2 or much == "sampled", f"{name} gives sampled tokens only"
        if opinion.ndim == 2 and much == "sampled":
            opinion = of_sampled(opinion, y)
        needed[name] = opinion
    return needed


def of_sampled(log_p: Tensor, y: Tensor) -> Tensor:
    """Pick log p(y) out of log p: [n, V], [n] -> [n]."""
    return log_p.gather(1, y[:, None]).squeeze(1)


@dataclass(frozen=True)
class ReverseKL(Objective):
    """KL(student || teacher) over the full vocabulary: the exact form of the paper's gradient."""

    def __call__(self, log_p: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        return reverse_kl(log_p, opinions[TEACHER])

    def with_slope(self, both: Distributions, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """By the logits: p (log p - log q - KL)."""
        return both.reverse_kl, (both.ratio - both.reverse_kl[:, None]).mul_(both.p)


@dataclass(frozen=True)
class ForwardKL(Objective):
    """KL(teacher || student) over the full vocabulary."""

    def __call__(self, log_p: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        return forward_kl(log_p, opinions[TEACHER])

    def with_slope(self, both: Distributions, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """By the logits: p - q."""
        return both.forward_kl, both.p - both.q


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

    def __call__(self, log_p: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        return generalized_jsd(log_p, opinions[TEACHER], self.beta)

    def with_slope(self, both: Distributions, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """By the logits: (1 - beta) p (log p - log m - KL(p || m))."""
        log_m = mixture(both.log_q, both.log_p, self.beta)
        of_teacher = (both.q * (both.log_q - log_m)).sum(dim=-1)
        ratio = both.log_p - log_m
        of_student = (both.p * ratio).sum(dim=-1)
        slope = (ratio - of_student[:, None]).mul_(both.p).mul_(1 - self.beta)
        return self.beta * of_teacher + (1 - self.beta) * of_student, slope


@dataclass(frozen=True)
class SkewKL(Objective):
    """KL to a mixture with the teacher, which stays finite (DistiLLM, arXiv 2402.03898).

    Args:
        alpha: Share in the mixture of the one that is compared with it, between 0 and 1, both
            excluded; towards 0 it is the plain KL.
        direction: ``reverse``: KL(p || alpha p + (1 - alpha) q); ``forward``:
            KL(q || alpha q + (1 - alpha) p).
    """

    alpha: float = 0.1
    direction: Direction = "reverse"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise UserError(
                f"SkewKL.alpha={self.alpha} must lie between 0 and 1; for alpha 0 use ReverseKL or "
                "ForwardKL"
            )

    def __call__(self, log_p: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        log_q = opinions[TEACHER]
        one, other = (log_p, log_q) if self.direction == "reverse" else (log_q, log_p)
        return skew_kl(one, other, self.alpha)

    def with_slope(self, both: Distributions, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """By the logits: p (h - sum_v p h), h = log p/m - alpha p/m, or -(1 - alpha) q/m."""
        if self.direction == "reverse":
            ratio = both.log_p - mixture(both.log_p, both.log_q, self.alpha)  # log p/m
            loss = (both.p * ratio).sum(dim=-1)
            slope = ratio - ratio.exp().mul_(self.alpha)
        else:
            ratio = both.log_q - mixture(both.log_q, both.log_p, self.alpha)  # log q/m
            loss = (both.q * ratio).sum(dim=-1)
            slope = ratio.exp_().mul_(self.alpha - 1)
        slope -= (both.p * slope).sum(dim=-1, keepdim=True)
        return loss, slope.mul_(both.p)


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """Sampled-token OPD (2605.11739, section 2): needs the teacher's log-prob of one token only.

    Where there is a ``model.reward``, its advantage is added to the teacher's.

    With one optimizer step per rollout the ratio is 1 and no clip fires; they are there because the
    published code has them.

    Args:
        clip: The ratio is clipped to [1 - clip, 1 + clip].
        dual_clip: Bound on the loss, in units of -A, where A < 0.
        importance_cap: Cap of the weight p / mu against the rollout engine; None: no weight.
    """

    needs: ClassVar[Mapping[str, Gives]] = {TEACHER: "sampled"}

    clip: float = 0.2
    dual_clip: float = 3.0
    importance_cap: float | None = 5.0

    @property
    def ratio_of(self) -> Literal["sampled"] | None:
        return "sampled" if self.importance_cap is None else None

    def __call__(self, log_p: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        logp_y = of_sampled(log_p, tokens.y)
        advantage = self.advantage(logp_y, opinions)
        if tokens.advantage is not None:
            advantage = advantage + tokens.advantage
        loss = policy_gradient_loss(
            logp_y, logp_y.detach(), advantage, clip=self.clip, dual_clip=self.dual_clip
        )
        if self.importance_cap is None:
            return loss
        return importance_weight(logp_y, tokens.logmu_y, self.importance_cap) * loss

    def advantage(self, logp_y: Tensor, opinions: Mapping[str, Tensor]) -> Tensor:
        """A_t of every token, [n], no gradient."""
        return opd_advantage(logp_y, opinions[TEACHER])


@dataclass(frozen=True)
class FixedNegativeAdvantage(Objective):
    """A control without a teacher: unlikely tokens get one fixed negative advantage, others none.

    "Does On-Policy Distillation Really Distill?" (arXiv 2608.31046) reports that sampled-token OPD
    owes most of its gain to making tokens rarer that the *student* itself finds improbable, and
    that a fixed advantage of -0.5 on them does as well as the teacher's. Whoever claims that a
    teacher has taught something compares with this.

    Exactly: the policy gradient -A_t grad log p(y_t), with A_t = ``advantage`` where p(y_t) <
    ``below``, else 0. On average over y this is the gradient of -``advantage`` times the mass of
    all such tokens. The loss is -``advantage`` times the share of sampled tokens that were such.

    The paper takes the fifth of a rank's sampled tokens with the lowest p(y), and the mean over
    these. Here a fixed probability decides, so that neither the batch nor the number of ranks
    matters, and the mean is over all tokens, as of every objective; the threshold is ours. The
    paper's next step, an advantage that grows with the entropy (OPSA), is not here. All this is
    known from summaries and the published code's documentation; the paper itself was not at hand.

    Args:
        advantage: Of a token below the threshold, below 0; -0.5 in the paper.
        below: Probability, above 0 and at most 1; at 1 nothing is left to learn but noise.
    """

    needs: ClassVar[Mapping[str, Gives]] = {}

    advantage: float = -0.5
    below: float = 0.5

    def __post_init__(self) -> None:
        if not (self.advantage < 0 < self.below <= 1):
            raise UserError(
                f"FixedNegativeAdvantage(advantage={self.advantage}, below={self.below}): the "
                "first must be below 0, the second above 0 and at most 1"
            )

    def __call__(self, log_p: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        logp_y = of_sampled(log_p, tokens.y)
        advantage = fixed_negative_advantage(logp_y, self.advantage, self.below)
        return policy_gradient_loss(logp_y, logp_y.detach(), advantage)
