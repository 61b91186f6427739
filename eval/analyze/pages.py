"""What ``opd analyze`` leaves: tables, figures, and one page with all of them."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from eval.analyze import figures, spectra
from eval.analyze.updates import Row
from eval.figures import png
from eval.report import STYLE, html_table, image, text_table

Files = dict[str, str | bytes]
RESULTS = ("analysis.html", "analysis.md")
WIDE = "body { max-width: 84rem } td, th { white-space: nowrap; font-size: 85% }"


@dataclass(frozen=True)
class Analysis:
    """One of the paper's analyses.

    Attributes:
        title: What it is called on the page.
        section: Of the paper.
        see: What there is to see.
        scored: Whether it runs the model.
        several: Whether it needs several checkpoints of a run.
    """

    title: str
    section: str
    see: str
    scored: bool = True
    several: bool = False


ANALYSES = {
    "spectra": Analysis(
        "Spectra of updates",
        "4.5",
        "Means over the matrices of MLP and attention. An update of low rank has a large ratio "
        "s_1 / |dW|, a small effective rank (exp of the entropy of s_i / sum s), and nearly all of "
        "its norm in the largest hundredth of its singular values.",
        scored=False,
    ),
    "layers": Analysis(
        "Norms by layer",
        "4.4",
        "How much of the last update each layer has.",
        scored=False,
    ),
    "lock_in": Analysis(
        "Lock-in of directions",
        "4.7",
        "|cos| of the left singular directions u_k of a matrix's update with those at the end, "
        "mean over k and over matrices: near 1 early, where directions are found early. Those that "
        "rounding makes are left out. The map has u_1 of the first checkpoint against the last; "
        "the plane, the way of u_1.",
        scored=False,
        several=True,
    ),
    "scaling": Analysis(
        "A part of the update",
        "4.1",
        "W_0 + a dW for a from 0 to 1, by the norm of what is added: who rises at a smaller norm "
        "learns more per norm.",
    ),
    "dynamics": Analysis(
        "Norm and score over the run",
        "4.2",
        "Each checkpoint by the norm of its update; the numbers are steps.",
        several=True,
    ),
    "embeddings": Analysis(
        "The base's embedding in the trained model",
        "4.3",
        "Little changes if what is learnt is not in the embedding. cosine: of the last hidden "
        "states with the base's, on completions that the base has sampled.",
    ),
    "windows": Analysis(
        "A window of layers",
        "4.4",
        "The base with the update of MLP or attention in some layers alone: which layers hold what "
        "has been learnt.",
    ),
    "subspaces": Analysis(
        "Top and bottom of the spectrum",
        "4.6",
        "The base with a part of the singular components of each matrix: the top ones, rescaled to "
        "the norm of the first run's whole update, and the bottom ones as they are.",
    ),
    "norm_matching": Analysis(
        "Early directions with the final norm",
        "4.8",
        "Each tensor's update at an early step, given a share b of the way to its norm at the end: "
        "where the curve rises to 1, the direction was there and only the length was missing.",
        several=True,
    ),
}


def contents(chosen: Sequence[str], found: Mapping[str, list[Row]], about: str) -> Files:
    """Lay out what has been found.

    Args:
        chosen: Analyses.
        found: Rows by table: norms, and what the analyses need.
        about: What the page begins with.

    Returns:
        Files by name: ``analysis.html``, ``analysis.md``, and for each table a CSV, for each figure
        a PNG and an SVG.
    """
    means = spectra.mean_rows(found["matrices"]) if "matrices" in found else []
    drawn: dict[str, Callable[[], Figure]] = {
        "spectra": lambda: figures.spectra(means),
        "layers": lambda: figures.layers(found["matrices"]),
        "lock_in": lambda: figures.lock_in(tables["lock_in"], found["directions"], found["planes"]),
        "scaling": lambda: figures.scaling(found["scaling"]),
        "dynamics": lambda: figures.dynamics(found["dynamics"]),
        "embeddings": lambda: figures.embeddings(found["embeddings"]),
        "windows": lambda: figures.windows(found["windows"]),
        "subspaces": lambda: figures.subspaces(found["subspaces"]),
        "norm_matching": lambda: figures.norm_matching(found["norm_matching"]),
    }
    tables: dict[str, list[Row]] = {"spectra": means}
    if "lock_in" in chosen:
        tables["lock_in"] = spectra.mean_rows(found["directions"], ["cosine_mean"])
    tables |= {name: found[name] for name in chosen if ANALYSES[name].scored}
    files: Files = {
        f"{name}.csv": as_csv(rows) for name, rows in ({**found, **tables}).items() if rows
    }
    page = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width"><title>Updates</title>'
        f"<style>{STYLE}{WIDE}</style><h1>Updates</h1><p>{html.escape(about)}</p>",
        "<h2>Norms</h2>",
        html_table(*as_table(found["norms"])),
        "<p><small>Frobenius norms of dW = W - W_0, of all tensors and by group. Attention and MLP "
        "are matrices of layers; other: norms, biases, what chooses experts.</small></p>",
    ]
    text = ["# Updates", "", about, "", "## Norms", "", text_table(*as_table(found["norms"])), ""]
    for name in chosen:
        analysis = ANALYSES[name]
        figure = drawn[name]()
        files[f"{name}.svg"] = figures.svg(figure)
        files[f"{name}.png"] = picture = png(figure)
        title = f"{analysis.title} ({analysis.section})"
        page += [
            f"<h2>{html.escape(title)}</h2>",
            image(html.escape(analysis.title), picture),
            f"<p><small>{html.escape(analysis.see)}</small></p>",
        ]
        text += [f"## {title}", "", analysis.see, ""]
        if rows := tables.get(name):
            page.append(
                f"<details><summary>numbers</summary>{html_table(*as_table(rows))}</details>"
            )
            text += [text_table(*as_table(rows)), ""]
    files["analysis.html"] = "\n".join([*page, "</html>"])
    files["analysis.md"] = "\n".join(text)
    return files


def as_csv(rows: Sequence[Row]) -> str:
    """Write rows as CSV, with all columns that any of them has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def as_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Lay rows out for people: the header, and cells with four digits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return columns, [[_cell(row.get(column)) for column in columns] for row in rows]


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
