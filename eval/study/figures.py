"""Figures of a study: cost against the learning rate, and reverse KL on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from eval.figures import COLORS, MARKERS, panels
from eval.runs import Run
from eval.study.grid import Trial
from eval.study.outcomes import Group, Median

MANY = 7  # methods that lines tell apart
UNKNOWN: Any = {"marker": "^", "markersize": 8, "markerfacecolor": "white"}  # it is more


def costs(groups: Sequence[Group], measures: Mapping[str, str]) -> Figure:
    """Cost against the learning rate, a line per method: a row of panels per point of the grid.

    Bands are bootstrap intervals over seeds. What is only known to be more is an open triangle. A
    method with a single learning rate, where another has several, is a line across, dashed if it is
    only known to be more. Many methods have a row each instead, and learning rates a color.

    Args:
        groups: Of a study.
        measures: What is shown, and how it is called.
    """
    points = list(dict.fromkeys(group.settings for group in groups))
    methods = list(dict.fromkeys(group.method for group in groups))
    if len(methods) > MANY:
        return _by_method(groups, measures, points, methods)
    figure, axes = plt.subplots(
        *(len(points), len(measures)),
        figsize=(4 * len(measures), 3.4 * len(points) + 0.6),
        squeeze=False,
    )
    for row, settings in zip(axes, points, strict=True):
        for axis, (measure, name) in zip(row, measures.items(), strict=True):
            lines: dict[str, dict[float, Median]] = {}
            for group in groups:
                value = group.median(measure) if group.settings == settings else None
                if value is not None:
                    lines.setdefault(group.method, {})[group.learning_rate] = value
            _costs(axis, lines, methods)
            title = ", ".join(f"{key} = {value}" for key, value in settings)
            axis.set_title(title, size=9)
            axis.set_ylabel(name)
    return _with_legend(figure, methods)


def _by_method(
    groups: Sequence[Group],
    measures: Mapping[str, str],
    points: Sequence[Any],
    methods: Sequence[str],
) -> Figure:
    rates = sorted({group.learning_rate for group in groups})
    colors = {rate: plt.get_cmap("viridis")(i / len(rates)) for i, rate in enumerate(rates)}
    figure, axes = plt.subplots(
        *(len(points), len(measures)),
        figsize=(4 * len(measures), (0.34 * len(methods) + 0.9) * len(points) + 0.6),
        squeeze=False,
        sharey=True,
    )
    for row, settings in zip(axes, points, strict=True):
        title = ", ".join(f"{key} = {value}" for key, value in settings)
        for axis, (measure, name) in zip(row, measures.items(), strict=True):
            mine = [group for group in groups if group.settings == settings]
            _rows(axis, mine, measure, methods, colors)
            axis.set_title(title, size=9)
            axis.set_xlabel(name)
    handles = [Line2D([], [], color=colors[rate], marker="o", linestyle="") for rate in rates]
    names = [f"learning rate {rate:g}" if rate == rates[0] else f"{rate:g}" for rate in rates]
    figure.legend(handles, names, loc="upper center", ncols=len(rates), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    return figure


def _rows(
    axis: Axes,
    groups: Sequence[Group],
    measure: str,
    methods: Sequence[str],
    colors: Mapping[float, Any],
) -> None:
    """Draw medians and their intervals; what is only known to be more points to the right."""
    found = [(g, value) for g in groups if (value := g.median(measure)) is not None]
    far = _beyond(value for _, value in found)
    for group, value in found:
        own = sorted(g.learning_rate for g in groups if g.method == group.method)
        aside = 0.22 * (own.index(group.learning_rate) - (len(own) - 1) / 2)
        y, color = methods.index(group.method) + aside, colors[group.learning_rate]
        low, high = _interval(value, far)
        axis.plot([low, high], [y, y], color=color, linewidth=1.5, alpha=0.6)
        look = {"marker": "o", "markersize": 5} if _is_known(value) else UNKNOWN | {"marker": ">"}
        axis.plot(value.value.low, y, color=color, **look)
    axis.set_xscale("log")
    axis.set_xlim(right=far)
    _number(axis.xaxis, (1, 2, 3, 5))
    axis.set_yticks(range(len(methods)), methods)
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.3, axis="x", linewidth=0.5)
    for i in range(0, len(methods), 2):
        axis.axhspan(i - 0.5, i + 0.5, color="black", alpha=0.04, linewidth=0)


def _costs(axis: Axes, lines: Mapping[str, Mapping[float, Median]], methods: list[str]) -> None:
    known = [value for line in lines.values() for value in line.values()]
    top = _beyond(known)  # a band that reaches it has no end
    several = any(len(line) > 1 for line in lines.values())
    shown: set[float] = set()
    for method, line in lines.items():
        color, marker = _look(methods.index(method))
        rates = sorted(line)
        values = [line[rate] for rate in rates]
        middles = [value.value.low for value in values]
        lows, highs = zip(*(_interval(value, top) for value in values), strict=True)
        exact = [_is_known(value) for value in values]
        if several and len(rates) == 1:
            axis.axhline(middles[0], color=color, linestyle="-" if exact[0] else "--")
            axis.axhspan(lows[0], highs[0], color=color, alpha=0.12, linewidth=0)
            continue
        shown |= set(rates)
        axis.plot(rates, middles, color=color)
        axis.fill_between(rates, lows, highs, color=color, alpha=0.12, linewidth=0)
        axis.vlines(rates, lows, highs, color=color, alpha=0.4)
        for rate, middle, known_to_be in zip(rates, middles, exact, strict=True):
            look = {"marker": marker, "markersize": 5} if known_to_be else UNKNOWN
            axis.plot(rate, middle, color=color, **look)
    axis.set_xscale("log")
    axis.set_xticks(sorted(shown), [f"{rate:g}" for rate in sorted(shown)], rotation=45, size=8)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("learning rate")
    if any(end for value in known for end in _ends(value)):  # of zeros there is no logarithm
        axis.set_yscale("log")
        axis.set_ylim(top=top)
        _number(axis.yaxis, (1, 2, 3, 5, 7))
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(alpha=0.3, which="both", linewidth=0.5)


def _number(axis: Axis, subs: Sequence[int]) -> None:
    """Write numbers along a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:,.6g}")
    axis.set_minor_formatter(NullFormatter())


