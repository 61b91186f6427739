"""The KL of student and teacher as seen from k tokens and one tail, which holds all others.

The buckets b are the tokens of a set S, one each, and the tail; P and Q are the masses of student
and teacher in them, P_b = p_b in S and P_tail = 1 - sum_S p. No mass is left out: a KL renormalised
over S is 0 at k = 1, and one without a tail can be negative, and rewards mass that flees from S.
By the chain rule it is the full KL less that inside of the tail, so never larger, and equal to it
where S is all tokens.

The set is a choice, not a function of the weights: no gradient flows through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.errors import UserError
from opd.objectives.distributions import Distributions, Support, support
from opd.objectives.objective import Direction, Objective
from opd.rollouts import Tokens
from opd.teachers import TEACHER


def bucket_ratio(log_p: Tensor, log_q: Tensor, inside: Tensor) -> Tensor:
    """Log P_b - log Q_b of the bucket b of every token, [n, V].

    Where all tokens are inside, the empty tail counts as one that both agree on.

    Args:
        log_p: The student's, [n, V].
        log_q: The teacher's, [n, V].
        inside: Which tokens are buckets of their own, [n, V] bool.
    """
    lowest = torch.finfo(log_p.dtype).min
    tail_p, tail_q = (
        log.masked_fill(inside, lowest).logsumexp(dim=-1, keepdim=True) for log in (log_p, log_q)
    )
    return torch.where(inside, log_p - log_q, tail_p - tail_q)


@dataclass(frozen=True)
class TopKKL(Objective):
    """KL over the k likeliest tokens and a tail; see :mod:`opd.objectives.top_k`.

    Logs how much mass student and teacher have inside of the set.

    Args:
        k: Tokens, at least 1; where there are not more of them, this is the full KL.
        support: Whose likeliest tokens are the set: the ``student``'s, the ``teacher``'s, their
            ``union``, up to 2 k, or their ``intersection``, which may be empty: then nothing is
            learnt from the token.
        direction: ``reverse``: KL(P || Q); ``forward``: KL(Q || P).
    """

    k: int
    support: Support = "student"
    direction: Direction = "reverse"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"TopKKL.k={self.k} must be at least 1 token")

    @property
    def metrics(self) -> Sequence[str]:
        return ("opd/student_mass_in_support", "opd/teacher_mass_in_support")

    def measure(self, both: Distributions, tokens: Tokens) -> Mapping[str, Tensor]:
        """Add up p and q over the set."""
        inside = both.support(self.support, self.k)
        masses = ((mass * inside).sum(dim=-1) for mass in (both.p, both.q))
        return dict(zip(self.metrics, masses, strict=True))

    def __call__(self, log_p: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        log_q = opinions[TEACHER]
        inside = support(log_p.detach(), log_q, self.support, self.k)
        ratio = bucket_ratio(log_p, log_q, inside)
        if self.direction == "reverse":  # the tail's tokens have its ratio: together P_tail of it
            return (log_p.exp() * ratio).sum(dim=-1)
        return -(log_q.exp() * ratio).sum(dim=-1)

    def with_slope(self, both: Distributions, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """By the logits: p (log P_b/Q_b - KL); forward: p (1 - Q_b/P_b), b the token's bucket."""
        inside = both.support(self.support, self.k)
        ratio = bucket_ratio(both.log_p, both.log_q, inside)
        if self.direction == "reverse":
            loss = (both.p * ratio).sum(dim=-1)
            return loss, ratio.sub_(loss[:, None]).mul_(both.p)
        loss = -(both.q * ratio).sum(dim=-1)
        return loss, both.p - (both.log_p - ratio).exp_()  # Q_b/P_b alone may be too large
