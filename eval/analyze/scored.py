"""What parts of an update are worth: W_0 with a part of dW, scored (2605.11739, section 4).

Each analysis yields rows: a run, what was done to its update, and the scores. Where an analysis
speaks of matrices, these are those of MLP and attention, and all else stays at W_0; the row of all
of them says what that costs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from eval.analyze.judge import Change, Judge
from eval.analyze.updates import MATRICES, Checkpoint, Row, Updates
from opd import geometry

Norms = Mapping[tuple[str, int], Mapping[str, float]]  # of dW: by run and step, by tensor
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the update, a in W_0 + a dW
KEPT = (1, 5, 10, 25, 50)  # per cent of the singular components
STRENGTHS = (0.0, 0.4, 0.8, 1.0, 1.2, 1.6)  # b of section 4.8


def everything(updates: Updates, checkpoint: Checkpoint, factor: float = 1.0) -> Change:
    """Change all tensors by ``factor`` dW."""
    return lambda name: factor * updates.delta(checkpoint, name)


def scaling(updates: Updates, judge: Judge, norms: Norms) -> Iterator[Row]:
    """Score W_0 + a dW for a in [0, 1] (section 4.1), of the last checkpoint of each run."""
    for run in updates.runs.values():
        last = run[-1]
        norm = _total(norms, last)
        for a in SHARES:
            scores = judge(everything(updates, last, a) if a else _nothing)
            yield {"run": last.label, "step": last.step, "a": a, "norm": a * norm, **scores}


def dynamics(updates: Updates, judge: Judge, norms: Norms) -> Iterator[Row]:
    """Score every checkpoint (section 4.2); step 0 is W_0."""
    before = judge(_nothing)
    for run in updates.runs.values():
        yield {"run": run[0].label, "step": 0, "norm": 0.0, **before}
        for checkpoint in run:
            scores = judge(everything(updates, checkpoint))
            norm = _total(norms, checkpoint)
            yield {"run": checkpoint.label, "step": checkpoint.step, "norm": norm, **scores}


def embeddings(updates: Updates, judge: Judge) -> Iterator[Row]:
    """Put W_0's embedding, and head, into the trained model (section 4.3).

    Where prompts are there, ``cosine`` is that of the last hidden states of W_0 and of these
    weights, mean over the tokens of completions that W_0 has sampled. (The paper speaks of token
    embeddings; those of the input table hardly move.)
    """
    read = reference = None
    if judge.prompts is not None:
        judge.put(_nothing)
        read = judge.prompts.hidden()
        reference = read()
    for run in updates.runs.values():
        last = run[-1]
        for what, groups in [
            ("as trained", ()),
            ("with the base's embedding", ("embedding",)),
            ("with the base's head", ("head",)),
            ("with both of the base", ("embedding", "head")),
        ]:
            if not set(groups) <= {place.group for place in updates.places.values()}:
                continue  # without a head, what both are is the embedding
            row = {"run": last.label, "step": last.step, "weights": what}
            row |= judge(functools.partial(_without, updates, last, groups))
            if read is not None and reference is not None:
                pairs = zip(read(), reference, strict=True)
                row["cosine"] = float(torch.cat([_cosines(*pair) for pair in pairs]).mean())
            yield row


def windows(updates: Updates, judge: Judge, radius: int) -> Iterator[Row]:
    """Give W_0 the dW of MLP or attention in a window of layers (section 4.4).

    Args:
        updates: What is analysed.
        judge: Scores.
        radius: A window around layer l has layers l - radius to l + radius, as far as there are
            such; 8 in the paper.
    """
    layers = sorted({updates.places[name].layer or 0 for name in updates.matrices})
    for run in updates.runs.values():
        for group in MATRICES:
            for centre in layers:
                inside = range(centre - radius, centre + radius + 1)
                names = {
                    name
                    for name in updates.matrices
                    if updates.places[name].group == group and updates.places[name].layer in inside
                }
                scores = judge(functools.partial(_only, updates, run[-1], names))
                where = {"run": run[-1].label, "step": run[-1].step, "group": group}
                yield {**where, "centre": centre, "matrices": len(names), **scores}


def subspaces(updates: Updates, judge: Judge, norms: Norms) -> Iterator[Row]:
    """Keep the top or the bottom k% of the singular components of every matrix (section 4.6).

    What is kept at the top is rescaled, tensor by tensor, to the norm of the first run's whole dW,
    so that runs are compared at the same norm, but for tensors that the first run has not moved;
    what is kept at the bottom is not.
    """
    runs = list(updates.runs.values())
    wanted = norms[runs[0][-1].label, runs[0][-1].step]
    for run in runs:
        last = run[-1]
        who = {"run": last.label, "step": last.step}
        scores = judge(functools.partial(_only, updates, last, set(updates.matrices)))
        whole = _norm_of(norms, last, updates.matrices)
        yield {**who, "part": "all", "percent": 100, "norm": whole, **scores}
        for percent in KEPT:
            for part in ("top", "bottom"):
                change = _Subspace(updates, last, part, percent, wanted if part == "top" else None)
                scores = judge(change)
                yield {**who, "part": part, "percent": percent, "norm": change.norm, **scores}


def norm_matching(updates: Updates, judge: Judge, norms: Norms) -> Iterator[Row]:
    """Give the dW of early checkpoints, tensor by tensor, the norm that it has in the end (4.8)."""
    for run in updates.runs.values():
        final = norms[run[-1].label, run[-1].step]
        for checkpoint in run[:-1]:
            for strength in STRENGTHS:
                scores = judge(functools.partial(_matched, updates, checkpoint, final, strength))
                where = {"run": checkpoint.label, "step": checkpoint.step, "b": strength}
                yield {**where, **scores}


# --- changes --------------------------------------------------------------------------------------


def _nothing(name: str) -> None:
    return None


def _only(updates: Updates, checkpoint: Checkpoint, names: set[str], name: str) -> Tensor | None:
    return updates.delta(checkpoint, name) if name in names else None


def _without(
    updates: Updates, checkpoint: Checkpoint, groups: tuple[str, ...], name: str
) -> Tensor | None:
    return None if updates.places[name].group in groups else updates.delta(checkpoint, name)


def _matched(
    updates: Updates, checkpoint: Checkpoint, final: Mapping[str, float], b: float, name: str
) -> Tensor:
    return geometry.norm_matched(updates.delta(checkpoint, name), final[name], b)


class _Subspace:
    """Keeps a part of the singular components of every matrix; ``norm`` is what it amounts to."""

    def __init__(
        self,
        updates: Updates,
        checkpoint: Checkpoint,
        part: str,
        percent: int,
        norms: Mapping[str, float] | None,
    ) -> None:
        self._updates, self._checkpoint = updates, checkpoint
        self._part, self._percent, self._norms = part, percent, norms
        self._matrices = set(updates.matrices)
        self._squares = 0.0

    @property
    def norm(self) -> float:
        return math.sqrt(self._squares)

    def __call__(self, name: str) -> Tensor | None:
        if name not in self._matrices:
            return None
        delta = self._updates.delta(self._checkpoint, name)
        parts = [self._kept(matrix) for _, matrix in geometry.matrices_of(name, delta)]
        found = torch.stack(parts).view_as(delta)
        if self._norms is not None and self._norms[name]:
            found = geometry.rescaled(found, self._norms[name])
        self._squares += float(found.square().sum())
        return found

    def _kept(self, delta: Tensor) -> Tensor:
        r = min(delta.shape)
        kept = geometry.share(r, self._percent)
        if self._part == "top":
            return geometry.decompose(delta, kept).part(0)
        return delta.double() - geometry.decompose(delta, r - kept).part(0)


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(one.float(), other.float(), dim=-1)


def _total(norms: Norms, checkpoint: Checkpoint) -> float:
    return _norm_of(norms, checkpoint, norms[checkpoint.label, checkpoint.step])


def _norm_of(norms: Norms, checkpoint: Checkpoint, names: Any) -> float:
    of = norms[checkpoint.label, checkpoint.step]
    return math.hypot(*(of[name] for name in names))
