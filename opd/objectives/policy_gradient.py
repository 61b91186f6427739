"""The sampled-token form of OPD: a policy gradient whose advantage the teacher gives.

Symbols as in the paper (arXiv 2605.11739, section 2): p = student, q = teacher, mu = rollout
engine, y = the token sampled. All arguments and results are per token, [N].
"""

from __future__ import annotations

import torch
from torch import Tensor


def opd_advantage(logp_y: Tensor, logq_y: Tensor) -> Tensor:
    """A_t = log q(y_t) - log p(y_t), detached, no baseline, no normalisation."""
    return (logq_y - logp_y).detach()


def exopd_advantage(logp_y: Tensor, logq_y: Tensor, logr_y: Tensor, scale: float) -> Tensor:
    """A_t = scale (log q - log r) - (log p - log r) at y_t (G-OPD, 2602.12125), detached."""
    return (scale * (logq_y - logr_y) - (logp_y - logr_y)).detach()


def fixed_negative_advantage(logp_y: Tensor, advantage: float, below: float) -> Tensor:
    """A_t = ``advantage`` where p(y_t) < ``below``, else 0 (after 2608.31046), detached."""
    return advantage * (logp_y.detach().exp() < below).to(logp_y.dtype)


def importance_weight(logp_y: Tensor, logmu_y: Tensor, cap: float) -> Tensor:
    """w_t = min(p(y_t) / mu(y_t), cap), detached: corrects for the engine's own numerics."""
    return (logp_y - logmu_y).detach().exp().clamp(max=cap)


def probability_ratio(logp_y: Tensor, logp_old_y: Tensor) -> Tensor:
    """rho_t = exp(clamp(log p - log p_old, +-20)), with the gradient of log p."""
    return (logp_y - logp_old_y).clamp(-20, 20).exp()


def clipped_surrogate(rho: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(rho A, clip(rho, 1 - low, 1 + high) A), to be maximised (PPO, 1707.06347, eq. 7)."""
    return torch.minimum(rho * advantage, rho.clamp(1 - low, 1 + high) * advantage)


def k3(logp_y: Tensor, logr_y: Tensor) -> Tensor:
    """Estimate KL(p || r) from y that p has sampled: r/p - log r/p - 1 (2402.03300, eq. 4).

    log r/p is kept within +-20, as that of a ratio; with the gradient of log p.
    """
    log_ratio = (logr_y - logp_y).clamp(-20, 20)
    return log_ratio.expm1() - log_ratio


def policy_gradient_loss(
    logp_y: Tensor,
    logp_old_y: Tensor,
    advantage: Tensor,
    *,
    clip: float = 0.2,
    dual_clip: float = 3.0,
) -> Tensor:
    """PPO-shaped surrogate with clip on both sides and dual clip (published code of 2605.11739).

    rho_t = exp(clamp(log p - log p_old, +-20)); the loss is -min(rho A, clip(rho) A), and where A
    < 0 at most -dual_clip * A.

    Args:
        logp_y: log p(y_t), with gradient.
        logp_old_y: log p(y_t) when the rollouts were made, without gradient.
        advantage: A_t.
        clip: rho is clipped to [1 - clip, 1 + clip].
        dual_clip: Bound on the loss, in units of -A, where A < 0.
    """
    rho = probability_ratio(logp_y, logp_old_y)
    surrogate = clipped_surrogate(rho, advantage, clip, clip)
    bounded = torch.maximum(surrogate, dual_clip * advantage)
    return -torch.where(advantage < 0, bounded, surrogate)
