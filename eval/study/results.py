"""What a study leaves: results.json, results.md, results.png and results.html."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eval.figures import png
from eval.report import STYLE, html_table, image, text_table
from eval.runs import Run
from eval.study import figures
from eval.study.grid import Settings, Trial
from eval.study.outcomes import (
    COSTS,
    Bounds,
    Comparison,
    Group,
    Median,
    Outcome,
    best,
    comparisons,
    grouped,
    outcome_of,
)

RESULTS = ("results.json", "results.md", "results.png", "results.html")
FORMS = {"steps": ",.4g", "tokens": ",.0f", "seconds": ",.1f", "mean_reverse_kl": ".4f"}
READ = (
    "Medians over seeds, with 95% bootstrap intervals over seeds in brackets. Tokens and seconds "
    "include searches; seconds are without validation and start-up. A run that did not reach the "
    "target within {max_steps} steps counts as one that needs more than it had spent by then: >N "
    "says that a median is more than N. Means of accuracy and reverse KL (nats per token, held-out "
    "prompts) are over optimizer steps 0 to {max_steps}, of runs that did not stop before. * marks "
    "a method's best learning rate, where it needs fewest steps."
)
WIDE = "body { max-width: none } td { white-space: nowrap } table { font-size: 85% }"
PAIRED = (
    "What a method needed over what {baseline} needed with the same seed, median over seeds: below "
    "1 the method is better. {baseline} is taken at the same learning rate, and at its best one, "
    "which is chosen on these seeds, to its advantage."
)


@dataclass(frozen=True)
class Study:
    """All that was found.

    Attributes:
        runs: Run folder by trial.
        outcomes: In the order of the trials.
        groups: The same, seeds together.
        compared: Methods beside the baseline.
        baseline: Name of a method.
        target: Accuracy to reach.
        max_steps: Optimizer steps at which runs ended at the latest.
    """

    runs: Mapping[Trial, Run]
    outcomes: Sequence[Outcome]
    groups: Sequence[Group]
    compared: Sequence[Comparison]
    baseline: str
    target: float
    max_steps: int

    @classmethod
    def of(
        cls, runs: Mapping[Trial, Run], *, baseline: str, target: float, max_steps: int
    ) -> Study:
        """Compare runs.

        Raises:
            UserError: One has measured no accuracy.
        """
        outcomes = [outcome_of(trial, run, target, max_steps) for trial, run in runs.items()]
        groups = grouped(outcomes)
        compared = comparisons(groups, baseline)
        return cls(runs, outcomes, groups, compared, baseline, target, max_steps)

    @property
    def points(self) -> list[Settings]:
        """The points of the grid, in order."""
        return list(dict.fromkeys(group.settings for group in self.groups))

    @property
    def measures(self) -> dict[str, str]:
        """What is compared, and how it is called."""
        names = {
            "steps": f"steps to {self.target:g}",
            "tokens": "generated tokens",
            "seconds": "seconds",
        }
        # Of runs that were stopped at the target none is known; the others' would be the slow ones'
        whole = all(o.mean_accuracy is not None for o in self.outcomes if o.steps is not None)
        if whole and any(group.measured("mean_reverse_kl") for group in self.groups):
            names["mean_reverse_kl"] = "mean reverse KL"
        return names


def contents(study: Study) -> dict[str, str | bytes]:
    """Return what goes into each of RESULTS."""
    picture = png(figures.costs(study.groups, study.measures))
    files = (as_json(study), tables(study) + "\n", picture, page(study, picture))
    return dict(zip(RESULTS, files, strict=True))


# --- results.json ---------------------------------------------------------------------------------


def as_json(study: Study) -> str:
    """Write out trials, medians and comparisons; what is infinite, or not known, is null."""
    value = {
        "target": study.target,
        "max_steps": study.max_steps,
        "baseline": study.baseline,
        "trials": [{**asdict(o), "trial": _named(o.trial), "rise": o.rise} for o in study.outcomes],
        "medians": [
            {**_named(group), **{m: _written(group.median(m)) for m in study.measures}}
            for group in study.groups
        ],
        "comparisons": [
            {
                **_named(one.group),
                "baseline_learning_rate": one.baseline.learning_rate,
                "ratios": {m: _written(value) for m, value in one.ratios.items()},
            }
            for one in study.compared
        ],
    }
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _named(one: Trial | Group) -> dict[str, Any]:
    names: dict[str, Any] = {"method": one.method, "learning_rate": one.learning_rate}
    names["settings"] = dict(one.settings)
    return {**names, "seed": one.seed} if isinstance(one, Trial) else names


def _written(value: Median | None) -> dict[str, list[float | None]] | None:
    if value is None:
        return None

    def written(*ends: float | None) -> list[float | None]:
        return [None if end is None or math.isinf(end) else end for end in ends]

    return {
        "median": written(value.value.low, value.value.high),
        "interval": written(value.low, value.high),
    }


# --- results.md -----------------------------------------------------------------------------------


def tables(study: Study) -> str:
    """Lay out what each method cost at each learning rate, and the comparisons, as Markdown."""
    parts = [text_table(*cost_table(study)), READ.format(max_steps=study.max_steps)]
    if study.compared:
        parts += [text_table(*comparison_table(study)), PAIRED.format(baseline=study.baseline)]
    return "\n\n".join(parts)


def cost_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Lay out a row per method, point of the grid and learning rate: the header, and the rows."""
    measures = study.measures
    header = [
        *("method", *_keys(study), "learning rate", "reached"),
        *(*measures.values(), "mean accuracy", "final accuracy"),
        *("final reverse KL", "lowest", "worst final/lowest", "search share"),
    ]
    rows = []
    for group in study.groups:
        outcomes = group.outcomes
        rises = [o.rise for o in outcomes if o.rise is not None]
        rows.append(
            [
                *_name_cells(study, group),
                f"{sum(o.steps is not None for o in outcomes)}/{len(outcomes)}",
                *(cell(group.median(measure), FORMS[measure]) for measure in measures),
                _over_seeds([o.mean_accuracy for o in outcomes], ".3f"),
                _over_seeds([o.final_accuracy for o in outcomes], ".3f"),
                _over_seeds([o.final_reverse_kl for o in outcomes], ".4f"),
                _over_seeds([o.lowest_reverse_kl for o in outcomes], ".4f"),
                f"{max(rises):.2f}" if len(rises) == len(outcomes) else "-",
                _over_seeds([o.search_share for o in outcomes], ".0%"),
            ]
        )
    return header, rows


