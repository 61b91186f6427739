"""What student and teachers think of some tokens, and what follows from it, each computed once.

Loss, its gradient and the metrics are made of the same few arrays as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from opd.teachers import TEACHER

BLOCK = 256  # tokens among which the likeliest is looked for first
# The k likeliest tokens of one, or of both together, or those that are among the k of both
Support = Literal["student", "teacher", "union", "intersection"]


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
        self._supports: dict[tuple[Support, int], Tensor] = {}

    def support(self, of: Support, k: int) -> Tensor:
        """Say which tokens are in a set, [n, V] bool; see :func:`support`."""
        if (of, k) not in self._supports:
            self._supports[of, k] = support(self.log_p, self.log_q, of, k)
        return self._supports[of, k]

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


def support(log_p: Tensor, log_q: Tensor, of: Support, k: int) -> Tensor:
    """Say which tokens are among the ``k`` likeliest ones of student, teacher, or both.

    Returns:
        [n, V] bool.
    """
    if of == "student":
        return _among_largest(log_p, k)
    if of == "teacher":
        return _among_largest(log_q, k)
    ours, theirs = _among_largest(log_p, k), _among_largest(log_q, k)
    return ours.logical_or_(theirs) if of == "union" else ours.logical_and_(theirs)


def _among_largest(values: Tensor, k: int) -> Tensor:
    _, columns = largest(values, min(k, values.shape[1]))
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, columns, True)


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest values of each row and their columns, [n, V] -> [n, k] twice.

    The largest are in the k blocks whose own largest are: only these are sorted.
    """
    size = values.shape[1]
    whole = size // BLOCK
    if whole <= k:
        values, columns = values.topk(k, dim=1)
        return values, columns
    blocks = values[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).amax(dim=2).topk(k).indices
    columns = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    rest = torch.arange(whole * BLOCK, size, device=values.device).expand(len(values), -1)
    columns = torch.cat([columns, rest], dim=1)
    found, at = values.gather(1, columns).topk(k, dim=1)
    return found, columns.gather(1, at)
