"""Figures of ``opd analyze``: one run, one colour and one marker, in all of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.figures import COLORS, MARKERS

Row = Mapping[str, Any]
SCORES = {"accuracy": "accuracy", "reverse_kl": "reverse KL, nats per token"}
SPECTRAL = {
    "spectral_norm": "spectral norm $s_1$",
    "spectral_ratio": r"$s_1\,/\,\|dW\|_F$",
    "effective_rank": "effective rank",
    "top_ratio": "norm of the top 1% of $s$, share",
}
SIZE = (4.2, 3.3)  # inches, of a panel


def svg(figure: Figure) -> str:
    """Render a figure as SVG; :func:`eval.figures.png` closes it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def spectra(means: Sequence[Row]) -> Figure:
    """Spectra over the run, means over matrices (section 4.5)."""
    figure, axes = _panels(len(SPECTRAL))
    for axis, (measure, name) in zip(axes, SPECTRAL.items(), strict=True):
        _by_run(axis, means, "step", measure)
        axis.set_xlabel("step")
        axis.set_ylabel(name)
        axis.set_ylim(0, 1.08 * max((row[measure] for row in means if measure in row), default=1))
    return _finished(figure, axes)


def layers(matrices: Sequence[Row]) -> Figure:
    """Layer-wise norms of the last updates: bars, side by side (section 4.4)."""
    last = _last(matrices)
    groups = [g for g in ("attention", "mlp") if any(row["group"] == g for row in last)]
    figure, axes = _panels(len(groups), shared=True)
    runs = _runs(last)
    for axis, group in zip(axes, groups, strict=True):
        for i, run in enumerate(runs):
            of = [row for row in last if row["run"] == run and row["group"] == group]
            numbers = sorted({row["layer"] for row in of})
            norms = [sum(r["norm"] ** 2 for r in of if r["layer"] == n) ** 0.5 for n in numbers]
            width = 0.8 / len(runs)
            places = np.array(numbers) + (i - (len(runs) - 1) / 2) * width
            axis.bar(places, norms, width, color=COLORS[i % len(COLORS)], label=run)
        axis.set_title({"attention": "attention", "mlp": "MLP"}[group], fontsize=10)
        axis.set_xlabel("layer")
        axis.set_ylabel(r"$\|dW\|_F$")
    return _finished(figure, axes)


def lock_in(means: Sequence[Row], directions: Sequence[Row], planes: Sequence[Row]) -> Figure:
    """How early directions are those of the end (section 4.7).

    Left: mean |cos| of the singular directions with the last ones. Then for each run: u_1 of the
    first checkpoint against the last, matrix by matrix; and the way of u_1 in its plane, of the
    matrix whose plane explains least.
    """
    runs = _runs(directions)
    figure, axes = _panels(1 + 2 * len(runs))
    _by_run(axes[0], means, "step", "cosine_mean")
    axes[0].set_ylim(0, 1.02)
    axes[0].set_xlabel("step")
    axes[0].set_ylabel("|cos| of $u_k$ with the last, mean")
    for i, run in enumerate(runs):
        mine = [row for row in directions if row["run"] == run]
        first = min(row["step"] for row in mine)
        _heat_map(axes[1 + 2 * i], [row for row in mine if row["step"] == first])
        axes[1 + 2 * i].set_title(f"{run}: |cos| of $u_1$, step {first} and last", fontsize=9)
        _plane(
            axes[2 + 2 * i], [row for row in planes if row["run"] == run], COLORS[i % len(COLORS)]
        )
    return _finished(figure, axes, legend=axes[0])