def comparison_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Lay out a row per comparison: the header, and the rows."""
    measures = study.measures
    header = ["method", *_keys(study), "learning rate", f"{study.baseline}'s", *measures.values()]
    rows = []
    for one in study.compared:
        ratios = [cell(one.ratios.get(measure), ".2f") for measure in measures]
        rows.append([*_name_cells(study, one.group), _rate(study, one.baseline), *ratios])
    return header, rows


def cell(value: Median | None, form: str) -> str:
    """Write ``median [low, high]``; ``>N`` and ``<N`` of what is only known to be such."""
    if value is None:
        return "-"
    middle = _bounds(value.value, form)
    if value.low is None or value.high is None:
        return middle
    return f"{middle} [{_number(value.low, form)}, {_number(value.high, form)}]"


def _bounds(value: Bounds, form: str) -> str:
    low, high = _number(value.low, form), _number(value.high, form)
    if value.low == value.high:
        return low
    if math.isinf(value.high):
        return f">{low}" if value.low else "?"
    return f"{low} to {high}" if value.low else f"<{high}"


def _number(value: float, form: str) -> str:
    return "∞" if math.isinf(value) else format(value, form)


def _over_seeds(values: Sequence[float | None], form: str) -> str:
    """Write the median of numbers that are known of all seeds."""
    known = [value for value in values if value is not None]
    return format(statistics.median(known), form) if len(known) == len(values) else "-"


def _keys(study: Study) -> list[str]:
    return [key for key, _ in study.points[0]]


def _name_cells(study: Study, group: Group) -> list[str]:
    return [group.method, *(value for _, value in group.settings), _rate(study, group)]


def _rate(study: Study, group: Group) -> str:
    at_best = group == best(study.groups, group.method, group.settings)
    return f"{group.learning_rate:g}{' *' if at_best else ''}"


# --- results.html ---------------------------------------------------------------------------------


def page(study: Study, picture: bytes) -> str:
    """Lay out one page that needs no other file.

    Args:
        study: What was found.
        picture: The figure of costs, PNG.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width"><title>Study</title>'
        f"<style>{STYLE}{WIDE}</style><h1>Study</h1>",
        f"<p>{_methods(study)}: what each needs to reach {study.target:g} held-out "
        f"accuracy, within {study.max_steps} optimizer steps; {len(study.runs)} runs.</p>",
        "<h2>Cost against the learning rate</h2>",
        image("cost against the learning rate", picture),
        "<p><small>Medians over seeds; bands are 95% bootstrap intervals. An open triangle stands "
        "where the target was not reached by too many seeds: the median is more than that. A "
        "method with a single learning rate is a line across, dashed if it is more.</small></p>",
        html_table(*cost_table(study)),
        f"<p><small>{html.escape(READ.format(max_steps=study.max_steps))}</small></p>",
    ]
    if study.compared:
        parts += [
            f"<h2>Beside {html.escape(study.baseline)}</h2>",
            html_table(*comparison_table(study)),
            f"<p><small>{html.escape(PAIRED.format(baseline=study.baseline))}</small></p>",
        ]
    parts.append("<h2>Reverse KL on the way</h2>")
    for settings in study.points:
        runs = [(t, run) for t, run in study.runs.items() if t.settings == settings]
        title = ", ".join(f"{key} = {value}" for key, value in settings)
        parts += [
            f"<h3>{html.escape(title)}</h3>" if title else "",
            image("reverse KL against steps", png(figures.curves(runs))),
        ]
    parts += [
        "<p><small>Held-out prompts, nats per token; a thin line per seed, a thick one for their "
        "median, as far as all seeds go.</small></p>",
        "<h2>Every run</h2><details><summary>by seed</summary>",
        html_table(*trial_table(study)),
        "</details></html>",
    ]
    return "\n".join(filter(None, parts))


def trial_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Lay out a row per trial: the header, and the rows."""
    header = [
        *("method", *_keys(study), "learning rate", "seed"),
        *(study.measures[measure] for measure in COSTS),
        *("final accuracy", "final reverse KL", "lowest"),
    ]
    rows = []
    for group in study.groups:
        for outcome in group.outcomes:
            costs = [(outcome.measured(measure), FORMS[measure]) for measure in COSTS]
            kls = (outcome.final_reverse_kl, outcome.lowest_reverse_kl)
            rows.append(
                [
                    *(*_name_cells(study, group), str(outcome.trial.seed)),
                    *("-" if value is None else _bounds(value, form) for value, form in costs),
                    f"{outcome.final_accuracy:.3f}",
                    *("-" if kl is None else f"{kl:.4f}" for kl in kls),
                ]
            )
    return header, rows


def _methods(study: Study) -> str:
    return html.escape(", ".join(dict.fromkeys(trial.method for trial in study.runs)))
