"""``opd analyze``: where updates point, how large and how low-rank they are, and what parts do.

The analyses of the paper's section 4 (arXiv 2605.11739), of checkpoints of one or several runs from
one base: OPD and RL side by side, for instance.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.analyze import scored, spectra
from eval.analyze.judge import Judge, PromptScore
from eval.analyze.pages import ANALYSES, RESULTS, contents
from eval.analyze.tensors import Tensors
from eval.analyze.updates import Row, Updates, open_updates
from eval.benchmarks import use_data, use_tasks
from eval.evaluate import usable_device
from eval.files import output_folder, write_files
from eval.harness import Settings, check_tasks
from opd.errors import UserError
from opd.models import load_model, load_tokenizer
from opd.models.adapters import Dtype

PROMPTS, NEW_TOKENS = 128, 512  # where nobody says


@dataclass(frozen=True)
class Scoring:
    """By what weights are scored; see :func:`analyze`."""

    tasks: str | None
    settings: Settings
    teacher: str | None
    prompts: str | None
    dtype: Dtype
    device: torch.device
    trust_remote_code: bool

    def __post_init__(self) -> None:
        if (self.teacher is None) != (self.prompts is None):
            raise UserError("--teacher and --prompts: one needs the other")
        if self.tasks is not None:
            check_tasks(self.names, self.settings)

    @property
    def possible(self) -> bool:
        """Whether there is anything to score by."""
        return self.tasks is not None or self.teacher is not None

    def judge(self, tensors: Tensors, base: str) -> Judge:
        """Load a model and what judges it.

        Raises:
            UserError: A model, a task or the prompts cannot be had.
        """
        if self.teacher is not None and self.prompts is not None:
            score = PromptScore(
                base,
                self.teacher,
                self.prompts,
                limit=self.settings.limit or PROMPTS,
                max_new_tokens=self.settings.max_new_tokens or NEW_TOKENS,
                seed=self.settings.seed,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
            )
            judge = Judge(tensors, score.module.student, score.module.tokenizer, self.device)
            judge.by_prompts(score)
        else:
            trust = self.trust_remote_code
            model = load_model(base, dtype=self.dtype, trust_remote_code=trust)
            tokenizer = load_tokenizer(base, trust_remote_code=trust)
            judge = Judge(tensors, model.eval(), tokenizer, self.device)
        if self.tasks is not None:
            judge.by_tasks(self.names, self.settings)
        return judge

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


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
    device: str | None = None,
    seed: int = 0,
    data: str | None = None,
    include_path: str | None = None,
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
        dtype: Dtype of the model that is run; beside a teacher it is float32.
        device: Where models are run: cpu, cuda, cuda:NUMBER. None: the GPU where there is one.
        seed: Seed of the sampling.
        data: Folder with copies of benchmarks, as of opd evaluate.
        include_path: Folder with further tasks, likewise.
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
    if data is not None:
        use_data(data)
    if include_path is not None:
        use_tasks(include_path)
    where = usable_device(device)
    scoring = Scoring(tasks, settings, teacher, prompts, dtype, where, trust_remote_code)
    chosen = _chosen(analyses, scoring)
    with ExitStack() as stack:
        folder = stack.enter_context(output_folder(output))
        _check_folder(folder, output, overwrite)
        updates = stack.enter_context(
            open_updates(base, checkpoints, trust_remote_code=trust_remote_code)
        )
        chosen = _possible(chosen, updates, told=analyses is not None)
        scores = any(ANALYSES[name].scored for name in chosen)
        judge = scoring.judge(updates.base, base) if scores else None  # what is wrong, is at once
        norms = spectra.tensor_norms(updates)
        found: dict[str, list[Row]] = {"norms": spectra.norm_rows(updates, norms)}
        if any(not ANALYSES[name].scored for name in chosen):
            found |= _from_weights(updates, chosen, directions)
        if judge is not None:
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
        files = contents(chosen, found, _about(updates, time.perf_counter() - start))
        write_files({folder / name: content for name, content in files.items()})
        print(files["analysis.md"])
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
    if wanting:
        print(f"left out, for want of several checkpoints of a run: {', '.join(wanting)}")
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


def _about(updates: Updates, seconds: float) -> str:
    runs = "; ".join(
        f"{label}: {', '.join(f'step {c.step}' for c in run)}"
        for label, run in updates.runs.items()
    )
    return (
        f"From {updates.base.source}, W_0. {runs}. {updates.count} matrices of attention and MLP; "
        f"{seconds:.0f} seconds. Sections are those of the paper (arXiv 2605.11739)."
    )
