"""Score a model that is in memory with lm-eval: a checkpoint's, or the live student of a run."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.api.task
from lm_eval.evaluator import evaluate as run_tasks
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.benchmarks import Scorer, benchmarks, scorer_of, task_folders
from eval.engine_lm import EngineLM, GeneratedElsewhere
from eval.kept import Kept
from opd.errors import UserError
from opd.rewards import Sandbox
from opd.rollouts import RolloutEngine

FEWSHOT_SEED = 1234  # lm-eval's own

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What is asked of tasks beyond what they say themselves; None: as they say.

    Args:
        samples: Completions per problem.
        limit: Use the first so many problems of each task only.
        temperature: Of the sampling; 0 is greedy.
        top_p: Nucleus sampling.
        top_k: Top-k sampling; 0 keeps all tokens.
        max_new_tokens: Longest completion in tokens.
        chat_template: Render prompts with the tokenizer's chat template, where it has one.
        chat_template_kwargs: Passed to the chat template, for example {enable_thinking: false}.
        system_prompt: System message before each prompt.
        seed: Seed of the sampling.
        batch_size: Completions sampled at a time; changes no completion but by rounding.
        allow_code_execution: Run the programs that a model writes, for tasks that need it.

    Raises:
        UserError: A number is out of range.
    """

    samples: int | None = None
    limit: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    system_prompt: str | None = None
    seed: int = 0
    batch_size: int = 128
    allow_code_execution: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value} must be at least 1")
        for name, low, high in [("temperature", 0, None), ("top_p", 0, 1), ("top_k", 0, None)]:
            value = getattr(self, name)
            if value is not None and not (low <= value and (high is None or value <= high)):
                raise UserError(f"{name} {value} must be at least {low}" + _at_most(high))
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} must be between 0 and 2**63 - 1")

    @property
    def generation(self) -> dict[str, Any]:
        """The generation arguments of lm-eval that are overridden."""
        chosen = {
            "temperature": self.temperature,
            "do_sample": None if self.temperature is None else self.temperature > 0,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_gen_toks": self.max_new_tokens,
        }
        return {name: value for name, value in chosen.items() if value is not None}


def _at_most(high: int | None) -> str:
    return "" if high is None else f" and at most {high}"


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    engine: RolloutEngine,
    settings: Settings,
    *,
    kept: Kept | None = None,
    identity: str = "",
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a model; its mode and the global random state are left as found.

    Of its generation config counts what ends a completion; how to sample, tasks and settings say.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        tasks: What :func:`load_tasks` returns; may be used again.
        engine: Started with the model; samples for the tasks of tasks/.
        settings: What is asked beyond what tasks say.
        kept: What has been generated and judged before; None: nothing.
        identity: What tells the model from others whose completions are kept in the same place.
        progress: Show how many completions are done, and the time left.

    Returns:
        What ``lm_eval.evaluator.evaluate`` returns, ``samples`` included; without any results on
        other processes than the first.

    Raises:
        UserError: A prompt does not fit the model, or programs cannot be confined.
    """
    templated = settings.chat_template and tokenizer.chat_template is not None
    lm = EngineLM(
        model,
        tokenizer,
        engine,
        scorers(tasks),
        kept or Kept(),
        identity=identity,
        batch_size=settings.batch_size,
        chat_template_kwargs=(settings.chat_template_kwargs or {}) if templated else None,
        seed=settings.seed,
        progress=progress,
        workers=len(os.sched_getaffinity(0)),
    )
    training = model.training
    try:
        with _quiet():
            results = run_tasks(
                lm,
                {"tasks": dict(tasks), "groups": {}, "group_map": {}},
                limit=settings.limit,
                system_instruction=settings.system_prompt,
                apply_chat_template=templated,
                bootstrap_iters=1000,  # for lm-eval's own tasks; the error of a mean is a formula
                confirm_run_unsafe_code=settings.allow_code_execution,
            )
    except GeneratedElsewhere:
        return {"results": {}}
    finally:
        model.train(training)
    return dict(results or {"results": {}})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval from telling what it does, which we tell; its bar has no switch."""
    logger, bar = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar


# --- tasks ----------------------------------------------------------------------------------------


@functools.cache
def _index(folders: tuple[Path, ...], *, builtin: bool = False) -> TaskManager:
    with _quiet():  # that ours go before lm-eval's of the same name
        return TaskManager(include_path=list(map(str, folders)), include_defaults=builtin)


def own_tasks() -> TaskManager:
    """Index the tasks of tasks/ and those of the user, once per process."""
    return _index(task_folders())


def _everything() -> TaskManager:
    return _index(task_folders(), builtin=True)


def check_tasks(tasks: Sequence[str], settings: Settings) -> None:
    """Refuse tasks that are not there or cannot be run as asked, before anything is loaded.

    Raises:
        UserError: A task is unknown, scores only the first of several samples, or would run
            programs without leave.
    """
    own = own_tasks().all_tasks
    others = [name for name in tasks if name not in own]
    if others and (unknown := [n for n in others if n not in _everything().all_tasks]):
        raise UserError(
            f"--tasks {','.join(unknown)}: no such task in lm-eval or in tasks/ "
            f"(own tasks: {', '.join(own)})"
        )
    if others and (settings.samples or 1) > 1:
        raise UserError(
            f"--samples {settings.samples}: lm-eval's {', '.join(others)} scores only the first "
            f"completion; use --samples 1, or a task of tasks/ ({', '.join(own)})"
        )
    ours = [benchmarks()[name] for name in tasks if name in benchmarks()]
    programs = [benchmark.task for benchmark in ours if benchmark.scorer == "code"]
    if programs and not settings.allow_code_execution:
        raise UserError(
            f"--tasks {','.join(programs)}: runs programs that the model writes; allow it with "
            "--allow-code-execution"
        )


@_quiet()
def load_tasks(names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Load tasks with what is asked of them, by name.

    Raises:
        UserError: See :func:`check_tasks`; or the problems cannot be had.
    """
    check_tasks(names, settings)
    own = own_tasks().all_tasks
    asked: list[dict[str, Any]] = []
    for name in (name for name in names if name in own):
        asked.append({"task": name})
        benchmark = benchmarks().get(name)  # or a task of tasks/ that is written for lm-eval alone
        if copies := settings.samples or (benchmark and benchmark.samples):
            every = {"name": "none", "filter": [{"function": "take_first_k", "k": copies}]}
            asked[-1] |= {"repeats": copies, "filter_list": [every]}
    loaded: dict[str, Any] = {}
    if asked:  # a group is what lm-eval lets override
        loaded |= own_tasks().load([{"group": "asked", "task": asked}])["tasks"]
    if others := [name for name in names if name not in own]:
        loaded |= _everything().load(others)["tasks"]
    for task in loaded.values():
        if task.get_config("output_type") == "generate_until" and settings.generation:
            task.set_config("generation_kwargs", settings.generation, update=True)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def scorers(loaded: Mapping[str, Any]) -> dict[str, Scorer]:
    """Return what judges completions, of the tasks that are ours.

    Raises:
        UserError: Programs are to be run, and cannot be confined.
    """
    own = {name: benchmarks()[name] for name in loaded if name in benchmarks()}
    runs_programs = any(benchmark.scorer == "code" for benchmark in own.values())
    sandbox = _sandbox() if runs_programs else None
    return {name: scorer_of(benchmark, sandbox) for name, benchmark in own.items()}


@functools.cache
def _sandbox() -> Sandbox:
    """Confine programs, and say how, once per process."""
    sandbox = Sandbox()
    log.warning("programs of the model are run: %s", sandbox.confinement)
    return sandbox