def _beyond(values: Iterable[Median]) -> float:
    """Return what is beyond all that is known."""
    return 1.3 * max((end for value in values for end in _ends(value)), default=1.0)


def _interval(value: Median, far: float) -> tuple[float, float]:
    """Return the ends of a median's interval, the upper one at most so far."""
    low = value.value.low if value.low is None else value.low
    high = value.value.high if value.high is None else value.high
    return low, min(far, high)


def _is_known(value: Median) -> bool:
    return value.value.low == value.value.high


def _ends(value: Median) -> Iterator[float]:
    for end in (value.value.low, value.value.high, value.low, value.high):
        if end is not None and math.isfinite(end):
            yield end


def curves(runs: Sequence[tuple[Trial, Run]]) -> Figure:
    """Reverse KL against optimizer steps: a panel per learning rate.

    A method has a thin line per seed, and a thick one for their median as far as all seeds go.

    Args:
        runs: Trials at one point of the grid, and their runs.
    """
    rates = sorted({trial.learning_rate for trial, _ in runs})
    methods = list(dict.fromkeys(trial.method for trial, _ in runs))
    figure, axes = panels(len(rates), height=3, above=0.6, shared=True)
    for axis, rate in zip(axes, rates, strict=True):
        for i, method in enumerate(methods):
            color, _ = _look(i)
            seeds = [
                {p.step: p.reverse_kl for p in run.points if p.reverse_kl is not None}
                for trial, run in runs
                if (trial.method, trial.learning_rate) == (method, rate)
            ]
            for seed in seeds:
                axis.plot(list(seed), list(seed.values()), color=color, alpha=0.35, linewidth=0.7)
            common = sorted(set.intersection(*map(set, seeds))) if seeds else []
            middle = [float(np.median([seed[step] for seed in seeds])) for step in common]
            axis.plot(common, middle, color=color, linewidth=1.8)
        axis.set_yscale("log")
        axis.set_title(f"learning rate {rate:g}", size=9)
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel("reverse KL, nats per token")
        axis.label_outer()
        axis.grid(alpha=0.3, linewidth=0.5)
    return _with_legend(figure, methods)


def _look(i: int) -> tuple[str, str]:
    """Color and marker of the i-th method; of 56 no two are alike."""
    return COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]


def _with_legend(figure: Figure, methods: Sequence[str]) -> Figure:
    looks = [_look(i) for i in range(len(methods))]
    handles = [Line2D([], [], color=color, marker=marker) for color, marker in looks]
    rows = -(-len(methods) // 6)
    figure.legend(handles, methods, loc="upper center", ncols=min(len(methods), 6), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 * rows / figure.get_figheight()))
    return figure
