"""Figures of runs, as PNG."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.runs import Point, Run

DPI = 110
# Told apart by all (Okabe and Ito 2008, "Color universal design"), and by shape in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osDvPX*d"


def png(figure: Figure) -> bytes:
    """Render a figure and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def curves(runs: Sequence[Run]) -> Figure:
    """Accuracy against steps, seconds and generated tokens; KL and entropy against steps.

    The last row shows a collapse: an entropy near zero while tokens far from the teacher remain. A
    triangle marks a search that accepted a candidate, a cross one that refused all.
    """
    figure, axes = plt.subplots(3, 2, figsize=(11, 10))
    labels = {
        "accuracy": "held-out accuracy",
        "reverse_kl": "reverse KL, nats per token",
        "student_entropy": "student's entropy, nats per token",
        "kl_above_5": "share of tokens with KL above 5 nats",
    }
    panels = [
        (axes[0, 0], "step", "accuracy", "optimizer steps"),
        (axes[0, 1], "step", "reverse_kl", "optimizer steps"),
        (axes[1, 0], "seconds", "accuracy", "seconds (validation left out)"),
        (axes[1, 1], "tokens", "accuracy", "generated tokens (searches included)"),
        (axes[2, 0], "step", "student_entropy", "optimizer steps"),
        (axes[2, 1], "step", "kl_above_5", "optimizer steps"),
    ]
    for axis, x, y, label in panels:
        for i, run in enumerate(runs):
            _curve(axis, run, x, y, f"C{i % 10}")
        axis.set_xlabel(label)
        axis.set_ylabel(labels[y])
        axis.grid(alpha=0.3)
        if y == "reverse_kl":
            axis.set_yscale("log")
    handles, names = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="upper center", ncols=min(len(names), 4), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    return figure


def panels(
    count: int, *, height: float, above: float = 0.0, shared: bool = False
) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels, three side by side.

    Args:
        count: Panels.
        height: Of each, in inches.
        above: Further inches, for a legend.
        shared: Whether they have the same axes.
    """
    columns = min(count, 3)
    rows = -(-count // columns)
    size = (4 * columns, height * rows + above)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, sharex=shared, sharey=shared
    )
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def bench_curves(runs: Sequence[Run]) -> Figure:
    """Scores of callbacks.Benchmarks against steps: a panel for each task's score.

    Of the metrics of our tasks that is avg@n; lengths and shares are in metrics.csv.
    """
    found = {name for run in runs for name in run.benches}
    ours = {name.partition("/")[0] for name in found if "/avg@" in name}
    names = sorted(n for n in found if n.partition("/")[0] not in ours or "/avg@" in n)
    figure, axes = panels(len(names), height=3.2)
    for axis, name in zip(axes, names, strict=True):
        for i, run in enumerate(runs):
            if points := run.benches.get(name):
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, color=f"C{i % 10}", label=run.name, marker=".")
        axis.set_title(name, size=10)
        axis.set_xlabel("optimizer steps")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def _curve(axis: Axes, run: Run, x: str, y: str, color: str) -> None:
    points = [p for p in run.points if None not in (getattr(p, x), getattr(p, y))]
    axis.plot(
        [getattr(p, x) for p in points],
        [getattr(p, y) for p in points],
        color=color,
        label=run.name,
        linewidth=1.6,
    )
    for search in run.searches if x == "step" else []:
        if search.get("coefficient") is None:  # an accelerator has only looked
            continue
        accepted = bool(search["coefficient"])
        axis.plot(
            search["step"],
            _interpolate(points, search["step"], y),
            marker="^" if accepted else "x",
            color=color,
            markersize=6 if accepted else 4,
            linestyle="none",
        )


def _interpolate(points: Sequence[Point], step: int, y: str) -> float:
    """Read a curve between two validations."""
    for left, right in itertools.pairwise(points):
        if left.step <= step <= right.step and right.step > left.step:
            share = (step - left.step) / (right.step - left.step)
            return float(getattr(left, y) + share * (getattr(right, y) - getattr(left, y)))
    return float("nan")


def bench_bars(compared: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Speed and memory beside a peer's, one pair of bars per workload, with all runs as points.

    Args:
        compared: By workload: ``speed``, ours over theirs; ``memory``, likewise.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.2 + 0.7 * len(compared)))
    titles = {"speed": "steps per second, ours / TRL", "memory": "memory over models, ours / TRL"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for i, ratios in enumerate(compared.values()):
            values = sorted(ratios[kind])
            axis.barh(i, values[len(values) // 2], color="C0" if kind == "speed" else "C2")
            axis.plot(values, [i] * len(values), "k|", markersize=8)
        axis.axvline(1, color="gray", linewidth=0.8)
        axis.set_yticks(range(len(compared)), list(compared))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    return figure
