"""What updates look like without running the model: sections 4.2, 4.5 and 4.7 of 2605.11739.

Models are gone through matrix by matrix: of each, the base and all checkpoints are read, and what
is kept are numbers. A row is a mapping from column to value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch

from eval.analyze.updates import MATRICES, Checkpoint, Row, Updates
from opd import geometry
from opd.errors import UserError
from opd.geometry_rows import parameter_of

GROUPS = (*MATRICES, "embedding", "head", "other")
MEASURES = ("norm", "spectral_norm", "spectral_ratio", "effective_rank", "top_ratio")


@dataclass
class Spectra:
    """Tables of updates.

    Attributes:
        norms: A row per checkpoint: the norm of dW, over all tensors and by group.
        matrices: A row per checkpoint and matrix: its spectrum.
        directions: A row per checkpoint and matrix, of runs of several checkpoints: the cosines of
            its left singular directions with those at the end; of all, ``cosine_mean``. Only
            ``directions`` of them are there, whose singular values stand out of what rounding does
            to the weights: an adapter of rank 4 has four.
        planes: A row per checkpoint and matrix: u_1 in the plane of its first two principal
            components over the run, and how much of the variance is in there.
    """

    norms: list[Row] = field(default_factory=list)
    matrices: list[Row] = field(default_factory=list)
    directions: list[Row] = field(default_factory=list)
    planes: list[Row] = field(default_factory=list)


def tensor_norms(updates: Updates) -> dict[tuple[str, int], dict[str, float]]:
    """Return the norm of dW of every tensor, by label and step, and by name.

    Raises:
        UserError: A checkpoint is the base, or holds NaN.
    """
    found = {}
    for checkpoint in updates.checkpoints:
        norms = {name: updates.norm(checkpoint, name) for name in updates.places}
        if not any(norms.values()):
            raise UserError(
                f"--checkpoints {checkpoint.tensors.source}: its weights are those of "
                f"{updates.base.source}; there is no update to analyse"
            )
        found[checkpoint.label, checkpoint.step] = norms
    return found


def norm_rows(updates: Updates, norms: dict[tuple[str, int], dict[str, float]]) -> list[Row]:
    """Return a row per checkpoint: |dW| of all tensors, and of each group."""
    rows = []
    for checkpoint in updates.checkpoints:
        of = norms[checkpoint.label, checkpoint.step]
        row = _who(checkpoint) | {"norm": math.hypot(*of.values())}
        for group in GROUPS:
            parts = [value for name, value in of.items() if updates.places[name].group == group]
            row[group] = math.hypot(*parts)
        rows.append(row)
    return rows


def matrix_rows(updates: Updates, directions: int) -> Iterator[Spectra]:
    """Go through all matrices of MLP and attention.

    Args:
        updates: What is analysed.
        directions: Singular directions that are followed, k = 1, ..., 20 in the paper; 0: none.

    Yields:
        The rows of one matrix.
    """
    for name in updates.matrices:
        found, before = Spectra(), updates.base.read(name)
        for run in updates.runs.values():
            follow = bool(directions) and len(run) > 1
            leading: dict[str, list[_Leading]] = {}
            for checkpoint in run:
                after = checkpoint.tensors.read(name)
                coarser = max(before.dtype, after.dtype, key=lambda dtype: torch.finfo(dtype).eps)
                update = updates.difference(checkpoint, name, before, after)
                weights = geometry.matrices_of(name, before)
                for (matrix, weight), (_, delta) in zip(
                    weights, geometry.matrices_of(name, update), strict=True
                ):
                    row = _where(updates, checkpoint, matrix)
                    if follow:
                        values, of = geometry.decompose_with_values(delta, directions)
                        one = _Leading(row, of, geometry.rounding(weight, coarser))
                        leading.setdefault(matrix, []).append(one)
                    else:
                        values = geometry.singular_values(delta)
                    found.matrices.append(row | asdict(geometry.Spectrum.of(values)))
            for of_run in leading.values():
                if all(one.of.s[0] for one in of_run):
                    found.directions += _direction_rows(of_run)
                    found.planes += _plane_rows(of_run)
        yield found


@dataclass(frozen=True)
class _Leading:
    """The leading directions of a matrix's update; ``noise`` is what rounding has of them."""

    row: Row
    of: geometry.Decomposition
    noise: float

    @property
    def count(self) -> int:
        """How many stand out."""
        return int((self.of.s > self.noise).sum())


def _direction_rows(run: Sequence[_Leading]) -> list[Row]:
    rows = []
    for one in run:
        count = min(one.count, run[-1].count)
        if not count:
            continue
        cosines = geometry.cosines(one.of.u[:, :count], run[-1].of.u[:, :count])
        row = one.row | {"cosine_mean": float(cosines.mean())}
        row |= {"directions": count}
        row |= {f"cosine_{k}": float(value) for k, value in enumerate(cosines, start=1)}
        rows.append(row)
    return rows


def _plane_rows(run: Sequence[_Leading]) -> list[Row]:
    if not all(one.count for one in run):
        return []
    first = geometry.aligned([one.of.u[:, 0] for one in run])
    points, explained = geometry.principal_components(torch.stack(first))
    return [
        one.row | {"x": float(x), "y": float(y), "explained": explained}
        for one, (x, y) in zip(run, points.tolist(), strict=True)
    ]


def mean_rows(matrices: Sequence[Row], measures: Sequence[str] = MEASURES) -> list[Row]:
    """Average over the matrices of each checkpoint; those that were not moved are left out."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in matrices:
        found.setdefault((row["run"], row["step"]), []).append(row)
    means = []
    for rows in found.values():
        moved = [row for row in rows if row.get("norm", 1.0) > 0]
        mean = {k: rows[0][k] for k in ("run", "step", "checkpoint")} | {"matrices": len(moved)}
        mean |= {m: math.fsum(r[m] for r in moved) / len(moved) for m in measures if moved}
        means.append(mean)
    return means


def _who(checkpoint: Checkpoint) -> Row:
    return {"run": checkpoint.label, "step": checkpoint.step, "checkpoint": checkpoint.name}


def _where(updates: Updates, checkpoint: Checkpoint, matrix: str) -> Row:
    place = updates.places[parameter_of(matrix)]
    about = {"matrix": matrix, "layer": place.layer, "kind": place.kind, "group": place.group}
    return _who(checkpoint) | about
