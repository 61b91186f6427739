"""Figures of the geometry of updates: what callbacks.UpdateGeometry has measured.

They leave matplotlib's backend as it is, so that the callback can draw in anybody's process.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opd.geometry_rows import MatrixRow, parameter_of

LAYER = re.compile(r"(?P<before>.*?)\.(?P<number>\d+)\.(?P<kind>.+)")
WRITTEN = 12  # kinds of matrix up to which each cell has its number written in it
TITLES = {
    "update_norm": "norm of W_t - W_0, all weights",
    "spectral_norm": "spectral norm, mean over matrices",
    "effective_rank": "effective rank, mean over matrices",
    "top_ratio": "norm of the top 1% singular values, share",
    "cosine_previous": "cosine with the displacement before",
    "cosine_first": "cosine with the first displacement",
}
MARKERS = "os^DvPX*<>"


def layer_norms(rows: Sequence[MatrixRow]) -> tuple[list[int], list[str], list[list[float]]]:
    """Arrange the norms of matrices by layer and kind.

    Args:
        rows: Of one step; those outside of layers, as an embedding, are left out.

    Returns:
        Numbers of layers; kinds of matrix in the order of the model, each as short as tells it from
        the others (q_proj, or attn.c_proj where there is an mlp.c_proj); and norms, [layers,
        kinds], of all experts together, NaN where a layer has no such matrix.
    """
    found: dict[tuple[int, str], float] = {}
    for row in rows:
        if place := LAYER.fullmatch(parameter_of(row.name).removesuffix(".weight")):
            key = int(place["number"]), place["kind"]
            found[key] = math.hypot(found.get(key, 0.0), row.norm)
    layers = sorted({layer for layer, _ in found})
    kinds = list(dict.fromkeys(kind for _, kind in found))
    norms = [[found.get((layer, kind), math.nan) for kind in kinds] for layer in layers]
    return layers, [_shortest(kind, kinds) for kind in kinds], norms


def _shortest(kind: str, kinds: Sequence[str]) -> str:
    """Leave out of a dotted name what is not needed to tell it from others, from the left."""
    parts = kind.split(".")
    ends = (".".join(parts[i:]) for i in reversed(range(len(parts))))
    return next(end for end in ends if sum(f".{k}".endswith(f".{end}") for k in kinds) == 1)


def heat_maps(by_run: Mapping[str, Sequence[MatrixRow]]) -> Figure:
    """Norms of the updates of matrices: a map for each run, rows layers, columns kinds of matrix.

    Args:
        by_run: By the run's name, which becomes the title: rows of one step.
    """
    tables = {name: layer_norms(rows) for name, rows in by_run.items()}
    widths = [1.6 + 0.55 * max(len(kinds), 3) for _, kinds, _ in tables.values()]
    height = max(1.6 + 0.24 * max(len(layers), 4) for layers, _, _ in tables.values())
    figure = Figure(figsize=(min(sum(widths), 30), min(height, 20)), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False, width_ratios=widths)[0]
    for axis, (name, (layers, kinds, norms)) in zip(axes, tables.items(), strict=True):
        title = f"step {by_run[name][0].step}" if by_run[name] else ""
        axis.set_title(f"{name}, {title}" if name else title, size=10)
        if layers:
            _heat_map(figure, axis, layers, kinds, norms)
        else:
            axis.text(0.5, 0.5, "no matrix is of a layer", ha="center", va="center")
            axis.axis("off")
    return figure


def _heat_map(
    figure: Figure,
    axis: Axes,
    layers: Sequence[int],
    kinds: Sequence[str],
    norms: Sequence[Sequence[float]],
) -> None:
    # cividis looks alike to those who tell red from green and to those who do not
    picture = axis.imshow(norms, cmap="cividis", aspect="auto", vmin=0)
    axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", size=8)
    step = -(-len(layers) // 40)
    axis.set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]], size=8)
    axis.set_ylabel("layer")
    figure.colorbar(picture, ax=axis, fraction=0.06, label="Frobenius norm of W_t - W_0")
    middle = sum(picture.get_clim()) / 2
    if len(kinds) > WRITTEN or step > 1:
        return
    for i, j in itertools.product(range(len(layers)), range(len(kinds))):
        if (norm := norms[i][j]) == norm:
            color = "black" if norm > middle else "white"
            axis.text(j, i, f"{norm:.2g}", ha="center", va="center", size=7, color=color)


def geometry_curves(series: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Figure:
    """What was measured on the way, by optimizer steps; runs differ in colour and in marker.

    Args:
        series: By the run's name, by the metric's: (step, value) in order.
    """
    figure = Figure(figsize=(12, 6.8), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (metric, title) in zip(axes.flat, TITLES.items(), strict=True):
        for i, (name, found) in enumerate(series.items()):
            steps, values = zip(*found.get(metric, [(math.nan, math.nan)]), strict=True)
            style = {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            axis.plot(steps, values, label=name, linewidth=1.4, **style)
        axis.set_title(title, size=10)
        axis.grid(alpha=0.3)
        axis.axhline(0, color="gray", linewidth=0.8)
    for axis in axes[1]:
        axis.set_xlabel("optimizer steps")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
    return figure
