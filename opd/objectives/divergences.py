"""Divergences between student and teacher as pure functions of log-probabilities.

Symbols as in the paper (arXiv 2605.11739): p = student, q = teacher, both [N, V] with N tokens and
a vocabulary of V; results are per token, [N], in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q), [N, V] -> [N]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(student || teacher): what OPD minimises (2605.11739, section 2)."""
    return kl(log_p, log_q)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(teacher || student)."""
    return kl(log_q, log_p)


def skew_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """Skew KL(p || alpha p + (1 - alpha) q), at most -log alpha (DistiLLM, arXiv 2402.03898)."""
    return kl(log_p, mixture(log_p, log_q, alpha))


def mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Log of weight p + (1 - weight) q, for 0 < weight < 1, [N, V]."""
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def generalized_jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1).

    beta KL(q || m) + (1 - beta) KL(p || m) with the mixture m = beta q + (1 - beta) p, for
    0 < beta < 1. Its gradient tends to beta times the forward KL's for beta -> 0, and to
    (1 - beta) times the reverse KL's for beta -> 1.
    """
    log_m = mixture(log_q, log_p, beta)
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
