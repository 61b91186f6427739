"""Weights that move along lines: where they will be, from where they have been.

Pure functions of the accelerators beside EffOPD. Symbols are those of their papers: W_0 the weights
at the beginning, dW_t = W_t - W_0 the displacement after step t, T the step aimed at.

Shapes: K observations of a tensor of m x n numbers, or of d numbers in any shape. Sums are taken in
float64. Tensors may be shards where it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import memory
from opd.geometry import decompose

AT_A_TIME = 2**22  # numbers of each observation that are multiplied at a time


# --- moves ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """How weights have moved, over all tensors and ranks.

    Attributes:
        coefficient: c, of the part of the move that is c (W - anchor).
        direction_norm: ||W - anchor||, with the weights before the move.
        norm: ||W' - W||, W' after it.
    """

    coefficient: float
    direction_norm: float
    norm: float

    def metrics(self) -> dict[str, float]:
        """What to log of it."""
        return {
            "coefficient": self.coefficient,
            "direction_norm": self.direction_norm,
            "move_norm": self.norm,
        }


@torch.no_grad()
def move_to(
    weights: Sequence[Tensor],
    anchor: Sequence[Tensor],
    targets: Iterable[Tensor],
    reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Move:
    """Put weights, or shards of them, where the targets say, and say how far that was.

    Args:
        weights: Tensors to overwrite.
        anchor: The anchor, on the same or another device.
        targets: Their new values, asked for one by one: a target may be made of its weight.
        reduce_sum: Sums a tensor over ranks if they hold shards; called once, then a collective.

    Raises:
        UserError: There was not enough memory, and some weights have moved.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=weights[0].device)
    with memory.needed_for("a move of the weights", weights_change=True):
        for w, a, target in zip(weights, anchor, targets, strict=True):
            direction, move = w.double() - a.to(w.device), target.double() - w
            sums += torch.stack(
                [(move * direction).sum(), direction.square().sum(), move.square().sum()]
            )
            w.copy_(target)
    along, squares, moved = reduce_sum(sums).tolist()
    return Move(along / squares if squares else 0.0, squares**0.5, moved**0.5)


# --- a line through a trajectory ------------------------------------------------------------------


@torch.no_grad()
def gram(displacements: Sequence[Tensor]) -> Tensor:
    """Inner products of a tensor's displacements, or of what their shards add to them.

    Args:
        displacements: dW_1, ..., dW_K of one tensor, or this rank's shards, of d numbers each.

    Returns:
        [K, K], float64.
    """
    rows = [d.flatten() for d in displacements]
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows[0].device)
    for begin in range(0, rows[0].numel(), AT_A_TIME):
        part = torch.stack([row[begin : begin + AT_A_TIME].double() for row in rows])
        products += part @ part.T
    return products


def rank_one_line(grams: Tensor, steps: Sequence[int], target: int) -> tuple[Tensor, float]:
    """Predict displacements at a step by a line along a tensor's first direction (2605.21468).

    With M [K, d] the displacements as rows, M = s u v^T + ... and c = M v = s u [K] how far each
    has come along v, RELEX predicts dW_T = c(T) v, where c(t) is the least-squares line of c on t.
    Since v = M^T u / s, and c(T) is a sum h . c with weights h that know only the steps, this is a
    sum of the displacements::

        dW_T = sum_k beta_k dW_k,    beta = (h . u) u

    so that nothing of size d is decomposed: u is the first eigenvector of M M^T [K, K].

    Args:
        grams: M M^T of each of N tensors, [N, K, K]; of one that has not moved, zeros.
        steps: Of the observations, K of them, two at least.
        target: T.

    Returns:
        beta of each tensor, [N, K]; and the share of all squared displacements that lies along
        the first directions, 0 to 1.
    """
    values, vectors = torch.linalg.eigh(grams.cpu())
    u = vectors[..., -1]  # eigenvalues ascend
    t = torch.tensor(steps, dtype=torch.float64)
    centred = t - t.mean()
    h = 1 / len(t) + (target - t.mean()) * centred / centred.square().sum()
    total = float(values.sum())
    share = float(values[..., -1].sum()) / total if total else 0.0
    return (u @ h).unsqueeze(-1) * u, share


@torch.no_grad()
def combine(anchor: Tensor, displacements: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Return W_0 + sum_k beta_k dW_k of one tensor or shard, where the displacements are."""
    found = anchor.to(displacements[0].device, copy=True)
    for displacement, factor in zip(displacements, factors, strict=True):
        found.add_(displacement, alpha=factor)
    return found


# --- a line of singular vectors against a score ---------------------------------------------------


def first_component(displacement: Tensor, aligned_with: Tensor | None) -> tuple[Tensor, Tensor]:
    """First singular vectors of a matrix's displacement, the left as long as all (2510.00553).

    dW = sum_i s_i u_i v_i^T. AlphaRL looks at x = a s_1 u_1, where a = ||dW||_F / s_1 is the norm
    of the whole over that of its rank-1 part: so x = ||dW||_F u_1.

    Args:
        displacement: dW [m, n].
        aligned_with: An earlier x [m]; of the two signs that u_1 and v_1 may have, x gets the one
            that is nearer to it.

    Returns:
        x [m] and v_1 [n], float32, on the CPU. The same in every run; no random state changes.
    """
    leading = decompose(displacement, 1)
    x = (displacement.double().norm() * leading.u[:, 0]).float().cpu()
    v_1 = leading.v[:, 0].float().cpu()
    if aligned_with is not None and torch.dot(x, aligned_with) < 0:
        return -x, -v_1
    return x, v_1


def where_score_is(points: Tensor, scores: Tensor, target: float) -> Tensor | None:
    """Say where a score will have a value, by partial least squares with one component.

    X = points and y = scores, both less their means: the direction w = X^T y, whose coordinates
    t = X w go best with y; loadings p = X^T t / t.t of the points and q = y.t / t.t of the scores.
    The model y = q t is solved for t, and x = p t is the point. Nothing is scaled.

    Args:
        points: [K, m].
        scores: [K].
        target: y*.

    Returns:
        x* [m], in float64; None if the scores, or the points, do not differ.
    """
    x, y = points.double(), scores.double()
    mean, middle = x.mean(dim=0), y.mean()
    x, y = x - mean, y - middle
    t = x @ (x.T @ y)
    length = t.square().sum()
    if not length > 0:
        return None
    p, q = x.T @ t / length, y @ t / length
    return mean + (target - middle) / q * p
