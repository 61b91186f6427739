"""``opd report``: one self-contained HTML page with curves, tables and rollouts of runs."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from eval import rollouts_page
from eval.figures import bench_curves, curves, png
from eval.files import write_files
from eval.geometry import geometry_curves, heat_maps
from eval.runs import Point, Run, check_target, read_runs
from opd.errors import UserError

TITLE = "<title>On-policy distillation</title>"  # by which a page is known as ours
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0;
        font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } details { margin: .5rem 0 } small { color: #666 }
"""


def report(runs: list[str], output: str, target: float = 0.95) -> None:
    """Write a page about runs.

    Args:
        runs: Run folders; a folder with only an lm-eval results.json adds a row of scores.
        output: HTML file to write; the curves are also written beside it as PNG.
        target: Accuracy for the columns "to target".

    Raises:
        UserError: A run cannot be read, or the page would replace something else.
    """
    check_target(target)
    path = _page(output)
    records = read_runs([Path(run).expanduser() for run in runs])
    picture = png(curves([run for run in records if run.points]))
    page = "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8>"
            '<meta name=viewport content="width=device-width">',
            TITLE,
            f"<style>{STYLE}{rollouts_page.STYLE}</style><h1>On-policy distillation</h1>",
            _runs_section(records, picture, target),
            _benchmarks_section(records),
            _searches_section(records),
            _geometry_section(records),
            rollouts_page.rollouts_section(records),
            _versions_section(records),
            "</html>",
        ]
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    write_files({path.with_suffix(".png"): picture, path: page})
    print(f"wrote {output}")


def _page(output: str) -> Path:
    """Return where the page goes; only an earlier page, and its picture, may be there."""
    path = Path(output).expanduser()
    if path.suffix not in (".html", ".htm"):
        raise UserError(f"--output {output}: name a file that ends in .html")
    ours = path.is_file() and TITLE in path.read_text(encoding="utf-8", errors="replace")
    for taken in (path, path.with_suffix(".png")):
        if taken.exists() and not ours:
            raise UserError(f"--output {output}: would replace {taken}, which is of no report")
    return path


def run_table(runs: Sequence[Run], target: float) -> tuple[list[str], list[list[str]]]:
    """Lay out what runs cost and reached: the header and one row per run."""
    header = [
        *("run", "steps", "generated tokens", "seconds", "of which search"),
        *("accuracy", "reverse KL", f"steps to {target:g}", f"seconds to {target:g}"),
    ]
    rows = []
    for run in runs:
        if not run.summary:
            continue
        cost, share = run.summary["cost"], run.search_share
        reached = run.reached(target)
        rows.append(
            [
                run.name,
                str(run.summary["steps"]),
                f"{cost['rollout_tokens'] + cost['search_generated_tokens']:,.0f}",
                f"{run.seconds:.1f}",
                "-" if share is None else f"{share:.0%}",
                _change(run.summary["accuracy"]),
                _change(run.summary["reverse_kl"]),
                str(reached.step) if reached else "not reached",
                _seconds(reached) if reached else "not reached",
            ]
        )
    return header, rows


