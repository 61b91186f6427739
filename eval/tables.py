"""Results of an evaluation for people: one Markdown table, a row per task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from eval.benchmarks import benchmarks
from eval.statistics import Estimate, mean_with_error

SHARES = ("truncated", "no_answer")
COLUMNS = ("avg@", "pass@", "maj@")


def results_table(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Lay results out as Markdown: our tasks with intervals, then lm-eval's own as they are.

    Args:
        results: As lm-eval returns them, with samples.
        config: What was asked: ``model``, ``seconds`` and the settings.
    """
    own = benchmarks()
    ours = [task for task in results["results"] if task in own]
    others = [task for task in results["results"] if task not in own]
    lines = [f"# {config['model']}", ""]
    if ours:
        lines += [
            "| task | problems | n | avg@n | 95% interval | pass@n | maj@n | tokens | truncated "
            "| no answer |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(own[task].label, results["samples"][task]) for task in ours]
        lines.append("")
    if others:
        lines += ["| lm-eval's task | metric | value | standard error |", "|---|---|---|---|"]
        lines += [line for task in others for line in _plain(task, results["results"][task])]
        lines.append("")
    return "\n".join([*lines, _conditions(config), ""])


def per_problem(samples: list[Mapping[str, Any]], prefix: str) -> tuple[str, list[float]] | None:
    """Return a metric of each problem: the one with the most samples of those that begin alike."""
    names = {name for sample in samples for name in sample["metrics"] if name.startswith(prefix)}
    if not names:
        return None
    name = max(names, key=lambda name: int(name.partition("@")[2] or 0))
    return name, [float(sample[name]) for sample in samples]


def _row(label: str, samples: list[Mapping[str, Any]]) -> str:
    found = [per_problem(samples, prefix) for prefix in COLUMNS]
    estimates = [one and mean_with_error(one[1]) for one in found]
    average = estimates[0]
    assert found[0] is not None
    assert average is not None
    cells = [label, str(average.n), found[0][0].removeprefix("avg@"), _mean(average)]
    cells += [_interval(average), *(_mean(one) if one else "" for one in estimates[1:])]
    length = per_problem(samples, "length")
    cells.append(f"{math.fsum(length[1]) / len(length[1]):.0f}" if length else "")
    for name in SHARES:
        share = per_problem(samples, name)
        cells.append(f"{math.fsum(share[1]) / len(share[1]):.1%}" if share else "")
    return "| " + " | ".join(cells) + " |"


def _mean(estimate: Estimate) -> str:
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:.4f}"
    return f"{estimate.mean:.4f}{error}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{estimate.low:.3f} to {estimate.high:.3f}"


def _plain(task: str, values: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in values.items():
        metric, _, which = key.partition(",")
        if isinstance(value, int | float) and not metric.endswith("_stderr") and which:
            error = values.get(f"{metric}_stderr,{which}")
            said = f"{error:.4f}" if isinstance(error, float) else ""
            lines.append(f"| {task} | {metric} ({which}) | {value:.4f} | {said} |")
    return lines


def _conditions(config: Mapping[str, Any]) -> str:
    asked = ["samples", "limit", "temperature", "top_p", "top_k", "max_new_tokens", "system_prompt"]
    said = [f"{name} {config[name]}" for name in asked if config.get(name) is not None]
    if not config.get("chat_template", True):
        said.append("no chat template")
    return (
        f"± is the standard error over problems; seed {config.get('seed', 0)}, "
        f"{config.get('seconds', 0)} s"
        + (f"; asked beyond what tasks say: {', '.join(said)}" if said else "")
        + "."
    )
