"""The geometry of an update dW = W - W_0: how large it is, how low its rank, where it points.

What section 4 of the paper (arXiv 2605.11739) finds in the weights is computed here, for one matrix
at a time: its spectrum (4.5), what is left of it in subspaces (4.6), the angle between its singular
directions and those of another checkpoint (4.7), and updates with another norm (4.8). ``opd
analyze`` does it for whole models, ``callbacks.UpdateGeometry`` during a run.

Everything is computed in float64. A matrix whose smaller side has more than :data:`EXACT` rows is
decomposed by the eigenvectors of A A^T or A^T A, whichever is smaller, in a third of the time;
where a few are wanted, by those of Lanczos' method (ARPACK), which goes on until they are exact.
Singular values are then exact to :data:`GRAM_ERROR` of the largest. (A randomised decomposition
finds values, and not directions: those of a flat spectrum come out with cosines of a half.)

Shapes: a matrix is [m, n], r = min(m, n); u [m, k], s [k] in descending order, v [n, k].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

EXACT = 512  # smaller side of a matrix
GRAM_ERROR = 2.0**-24  # of singular values that are square roots of eigenvalues in float64
ROUTERS = ("gate", "router", "shared_expert_gate")  # modules that choose experts
FEW = 1 / 16  # of all directions: so many Lanczos' method finds sooner than they are all found


def has_matrices(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a matrix of what a layer computes, or one for each of E experts.

    Biases, of experts too, and what chooses the experts are none.

    Args:
        name: Of the parameter.
        shape: [m, n], or [E, m, n].
    """
    *_, module, own = ["", *name.split(".")]
    return len(shape) in (2, 3) and not own.endswith("bias") and module not in ROUTERS


def names_of(name: str, shape: Sequence[int]) -> list[str]:
    """Name the matrices of a parameter: itself, or ``name[e]`` of E experts."""
    return [name] if len(shape) == 2 else [f"{name}[{e}]" for e in range(shape[0])]