def benchmark_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Lay out lm-eval scores: the header and one row per model that has any."""
    names = sorted({name for run in runs for name in run.benchmarks})
    rows = [
        [run.name, *(f"{run.benchmarks[n]:.3f}" if n in run.benchmarks else "-" for n in names)]
        for run in runs
        if run.benchmarks
    ]
    return ["model", *names], rows


def _seconds(point: Point) -> str:
    return "-" if point.seconds is None else f"{point.seconds:.1f}"


def _change(pair: dict[str, float | None]) -> str:
    values = ["-" if v is None else f"{v:.3f}" for v in (pair["initial"], pair["final"])]
    return " → ".join(values)


def _runs_section(runs: Sequence[Run], picture: bytes, target: float) -> str:
    header, rows = run_table(runs, target)
    if not rows:
        return ""
    return (
        f"<h2>Runs</h2>{html_table(header, rows)}"
        "<p><small>Accuracy and reverse KL are those of held-out prompts, before and after. "
        "Seconds are wall-clock for rollouts, teacher, training and searches, without "
        "validation and start-up.</small></p>"
        f"{image('accuracy and teacher KL of the runs', picture)}"
        "<p><small>▲ a search that accepted a candidate, ✕ one that refused all.</small></p>"
    )


def _benchmarks_section(runs: Sequence[Run]) -> str:
    header, rows = benchmark_table(runs)
    parts = [html_table(header, rows)] if rows else []
    if any(run.benches for run in runs):
        parts.append(
            f"{image('benchmarks of the runs', png(bench_curves(runs)))}"
            "<p><small>Scores of the student while it was trained, by optimizer steps.</small></p>"
        )
    return f"<h2>Benchmarks (lm-eval)</h2>{''.join(parts)}" if parts else ""


def _searches_section(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if not run.searches:
            continue
        rows = [
            [
                str(search["step"]),
                _coefficient(search.get("coefficient")),
                ", ".join(
                    f"{c['coefficient']:g}: {c['score']:.3f}" for c in search.get("candidates", [])
                ),
                f"{search['seconds']:.2f}",
                f"{search['tokens']:,}",
            ]
            for search in run.searches
        ]
        table = html_table(["step", "coefficient", "candidates: score", "seconds", "tokens"], rows)
        decided = [
            kept for search in run.searches if (kept := search.get("coefficient")) is not None
        ]
        accepted = sum(map(bool, decided))
        summary = f"{html.escape(run.name)}: {len(decided)} searches, {accepted} accepted"
        parts.append(f"<details><summary>{summary}</summary>{table}</details>")
    return "<h2>Extrapolations</h2>" + "".join(parts) if parts else ""


def geometry_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Lay out the last measurements of updates: the header and one row per run that has any."""
    columns = {
        "norm": "update_norm",
        "spectral norm": "spectral_norm",
        "of the matrix's norm": "spectral_ratio",
        "effective rank": "effective_rank",
        "top 1%": "top_ratio",
    }
    rows = []
    for run in runs:
        if run.geometry:
            last = {name: points[-1] for name, points in run.geometry.items()}
            values = [f"{last[name][1]:.3g}" if name in last else "-" for name in columns.values()]
            rows.append([run.name, str(max(step for step, _ in last.values())), *values])
    return ["run", "step", *columns], rows


def _geometry_section(runs: Sequence[Run]) -> str:
    header, rows = geometry_table(runs)
    if not rows:
        return ""
    parts = [
        f"<h2>Geometry of the update</h2>{html_table(header, rows)}",
        "<p><small>W_t - W_0: the norm is that of all trained weights, the others are means over "
        "matrices: the largest singular value, what part of the matrix's norm it is, the effective "
        "rank, and what part of the norm the largest hundredth of the singular values has. "
        "(arXiv 2605.11739, section 4.)</small></p>",
    ]
    curved = geometry_curves({run.name: run.geometry for run in runs if run.geometry})
    parts.append(image("geometry of the updates by optimizer steps", png(curved)))
    if mapped := {run.name: run.matrices for run in runs if run.matrices}:
        parts.append(image("norms of the updates by layer and matrix", png(heat_maps(mapped))))
        parts.append("<p><small>Each run has its own scale of colours.</small></p>")
    return "".join(parts)


def _coefficient(kept: float | None) -> str:
    """Say what an accelerator has done; it may only have looked."""
    return "-" if kept is None else f"{kept:g}" if kept else "refused"


def _versions_section(runs: Sequence[Run]) -> str:
    versions: dict[str, str]
    versions = next((run.summary["versions"] for run in runs if run.summary), {})
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"<p><small>{html.escape(text)}</small></p>"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out as HTML."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def image(text: str, picture: bytes) -> str:
    """Write a PNG into HTML.

    Args:
        text: What it shows, for those who do not see it; plain words.
        picture: The PNG.
    """
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out for a terminal or as Markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
