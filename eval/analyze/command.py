"""``opd analyze``: where updates point, how large and how low-rank they are, and what parts do.

The analyses of the paper's section 4 (arXiv 2605.11739), of checkpoints of one or several runs from
one base: OPD and RL side by side, for instance.
"""

from __future__ import annotations

import csv
import html
import io
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from eval.analyze import figures, scored, spectra
from eval.analyze.judge import Judge, PromptScore
from eval.analyze.tensors import Tensors
from eval.analyze.updates import Updates, open_updates
from eval.figures import png
from eval.files import output_folder, write_files
from eval.harness import Settings
from eval.report import STYLE, html_table, image, text_table
from opd.errors import UserError
from opd.models import load_model, load_tokenizer
from opd.models.adapters import Dtype

Row = dict[str, Any]
RESULTS = ("analysis.html", "analysis.md")
PROMPTS, NEW_TOKENS = 128, 512  # where nobody says
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
        "mean over k and over matrices: near 1 early, where directions are found early. The map "
        "has u_1 of the first checkpoint against the last; the plane, the way of u_1.",
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


@dataclass(frozen=True)
class Scoring:
    """By what weights are scored; see :func:`analyze`."""

    tasks: str | None
    settings: Settings
    teacher: str | None
    prompts: str | None
    dtype: Dtype
    trust_remote_code: bool

    def __post_init__(self) -> None:
        if (self.teacher is None) != (self.prompts is None):
            raise UserError("--teacher and --prompts: one needs the other")

    @property
    def possible(self) -> bool:
        """Whether there is anything to score by."""
        return self.tasks is not None or self.teacher is not None

    def judge(self, tensors: Tensors, base: str) -> Judge:
        """Load a model and what judges it.

        Raises:
            UserError: A model, a task or the prompts cannot be had.
        """
        score = None
        if self.teacher is not None and self.prompts is not None:
            score = PromptScore(
                base,
                self.teacher,
                self.prompts,
                limit=self.settings.limit or PROMPTS,
                max_new_tokens=self.settings.max_new_tokens or NEW_TOKENS,
                seed=self.settings.seed,
                trust_remote_code=self.trust_remote_code,
            )
            judge = Judge(tensors, score.module.student, score.module.tokenizer)
            judge.by_prompts(score)
        else:
            trust = self.trust_remote_code
            model = load_model(base, dtype=self.dtype, trust_remote_code=trust)
            judge = Judge(tensors, model.eval(), load_tokenizer(base, trust_remote_code=trust))
        if self.tasks is not None:
            judge.by_tasks([n.strip() for n in self.tasks.split(",") if n.strip()], self.settings)
        return judge