def matrices_of(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of a parameter, [m, n] or [E, m, n], with their names."""
    parts = [tensor] if tensor.ndim == 2 else tensor
    yield from zip(names_of(name, tensor.shape), parts, strict=True)


@dataclass(frozen=True)
class Spectrum:
    """What the singular values s_1 >= s_2 >= ... of an update say (2605.11739, section 4.5).

    Attributes:
        norm: Frobenius norm, sqrt(sum s_i^2).
        spectral_norm: s_1.
        spectral_ratio: s_1 / Frobenius norm, in (0, 1]: 1 for rank one.
        effective_rank: exp(-sum p_i log p_i), p_i = s_i / sum s: between 1 and r.
        top_ratio: sqrt(sum_{i <= ceil(r/100)} s_i^2 / sum s_i^2), in (0, 1]: how much of the norm
            the largest hundredth of the singular values has.
    """

    norm: float
    spectral_norm: float
    spectral_ratio: float
    effective_rank: float
    top_ratio: float

    @staticmethod
    def of(s: Tensor) -> Spectrum:
        """Make it of all singular values of a matrix, [r]; of zeros, ratios and rank are NaN."""
        s = s.double()
        squares = s.square()
        total = squares.sum()
        p = s / s.sum()
        top = squares[: math.ceil(len(s) / 100)].sum()
        return Spectrum(
            norm=float(total.sqrt()),
            spectral_norm=float(s[0]),
            spectral_ratio=float(s[0] / total.sqrt()),
            effective_rank=float(torch.special.entr(p).sum().exp()),
            top_ratio=float((top / total).sqrt()),
        )


@dataclass(frozen=True)
class Decomposition:
    """The k largest singular values of a matrix and their directions.

    Attributes:
        u: Left singular directions, [m, k].
        s: Singular values, [k], descending.
        v: Right singular directions, [n, k]. Of large matrices, where s_i is 0 to rounding, u_i or
            v_i is 0: the one of the longer side.
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def leading(self, k: int) -> Decomposition:
        """Return the first k of them."""
        return Decomposition(self.u[:, :k], self.s[:k], self.v[:, :k])

    def part(self, first: int, last: int | None = None) -> Tensor:
        """Return sum_{first <= i < last} s_i u_i v_i^T, counted from 0, [m, n]."""
        kept = slice(first, last)
        product: Tensor = (self.u[:, kept] * self.s[kept]) @ self.v[:, kept].T
        return product


def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values of a matrix, [r], descending, float64.

    Of a large one they are exact to :data:`GRAM_ERROR` times the largest. If some number of the
    matrix is not finite, none of them is known: they are NaN.
    """
    matrix = matrix.double()
    if not matrix.isfinite().all():
        return matrix.new_full((min(matrix.shape),), math.nan)
    if min(matrix.shape) <= EXACT:
        exact: Tensor = torch.linalg.svdvals(matrix)
        return exact
    return _roots(torch.linalg.eigvalsh(_gram(matrix)).flip(0))


def decompose(matrix: Tensor, k: int | None = None) -> Decomposition:
    """Decompose a matrix.

    Args:
        matrix: [m, n].
        k: How many directions are wanted; None: all r of them.
    """
    matrix = matrix.double()
    r = min(matrix.shape)
    k = r if k is None else min(k, r)
    if r <= EXACT:
        return _small(matrix).leading(k)
    return _large(matrix, _gram(matrix), k)


def decompose_with_values(matrix: Tensor, k: int) -> tuple[Tensor, Decomposition]:
    """Return :func:`singular_values` and :func:`decompose` of a matrix, in less time than both."""
    matrix = matrix.double()
    if min(matrix.shape) <= EXACT:
        whole = _small(matrix)
        return whole.s, whole.leading(k)
    gram = _gram(matrix)
    return _roots(torch.linalg.eigvalsh(gram).flip(0)), _large(matrix, gram, k)


def _small(matrix: Tensor) -> Decomposition:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return Decomposition(u, s, vh.T)


def _large(matrix: Tensor, gram: Tensor, k: int) -> Decomposition:
    values, shorter = _eigenvectors(gram, k)
    s = _roots(values)
    inverse = torch.where(s > GRAM_ERROR * s[0], 1 / s, 0.0)
    if matrix.shape[0] <= matrix.shape[1]:
        return Decomposition(shorter, s, matrix.T @ shorter * inverse)
    return Decomposition(matrix @ shorter * inverse, s, shorter)


def _roots(values: Tensor) -> Tensor:
    """Return singular values of eigenvalues, which rounding may have made negative."""
    return values.clamp(min=0).sqrt()


def _gram(matrix: Tensor) -> Tensor:
    """Return A A^T or A^T A, whichever is smaller."""
    gram: Tensor = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return gram


def _eigenvectors(gram: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest eigenvalues, descending, [k], and their eigenvectors, [r, k]."""
    r = len(gram)
    if k > FEW * r or not 0 < float(gram.trace()) < math.inf:
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(0)[:k], vectors.flip(1)[:, :k]
    start = np.random.default_rng(0).standard_normal(r)
    found = eigsh(gram.cpu().numpy(), k, v0=start)
    values, vectors = (torch.from_numpy(part[..., ::-1].copy()).to(gram.device) for part in found)
    return values, vectors


def rounding(weight: Tensor, dtype: torch.dtype) -> float:
    """Estimate the spectral norm of what rounding has done to a matrix, from above.

    Rounded to relative steps of eps, n numbers of root mean square w have errors of about 0.2 eps
    w each (a uniform error in every step), independent of each other; a matrix of those has the
    spectral norm 0.2 eps w (sqrt(m) + sqrt(n)). This is 2.5 times as much: singular directions of
    an update whose values are below are not the update's.

    Args:
        weight: W, [m, n].
        dtype: What it was rounded to.
    """
    m, n = weight.shape
    size = float(weight.double().square().mean().sqrt())
    return torch.finfo(dtype).eps / 2 * size * (math.sqrt(m) + math.sqrt(n))


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Return |cos| of the angles between columns, [m, k] and [m, k] -> [k].

    Signs of singular directions mean nothing (section 4.7: lock-in).
    """
    one, other = one.double(), other.double()
    found: Tensor = (one * other).sum(dim=0).abs() / (one.norm(dim=0) * other.norm(dim=0))
    return found


def cosine(
    one: Iterable[Tensor],
    other: Iterable[Tensor],
    reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> float:
    """Return the cosine between two updates; NaN where one is 0.

    Args:
        one: Its tensors, perhaps this rank's shards.
        other: Likewise, on the same devices.
        reduce_sum: Sums a tensor over ranks if they hold shards; then a collective.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(one, other, strict=True):
        a, b = a.double(), b.double()
        sums += torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]).cpu()
    product, *squares = reduce_sum(sums).tolist()
    length = math.sqrt(squares[0]) * math.sqrt(squares[1])
    return float(product / length) if length else math.nan


def share(r: int, percent: float) -> int:
    """Return how many of r singular values are the given percentage, at least one."""
    return max(1, min(r, round(r * percent / 100)))


def rescaled(update: Tensor, norm: float) -> Tensor:
    """Return the update with another Frobenius norm; 0 stays 0."""
    own = float(update.double().norm())
    return update * (norm / own) if own else update


def norm_matched(update: Tensor, final_norm: float, strength: float) -> Tensor:
    """Return dW_e (1 + b (|dW_f| - |dW_e|) / |dW_e|) (section 4.8).

    Args:
        update: dW_e, of an early checkpoint.
        final_norm: |dW_f|, of the same matrix at the end.
        strength: b: 0 leaves the update as it is, 1 gives it the final norm.
    """
    own = float(update.double().norm())
    return rescaled(update, own + strength * (final_norm - own))


def aligned(directions: Sequence[Tensor]) -> list[Tensor]:
    """Give singular directions of consecutive checkpoints, [m] each, the sign of the one before."""
    found: list[Tensor] = []
    for direction in directions:
        flip = bool(found) and float(direction @ found[-1]) < 0
        found.append(-direction if flip else direction)
    return found


def principal_components(rows: Tensor) -> tuple[Tensor, float]:
    """Project points onto the plane in which they spread most (PCA).

    Args:
        rows: [points, dimensions].

    Returns:
        [points, 2], and the share of the variance in the plane, (l_1 + l_2) / sum l; 1 if all
        points are the same.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    plane = torch.zeros(len(rows), 2, dtype=torch.float64, device=rows.device)
    size = min(2, len(s))
    plane[:, :size] = u[:, :size] * s[:size]
    total = float(s.square().sum())
    return plane, float(s[:2].square().sum()) / total if total else 1.0
