"""Evaluate a live student, a checkpoint, a folder, a hub id or an embedded model with lm-eval."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.benchmarks import use_data
from opd.errors import UserError
from opd.models import (
    Dtype,
    context_length,
    eos_token_ids,
    generating_with,
    load_model,
    load_tokenizer,
    plain_sampling,
)

TASKS = Path(__file__).parent.parent / "tasks"
RESULTS = ("results.json", "results.md")


def evaluate(
    model: str,
    tasks: str,
    samples: int = 1,
    limit: int | None = None,
    output: str | None = None,
    batch_size: int = 128,
    chat_template: bool = True,
    dtype: Dtype = "float32",
    device: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    data: str | None = None,
) -> None:
    """Evaluate a model on lm-eval tasks.

    Args:
        model: Hub id, perhaps with @REVISION (branch, tag or commit), folder, checkpoint of opd
            fit, embedded:base or embedded:teacher.
        tasks: Names of lm-eval tasks, separated by commas; those in tasks/ come first.
        samples: Completions per problem; the score is their mean (avg@k).
        limit: Use the first so many problems of each task only.
        output: Folder for results.json, results.md and samples. None: print only.
        batch_size: Sequences per batch.
        chat_template: Render prompts with the tokenizer's chat template, where it has one.
        dtype: Dtype of the weights.
        device: Device to run on. None: the GPU where there is one.
        seed: Seed of the sampling.
        trust_remote_code: Let a hub model run its own code.
        overwrite: Replace results that are in the folder, instead of refusing.
        data: Folder with copies of benchmarks: DATA/TASK.parquet, .jsonl, .csv or .arrow, or a
            folder DATA/TASK of such files. None: they come from the hub.

    Raises:
        UserError: An option is out of range, or the folder cannot be written or holds results.
    """
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise UserError("--tasks names no task")
    for option, value in [("samples", samples), ("limit", limit), ("batch_size", batch_size)]:
        if value is not None and value < 1:
            raise UserError(f"--{option} {value} must be at least 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed} must be between 0 and 2**63 - 1")
    if data is not None:
        use_data(data)
    where = usable_device(device)
    folder = _output_folder(output, overwrite=overwrite)
    start = time.perf_counter()
    loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    torch.nn.Module.to(loaded, where)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    results = evaluate_model(
        loaded,
        tokenizer,
        names,
        samples=samples,
        limit=limit,
        batch_size=batch_size,
        chat_template=chat_template,
        seed=seed,
    )
    scores = metrics_of(results)
    summary = {
        "model": model,
        "samples": samples,
        "limit": limit,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "results": scores,
        "problems": {
            task: counts["effective"] for task, counts in results.get("n-samples", {}).items()
        },
    }
    table = markdown_table(model, scores, samples)
    if folder is not None:
        (folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
        (folder / "results.md").write_text(table, "utf-8")
        for task, records in results.get("samples", {}).items():
            with (folder / f"samples_{task}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(r, default=str) + "\n" for r in records)
    print(table, end="")


def usable_device(name: str | None) -> torch.device:
    """Return a device to run on; None: the GPU where there is one.

    Raises:
        UserError: There is no such device, or nothing can be computed on it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device has an error of its own
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"--device {name}: cannot be used on this machine ({reason}); leave it out, or name "
            "cpu, cuda or cuda:NUMBER"
        ) from error
    return device


def _output_folder(output: str | None, *, overwrite: bool) -> Path | None:
    if output is None:
        return None
    if not output.strip():
        raise UserError(f"--output {output!r}: names no folder")
    folder = Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    earlier = [path for path in map(folder.joinpath, RESULTS) if path.exists()]
    earlier += sorted(folder.glob("samples_*.jsonl"))
    if earlier and not overwrite:
        raise UserError(f"{earlier[0]} exists; name another folder or add --overwrite true")
    return folder


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    samples: int = 1,
    limit: int | None = None,
    batch_size: int = 128,
    chat_template: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a model that is in memory; its mode and the global random state are left as found.

    Of its generation config counts what ends a completion; how to sample, the tasks say.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        tasks: Names of lm-eval tasks.
        samples: Completions per problem.
        limit: Use the first so many problems of each task only.
        batch_size: Sequences per batch.
        chat_template: Render prompts with the chat template, where the tokenizer has one.
        seed: Seed of the sampling.

    Returns:
        What ``lm_eval.simple_evaluate`` returns; that is no scores on other than a node's first
        process.

    Raises:
        UserError: A task is unknown, or scores only the first of several samples.
    """
    templated = chat_template and tokenizer.chat_template is not None
    manager = task_manager(tasks)
    loaded = load_tasks(manager, tasks, samples)
    training, logging_level = model.training, logging.getLogger("lm_eval").level
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ends = eos_token_ids(model, tokenizer)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), generating_with(model, plain_sampling(ends)):
            torch.manual_seed(seed)
            lm = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=context_length(model),
                # The template writes its own special tokens; plain text gets the tokenizer's.
                add_bos_token=False if templated else None,
            )
            results = simple_evaluate(
                lm,
                tasks=loaded,
                limit=limit,
                task_manager=manager,
                apply_chat_template=templated,
                bootstrap_iters=0,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
    finally:
        model.train(training)
        logging.getLogger("lm_eval").setLevel(logging_level)
    return dict(results or {"results": {}})


@functools.cache
def _index(folder: Path) -> TaskManager:
    return TaskManager(include_path=str(folder), include_defaults=False)


def own_tasks() -> TaskManager:
    """Index the tasks of tasks/, once per process."""
    return _index(TASKS)


def task_manager(tasks: Sequence[str]) -> TaskManager:
    """Index the tasks of tasks/, and those built into lm-eval only if they are asked for."""
    own = own_tasks()
    if all(name in own.all_tasks for name in tasks):
        return own
    everything = TaskManager(include_path=str(TASKS))
    unknown = [name for name in tasks if name not in everything.all_tasks]
    if unknown:
        raise UserError(
            f"--tasks {','.join(unknown)}: no such task in lm-eval or in tasks/ "
            f"(own tasks: {', '.join(own.all_tasks)})"
        )
    return everything


def load_tasks(manager: TaskManager, names: Sequence[str], samples: int) -> list[Any]:
    """Load tasks so that they are given all samples of a problem.

    Raises:
        UserError: A task scores only the first of several samples.
    """
    own = own_tasks()
    single = [name for name in names if name not in own.all_tasks]
    if single and samples > 1:
        raise UserError(
            f"--samples {samples}: lm-eval's {', '.join(single)} scores only the first completion; "
            f"use --samples 1, or a task of tasks/ ({', '.join(own.all_tasks)})"
        )
    every = {"name": "samples", "filter": [{"function": "take_first_k", "k": samples}]}
    overridden = [
        {"task": name, "repeats": samples, "filter_list": [every]}
        for name in names
        if name not in single
    ]
    group = {"group": "several_samples", "task": overridden}
    return [*manager.load([group])["tasks"].values(), *single]


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Flatten lm-eval's results to ``<task>/<metric>``, without errors and filter names."""
    flat = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric = key.partition(",")[0]
            is_score = isinstance(value, int | float) and metric != "sample_len"
            if is_score and not metric.endswith("_stderr"):
                flat[f"{task}/{metric}"] = float(value)
    return flat


def markdown_table(model: str, results: Mapping[str, float], samples: int) -> str:
    """Lay results out as a Markdown table."""
    lines = [f"| {model} (avg@{samples}) | score |", "|---|---|"]
    lines += [f"| {name} | {value:.4f} |" for name, value in results.items()]
    return "\n".join(lines) + "\n"
