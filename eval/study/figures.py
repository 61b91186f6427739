"""Figures of a study: cost against the learning rate, and reverse KL on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from eval.figures import COLORS, MARKERS, panels
from eval.runs import Run
from eval.study.grid import Trial
from eval.study.outcomes import Group, Median

UNKNOWN: Any = {"marker": "^", "markersize": 8, "markerfacecolor": "white"}  # it is more


def costs(groups: Sequence[Group], measures: Mapping[str, str]) -> Figure:
    """Cost against the learning rate, a line per method: a row of panels per point of the grid.

    Bands are bootstrap intervals over seeds. What is only known to be more is an open triangle. A
    method with a single learning rate, where another has several, is a line across, dashed if it is
    only known to be more.

    Args:
        groups: Of a study.
        measures: What is shown, and how it is called.
    """
    points = list(dict.fromkeys(group.settings for group in groups))
    methods = list(dict.fromkeys(group.method for group in groups))
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


def _costs(axis: Axes, lines: Mapping[str, Mapping[float, Median]], methods: list[str]) -> None:
    known = [end for line in lines.values() for value in line.values() for end in _ends(value)]
    top = 1.3 * max(known, default=1.0)  # a band that reaches it has no end
    several = any(len(line) > 1 for line in lines.values())
    shown: set[float] = set()
    for method, line in lines.items():
        color, marker = _look(methods.index(method))
        rates = sorted(line)
        values = [line[rate] for rate in rates]
        middles = [value.value.low for value in values]
        lows = [value.value.low if value.low is None else value.low for value in values]
        highs = [
            min(top, value.value.high if value.high is None else value.high) for value in values
        ]
        exact = [value.value.low == value.value.high for value in values]
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
    if any(known):  # of zeros alone there is no logarithm
        axis.set_yscale("log")
        axis.set_ylim(top=top)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:,.6g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(alpha=0.3, which="both", linewidth=0.5)


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