def analyze(
    base: str,
    checkpoints: list[str],
    output: str,
    analyses: str | None = None,
    tasks: str | None = None,
    samples: int | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    teacher: str | None = None,
    prompts: str | None = None,
    directions: int = 20,
    window: int | None = None,
    dtype: Dtype = "float32",
    seed: int = 0,
    allow_code_execution: bool = False,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Analyse the updates that lead from a base to checkpoints.

    Args:
        base: The model that training began with: hub id, folder, checkpoint or embedded:NAME.
        checkpoints: What it became, likewise, in order; a run folder stands for all of its
            checkpoints. Those of several runs as LABEL=CHECKPOINT.
        output: Folder for tables (CSV, Markdown), figures (PNG, SVG) and one page, analysis.html.
        analyses: Which, by name, separated by commas: spectra, layers, lock_in, scaling, dynamics,
            embeddings, windows, subspaces, norm_matching. None: all that can be made.
        tasks: lm-eval tasks, separated by commas, by whose avg@n weights are scored.
        samples: Completions per problem. None: as the tasks say.
        limit: Use the first so many problems and prompts only. None: all problems, 128 prompts.
        max_new_tokens: Longest completion in tokens. None: as the tasks say; 512 for prompts.
        teacher: Score by the reverse KL to this model, too, on completions of prompts.
        prompts: Where they come from, as --data.validation.
        directions: Singular directions of each matrix that are followed over a run.
        window: Layers on each side of the middle one. None: 8, as in the paper, or a quarter of the
            layers if that is less.
        dtype: Dtype of the model that is run.
        seed: Seed of the sampling.
        allow_code_execution: Run the programs that a model writes, for tasks that need it.
        trust_remote_code: Let models run their own code.
        overwrite: Replace an earlier analysis there.

    Raises:
        UserError: A model is not there, not of the base's architecture or equal to it, or an option
            is out of range.
    """
    start = time.perf_counter()
    for name, value in [("directions", directions), ("window", 1 if window is None else window)]:
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    settings = Settings(
        samples=samples,
        limit=limit,
        max_new_tokens=max_new_tokens,
        seed=seed,
        allow_code_execution=allow_code_execution,
    )
    scoring = Scoring(tasks, settings, teacher, prompts, dtype, trust_remote_code)
    chosen = _chosen(analyses, scoring)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with ExitStack() as stack:
        folder = stack.enter_context(output_folder(output))
        _check_folder(folder, output, overwrite)
        updates = stack.enter_context(
            open_updates(base, checkpoints, trust_remote_code=trust_remote_code)
        )
        chosen = _possible(chosen, updates, told=analyses is not None)
        norms = spectra.tensor_norms(updates)
        found: dict[str, list[Row]] = {"norms": spectra.norm_rows(updates, norms)}
        if any(not ANALYSES[name].scored for name in chosen):
            found |= _from_weights(updates, chosen, directions)
        if any(ANALYSES[name].scored for name in chosen):
            judge = scoring.judge(updates.base, base)
            radius = window or _radius(updates)
            todo = {
                "scaling": lambda: scored.scaling(updates, judge, norms),
                "dynamics": lambda: scored.dynamics(updates, judge, norms),
                "embeddings": lambda: scored.embeddings(updates, judge),
                "windows": lambda: scored.windows(updates, judge, radius),
                "subspaces": lambda: scored.subspaces(updates, judge, norms),
                "norm_matching": lambda: scored.norm_matching(updates, judge, norms),
            }
            for name in chosen:
                if ANALYSES[name].scored:
                    found[name] = list(_shown(todo[name](), name))
        contents = _contents(updates, chosen, found, time.perf_counter() - start)
        write_files({folder / name: content for name, content in contents.items()})
        print(contents["analysis.md"])
        print(f"wrote analysis.html, tables and figures to {folder}")


# --- what can be done -----------------------------------------------------------------------------


def _chosen(analyses: str | None, scoring: Scoring) -> list[str]:
    """Return what is to be made, by name.

    Raises:
        UserError: A name is none, or there is nothing to score by.
    """
    if analyses is None:
        return [name for name, a in ANALYSES.items() if scoring.possible or not a.scored]
    names = [name.strip() for name in analyses.split(",") if name.strip()]
    if unknown := [name for name in names if name not in ANALYSES]:
        raise UserError(f"--analyses {unknown[0]}: is none of {', '.join(ANALYSES)}")
    if not names:
        raise UserError("--analyses names none")
    if (wanting := [n for n in names if ANALYSES[n].scored]) and not scoring.possible:
        raise UserError(
            f"--analyses {wanting[0]}: runs the model; say what scores it, as --tasks arithmetic, "
            "or --teacher MODEL --prompts DATA"
        )
    return names


def _possible(chosen: Sequence[str], updates: Updates, *, told: bool) -> list[str]:
    """Leave out what takes several checkpoints of a run where none has several.

    Raises:
        UserError: It was asked for.
    """
    if not updates.matrices:
        raise UserError(
            f"--base {updates.base.source}: has no matrices of attention or MLP in layers, by the "
            "names of its tensors"
        )
    if any(len(run) > 1 for run in updates.runs.values()):
        return list(chosen)
    wanting = [name for name in chosen if ANALYSES[name].several]
    if wanting and told:
        raise UserError(f"--analyses {wanting[0]}: needs several checkpoints of a run, in order")
    return [name for name in chosen if name not in wanting]


def _radius(updates: Updates) -> int:
    layers = {updates.places[name].layer for name in updates.matrices}
    return max(min(8, len(layers) // 4), 1)


def _check_folder(folder: Path, output: str, overwrite: bool) -> None:
    taken = [name for name in RESULTS if (folder / name).exists()]
    if taken and not overwrite:
        raise UserError(
            f"--output {output}: holds an analysis already; name another folder or add "
            "--overwrite true"
        )


def _from_weights(updates: Updates, chosen: Sequence[str], directions: int) -> dict[str, list[Row]]:
    follow = directions if "lock_in" in chosen else 0
    parts = list(_shown(spectra.matrix_rows(updates, follow), "matrices", len(updates.matrices)))
    tables = ("matrices", "directions", "planes")
    return {name: [row for part in parts for row in getattr(part, name)] for name in tables}


def _shown(rows: Iterable[Any], name: str, total: int | None = None) -> Iterator[Any]:
    """Show a bar on a terminal."""
    yield from tqdm(rows, desc=name, total=total, leave=False, disable=None)


# --- what is written ------------------------------------------------------------------------------


def _contents(
    updates: Updates, chosen: Sequence[str], found: dict[str, list[Row]], seconds: float
) -> dict[str, str | bytes]:
    """Return all files by name."""
    means = spectra.mean_rows(found["matrices"]) if "matrices" in found else []
    drawn: dict[str, Callable[[], Figure]] = {
        "spectra": lambda: figures.spectra(means),
        "layers": lambda: figures.layers(found["matrices"]),
        "lock_in": lambda: figures.lock_in(found["directions"], found["planes"]),
        "scaling": lambda: figures.scaling(found["scaling"]),
        "dynamics": lambda: figures.dynamics(found["dynamics"]),
        "embeddings": lambda: figures.embeddings(found["embeddings"]),
        "windows": lambda: figures.windows(found["windows"]),
        "subspaces": lambda: figures.subspaces(found["subspaces"]),
        "norm_matching": lambda: figures.norm_matching(found["norm_matching"]),
    }
    tables: dict[str, list[Row]] = {"spectra": means}
    if "lock_in" in chosen:
        tables["lock_in"] = spectra.mean_rows(found["directions"], ["cosine_mean", "error"])
    tables |= {name: found[name] for name in chosen if ANALYSES[name].scored}
    contents: dict[str, str | bytes] = {
        f"{name}.csv": as_csv(rows) for name, rows in (found | tables).items() if rows
    }
    about = _about(updates, seconds)
    page = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width"><title>Updates</title>'
        f"<style>{STYLE}{WIDE}</style><h1>Updates</h1><p>{html.escape(about)}</p>",
        "<h2>Norms</h2>",
        html_table(*as_table(found["norms"])),
        "<p><small>Frobenius norms of dW = W - W_0, of all tensors and by group. Attention and MLP "
        "are matrices of layers; other: norms, biases.</small></p>",
    ]
    text = ["# Updates", "", about, "", "## Norms", "", text_table(*as_table(found["norms"])), ""]
    for name in chosen:
        analysis = ANALYSES[name]
        figure = drawn[name]()
        contents[f"{name}.svg"] = figures.svg(figure)
        contents[f"{name}.png"] = picture = png(figure)
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
    contents["analysis.html"] = "\n".join([*page, "</html>"])
    contents["analysis.md"] = "\n".join(text)
    return contents


def _about(updates: Updates, seconds: float) -> str:
    runs = "; ".join(
        f"{label}: {', '.join(f'step {c.step}' for c in run)}"
        for label, run in updates.runs.items()
    )
    count = len(updates.matrices)
    return (
        f"From {updates.base.source}, W_0. {runs}. {count} matrices of attention and MLP; "
        f"{seconds:.0f} seconds. Sections are those of the paper (arXiv 2605.11739)."
    )


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
