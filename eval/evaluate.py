"""``opd evaluate``: a checkpoint, folder, hub id or embedded model on many benchmarks.

Generation and scoring are two stages. What is generated is kept, completion by completion, in
``completions/``, so that a killed evaluation goes on with the rest, and a finished one is scored
again without a model's word. The folder then holds results.json (lm-eval's layout), results.md, and
samples_TASK.jsonl, one problem a line.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.benchmarks import benchmarks, use_data, use_tasks
from eval.benchmarks.scoring import verdict_of
from eval.compare import compare_results
from eval.files import output_folder, write_files
from eval.harness import Settings, check_tasks, evaluate_model, load_tasks
from eval.kept import Kept
from eval.tables import results_table
from opd.cli import ranks, recipes, run_folder
from opd.errors import UserError
from opd.models import Dtype, load_model, load_tokenizer
from opd.rollouts import RolloutEngine, TransformersEngine
from opd.weights import Weights

log = logging.getLogger(__name__)

RESULTS = ("results.json", "results.md")
FAR = datetime.timedelta(days=30)  # processes wait so long for the one with the longest answers
WHERE = ("batch_size", "allow_code_execution")  # settings that change no score


def evaluate(
    model: str | None = None,
    tasks: str | None = None,
    suite: str | None = None,
    samples: int | None = None,
    limit: int | None = None,
    output: str | None = None,
    batch_size: int = 128,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    max_new_tokens: int | None = None,
    chat_template: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
    system_prompt: str | None = None,
    tokenizer: str | None = None,
    engine: RolloutEngine | None = None,
    dtype: Dtype = "float32",
    device: str | None = None,
    seed: int = 0,
    data: str | None = None,
    include_path: str | None = None,
    allow_code_execution: bool = False,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    compare: list[str] | None = None,
) -> None:
    """Evaluate a model on lm-eval tasks, or compare two evaluations.

    Args:
        model: Hub id, perhaps with @REVISION (branch, tag or commit), folder, checkpoint of opd
            fit, GGUF file, embedded:base or embedded:teacher.
        tasks: Names of lm-eval tasks, separated by commas; those in tasks/ come first.
        suite: Tasks and settings by name (math, code, science, quick, paper_math, paper_code), or a
            YAML file with such.
        samples: Completions per problem. None: as many as the task says.
        limit: Use the first so many problems of each task only.
        output: Folder for results.json, results.md, samples and completions. None: print only.
        batch_size: Completions sampled at a time.
        temperature: Of the sampling; 0 is greedy. None: as the task says, 1 for those of tasks/.
        top_p: Nucleus sampling; 1 keeps all tokens. None: as the task says.
        top_k: Top-k sampling; 0 keeps all tokens. None: as the task says.
        max_new_tokens: Longest completion in tokens. None: as the task says.
        chat_template: Render prompts with the tokenizer's chat template, where it has one.
        chat_template_kwargs: Passed to the chat template, for example {enable_thinking: false}.
        system_prompt: System message before each prompt.
        tokenizer: Where the tokenizer comes from, named like a model. None: the model.
        engine: What samples completions. None: TransformersEngine.
        dtype: Dtype of the weights.
        device: Device to run on. None: the GPU where there is one.
        seed: Seed of the sampling.
        data: Folder with copies of benchmarks: DATA/TASK.parquet, .jsonl, .csv or .arrow, or a
            folder DATA/TASK of such files. None: they come from the hub.
        include_path: Folder with further tasks, as YAML of lm-eval or like those of tasks/.
        allow_code_execution: Run the programs that the model writes, in a sandbox.
        trust_remote_code: Let a hub model run its own code.
        overwrite: Replace results of another evaluation in the folder, instead of refusing.
        compare: Two folders with results, A B: the difference B - A per task and together.

    Raises:
        UserError: An option is out of range, a task cannot be had or run, or the folder cannot be
            written or holds results of another evaluation.
    """
    if compare is not None:
        compare_results(Path(compare[0]), Path(compare[1]))
        return
    if not model:
        raise UserError(
            "--model is missing: a hub id, a folder, a checkpoint, a GGUF file or embedded:NAME"
        )
    names, settings = _asked(
        tasks,
        suite,
        {
            "samples": samples,
            "limit": limit,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "max_new_tokens": max_new_tokens,
            "chat_template_kwargs": chat_template_kwargs,
            "system_prompt": system_prompt,
        },
        chat_template=chat_template,
        seed=seed,
        batch_size=batch_size,
        allow_code_execution=allow_code_execution,
    )
    if data is not None:
        use_data(data)
    if include_path is not None:
        use_tasks(include_path)
    check_tasks(names, settings)
    where = usable_device(device)
    identity = fingerprint(model)
    told = {
        "model": model,
        "model_source": identity,
        "tasks": names,
        "dtype": dtype,
        "tokenizer": tokenizer,
        **{k: v for k, v in vars(settings).items() if k not in WHERE},
    }
    start = time.perf_counter()
    with contextlib.ExitStack() as exits:
        folder = None if output is None else exits.enter_context(output_folder(output))
        if folder is not None and not overwrite:
            _refuse_other_results(folder, told)
        rank, world_size = _join()
        if str(where) == "cuda" and world_size > 1:
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if folder is not None and rank == 0:
            exits.callback(os.close, run_folder.lock(folder))
        kept = Kept(folder, rank, world_size)
        loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
        torch.nn.Module.to(loaded, where)
        results = _results(
            loaded,
            load_tokenizer(tokenizer or model, trust_remote_code=trust_remote_code),
            names,
            engine or TransformersEngine(),
            settings,
            kept,
            f"{identity} {dtype}",
        )
        if rank == 0:
            config = {**told, "seconds": round(time.perf_counter() - start, 1)}
            table = results_table(results, config)
            _write(folder, results, config, table)
            kept.forget_verdicts()
            print(table, end="")


def _results(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    engine: RolloutEngine,
    settings: Settings,
    kept: Kept,
    identity: str,
) -> dict[str, Any]:
    engine.start(model, Weights(model), tokenizer)
    try:
        return evaluate_model(
            model,
            tokenizer,
            load_tasks(tasks, settings),
            engine,
            settings,
            kept=kept,
            identity=identity,
            progress=kept.rank == 0,
        )
    finally:
        engine.stop()


def _asked(
    tasks: str | None, suite: str | None, chosen: Mapping[str, Any], **always: Any
) -> tuple[list[str], Settings]:
    """Put options over those of the suite.

    Raises:
        UserError: There are no tasks, the suite is none, or a value is out of range.
    """
    said = {} if suite is None else read_suite(suite)
    of_suite = said.pop("tasks", [])
    names = of_suite if tasks is None else [name.strip() for name in tasks.split(",")]
    names = list(dict.fromkeys(filter(None, names)))
    if not names:
        raise UserError(
            "--tasks names no task" if tasks is not None else "name --tasks, or a --suite of them"
        )
    over = {name: value for name, value in chosen.items() if value is not None}
    try:
        return names, Settings(**{**said, **over, **always})
    except UserError as error:
        raise UserError(f"--{error}") from error


def read_suite(name: str) -> dict[str, Any]:
    """Read tasks and settings from a YAML file, or from one of configs/eval by its name.

    Raises:
        UserError: There is no such file, it is no YAML, or has a key that means nothing.
    """
    path = recipes.find(name, "--suite", kind="eval")
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    recipes.check_yaml(text, path)
    suite: dict[str, Any] = yaml.safe_load(text)
    known = {
        "tasks": list,
        "samples": int,
        "limit": int,
        "temperature": float | int,
        "top_p": float | int,
        "top_k": int,
        "max_new_tokens": int,
        "chat_template_kwargs": dict,
        "system_prompt": str,
    }
    for key, value in suite.items():
        if key not in known:
            raise UserError(f"{path}: {key} means nothing here; known are {', '.join(known)}")
        if value is not None and not isinstance(value, known[key]):
            raise UserError(f"{path}: {key} cannot be {value!r}")
    if not all(isinstance(task, str) for task in suite.get("tasks") or ()):
        raise UserError(f"{path}: tasks must be a list of names")
    return {key: value for key, value in suite.items() if value is not None}


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


def fingerprint(source: str) -> str:
    """Tell a model from others under the same name: by its files, where they are here."""
    path = Path(source).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(repr(states or source).encode()).hexdigest()[:16]


def _refuse_other_results(folder: Path, told: Mapping[str, Any]) -> None:
    """See that results in a folder are of the same evaluation; those are made again.

    Raises:
        UserError: It holds something else's results.
    """
    earlier = [path for path in map(folder.joinpath, RESULTS) if path.exists()]
    earlier += sorted(folder.glob("samples_*.jsonl"))
    if not earlier:
        return
    try:
        config = json.loads((folder / "results.json").read_text("utf-8"))["config"]
        same = all(config[name] == value for name, value in told.items())
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(
            f"{earlier[0]} exists, of another evaluation; name another folder or add "
            "--overwrite true"
        )


def _join() -> tuple[int, int]:
    """Return rank and number of the processes that a launcher has started."""
    if ranks.world_size() == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=FAR)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _write(
    folder: Path | None, results: Mapping[str, Any], config: Mapping[str, Any], table: str
) -> None:
    """Write results and samples, all or nothing."""
    if folder is None:
        return
    own = benchmarks()
    contents: dict[Path, str | bytes] = {}
    for task, samples in results.get("samples", {}).items():
        public = task not in own or not own[task].gated
        lines = [json.dumps(_record(sample, public=public), default=str) for sample in samples]
        contents[folder / f"samples_{task}.jsonl"] = "".join(line + "\n" for line in lines)
    kept = {name: value for name, value in results.items() if name != "samples"}
    layout = {**kept, "config": dict(config), "date": time.time()}
    contents[folder / "results.json"] = json.dumps(layout, indent=2, default=str) + "\n"
    contents[folder / "results.md"] = table
    write_files(contents)


def _record(sample: Mapping[str, Any], *, public: bool) -> dict[str, Any]:
    """Return lm-eval's record of a problem, and what is known of each completion.

    Without the problem's text where that must not be shown, nor its completions, which repeat it.
    """
    verdicts = [verdict_of(text) for text in sample["resps"][0]] if sample["resps"] else []
    if not any(verdicts):
        return dict(sample)
    hidden = () if public else ("doc", "arguments", "resps")
    record = {k: v for k, v in sample.items() if k not in ("filtered_resps", *hidden)}
    record["id"] = sample["doc"]["id"]
    record["completions"] = [
        {
            "answer": verdict.answer if public else None,
            "right": verdict.right,
            "tokens": text.tokens,
            "truncated": text.truncated,
        }
        for text, verdict in zip(sample["resps"][0], verdicts, strict=True)
        if verdict is not None
    ]
    if public:  # the tests of a program may have gigabytes
        record["doc"] = {name: value for name, value in sample["doc"].items() if name != "tests"}
    return record