def _heat_map(axis: Axes, rows: Sequence[Row]) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    numbers = sorted({row["layer"] for row in rows})
    cells: dict[tuple[int, str], list[float]] = {}  # of several experts in each
    for row in rows:
        cells.setdefault((row["layer"], row["kind"]), []).append(row["cosine_1"])
    values = [[np.mean(cells.get((n, kind), [np.nan])) for kind in kinds] for n in numbers]
    shown = axis.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto", origin="lower")
    axis.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=7)
    every = -(-len(numbers) // 12)
    axis.set_yticks(range(0, len(numbers), every), numbers[::every])
    axis.set_ylabel("layer")
    axis.grid(visible=False)
    axis.figure.colorbar(shown, ax=axis, fraction=0.05)


def _plane(axis: Axes, rows: Sequence[Row], color: str) -> None:
    if not rows:
        axis.axis("off")
        return
    least = min(rows, key=lambda row: (row["explained"], row["matrix"]))
    way = sorted((r for r in rows if r["matrix"] == least["matrix"]), key=lambda row: row["step"])
    axis.plot([r["x"] for r in way], [r["y"] for r in way], color=color, marker="o", markersize=4)
    for row in (way[0], way[-1]):
        _note(axis, f"step {row['step']}", row["x"], row["y"])
    axis.margins(0.15)
    axis.set_title(f"$u_1$ of {least['matrix']}\n{least['explained']:.0%} explained", fontsize=8)
    axis.set_xlabel("first component")
    axis.set_ylabel("second component")


def scaling(rows: Sequence[Row]) -> Figure:
    """Scores of W_0 + a dW against |a dW| (section 4.1)."""
    return _scored(rows, "norm", r"$\|a\,dW\|_F$")


def dynamics(rows: Sequence[Row]) -> Figure:
    """Scores of checkpoints against |dW_t| (section 4.2), each with its step."""
    figure = _scored(rows, "norm", r"$\|dW_t\|_F$")
    for axis, name in zip(figure.axes, _scores(rows), strict=False):
        for row in rows:
            _note(axis, str(row["step"]), row["norm"], row[name])
    return figure


def embeddings(rows: Sequence[Row]) -> Figure:
    """Scores with parts of the base put back (section 4.3)."""
    names = _scores(rows)
    figure, axes = _panels(len(names))
    runs, kinds = _runs(rows), list(dict.fromkeys(row["weights"] for row in rows))
    for axis, name in zip(axes, names, strict=True):
        for i, run in enumerate(runs):
            width = 0.8 / len(runs)
            of = {row["weights"]: row[name] for row in rows if row["run"] == run}
            places = np.arange(len(kinds)) + (i - (len(runs) - 1) / 2) * width
            values = [of.get(kind, np.nan) for kind in kinds]
            axis.barh(places, values, width, color=COLORS[i % len(COLORS)], label=run)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel(SCORES[name])
    return _finished(figure, axes)


def windows(rows: Sequence[Row]) -> Figure:
    """Scores with the dW of a window of layers (section 4.4): MLP solid, attention dashed."""
    names = _scores(rows)
    figure, axes = _panels(len(names))
    for axis, name in zip(axes, names, strict=True):
        for group, style in (("mlp", "-"), ("attention", "--")):
            of = [row for row in rows if row["group"] == group]
            called = "MLP" if group == "mlp" else group
            _by_run(axis, of, "centre", name, style=style, suffix=f", {called}")
        axis.set_xlabel("layer in the middle of the window")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _score_axis(axis, name)
    return _finished(figure, axes)


def subspaces(rows: Sequence[Row]) -> Figure:
    """Scores with a part of the singular components: top solid, bottom dashed (section 4.6)."""
    names = _scores(rows)
    figure, axes = _panels(len(names))
    for axis, name in zip(axes, names, strict=True):
        for part, style in (("top", "-"), ("bottom", "--")):
            of = [row for row in rows if row["part"] == part]
            _by_run(axis, of, "percent", name, style=style, suffix=f", {part}")
        for i, run in enumerate(_runs(rows)):
            whole = next(r for r in rows if r["run"] == run and r["part"] == "all")
            axis.axhline(whole[name], color=COLORS[i % len(COLORS)], linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        ticks = sorted({row["percent"] for row in rows if row["part"] != "all"})
        axis.set_xticks(ticks, [f"{tick}%" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("singular components kept (dotted: all)")
        _score_axis(axis, name)
    return _finished(figure, axes)


def norm_matching(rows: Sequence[Row]) -> Figure:
    """Scores of early updates with another norm (section 4.8): a panel per run and score."""
    names, runs = _scores(rows), _runs(rows)
    figure, axes = _panels(len(names) * len(runs))
    pairs = [(run, name) for run in runs for name in names]
    for axis, (run, name) in zip(axes, pairs, strict=True):
        mine = [row for row in rows if row["run"] == run]
        steps = sorted({row["step"] for row in mine})
        shades = plt.get_cmap("cividis")(np.linspace(0, 0.9, len(steps)))
        for i, step in enumerate(steps):
            of = [row for row in mine if row["step"] == step]
            axis.plot(
                [row["b"] for row in of],
                [row[name] for row in of],
                color=shades[i],
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                label=f"step {step}",
            )
        axis.axvline(1, color="gray", linewidth=0.8, linestyle=":")
        axis.set_title(run, fontsize=10)
        axis.set_xlabel("b (0: as it is, 1: norm of the end)")
        _score_axis(axis, name)
        axis.grid(alpha=0.3)
        if name == names[0]:
            axis.legend(frameon=False, fontsize=7)
    for i in range(len(names)):  # runs are compared at the same scale
        ends = [axis.get_ylim() for axis in axes[i :: len(names)]]
        for axis in axes[i :: len(names)]:
            axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    figure.tight_layout()
    return figure


# --- what they share ------------------------------------------------------------------------------


def _note(axis: Axes, text: str, x: float, y: float) -> None:
    """Write beside a point."""
    axis.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=7, alpha=0.8)


def _score_axis(axis: Axes, name: str) -> None:
    axis.set_ylabel(SCORES[name])
    if name == "reverse_kl":
        axis.set_yscale("log")


def _scored(rows: Sequence[Row], x: str, label: str) -> Figure:
    names = _scores(rows)
    figure, axes = _panels(len(names))
    for axis, name in zip(axes, names, strict=True):
        _by_run(axis, rows, x, name)
        axis.set_xlabel(label)
        _score_axis(axis, name)
    return _finished(figure, axes)


def _scores(rows: Sequence[Row]) -> list[str]:
    return [name for name in SCORES if all(name in row for row in rows)]


def _runs(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["run"] for row in rows))


def _last(rows: Sequence[Row]) -> list[Row]:
    """Keep the rows of each run's last checkpoint."""
    last = {run: max(r["step"] for r in rows if r["run"] == run) for run in _runs(rows)}
    return [row for row in rows if row["step"] == last[row["run"]]]


def _by_run(
    axis: Axes, rows: Sequence[Row], x: str, y: str, *, style: str = "-", suffix: str = ""
) -> None:
    for i, run in enumerate(_runs(rows)):
        of = [row for row in rows if row["run"] == run]
        axis.plot(
            [row[x] for row in of],
            [row[y] for row in of],
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            linestyle=style,
            label=f"{run}{suffix}",
        )


def _panels(count: int, *, shared: bool = False) -> tuple[Figure, list[Axes]]:
    columns = min(count, 4 if count == 4 else 3)
    rows = -(-count // columns)
    size = (SIZE[0] * columns, SIZE[1] * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=shared)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def _finished(figure: Figure, axes: Sequence[Axes], legend: Axes | None = None) -> Figure:
    for axis in axes:
        if not axis.images:
            axis.grid(alpha=0.3)
            axis.set_axisbelow(True)
    handles, names = (legend or axes[0]).get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    figure.legend(handles, names, loc="upper center", ncols=min(len(names), 6), frameon=False)
    return figure
