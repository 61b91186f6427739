"""What student and teachers think of some tokens, and what follows from it, each computed once.

Loss, its gradient and the metrics are made of the same few arrays as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

from opd.teachers import TEACHER


class Distributions:
    """Distributions over the vocabulary at n tokens; no gradient flows through them.

    Symbols as in the paper (arXiv 2605.11739): p = student, q = teacher.

    Args:
        log_p: Student's log-probabilities, [n, V].
        opinions: Teachers' log-probabilities by name: [n, V], or of the tokens sampled only, [n].

    Attributes:
        p: [n, V].
        q: [n, V]; like all that is made of it, only where the teacher gives all tokens.
        ratio: log p - log q, [n, V].
        reverse_kl: KL(p || q), [n], in nats, like the others.
        forward_kl: KL(q || p), [n].
        student_entropy: H(p), [n].
        teacher_entropy: H(q), [n].
    """

    def __init__(self, log_p: Tensor, opinions: Mapping[str, Tensor]) -> None:
        self.log_p = log_p
        self.opinions = opinions

    @property
    def log_q(self) -> Tensor:
        """What the teacher gives: [n, V] or [n]."""
        return self.opinions[TEACHER]

    @cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @cached_property
    def q(self) -> Tensor:
        return self.log_q.exp()

    @cached_property
    def ratio(self) -> Tensor:
        return self.log_p - self.log_q

    @cached_property
    def reverse_kl(self) -> Tensor:
        return (self.p * self.ratio).sum(dim=-1)

    @cached_property
    def forward_kl(self) -> Tensor:
        return -(self.q * self.ratio).sum(dim=-1)

    @cached_property
    def student_entropy(self) -> Tensor:
        return -(self.p * self.log_p).sum(dim=-1)

    @cached_property
    def teacher_entropy(self) -> Tensor:
        return -(self.q * self.log_q).sum(dim=-1)
