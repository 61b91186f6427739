"""Our side of a comparison, in a process of its own: ``python -m eval.bench.ours JSON``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file

from eval.bench.clock import Stopwatch, fixed_batch
from opd.metrics import token_metrics
from opd.models import load_model, load_tokenizer, vocabulary_size
from opd.objectives import ReverseKL
from opd.prompts import Prompt, PromptBatch
from opd.rollouts import Rollouts
from opd.teachers import LocalTeacher
from opd.tokens import compare

TRACED = 2  # steps


class Clock(Callback):
    """Times the steps of a fit.

    Args:
        path: Where to write what was found.
        warmup: Steps before the timed ones.
        trace: Where to write a trace of the last steps, for Chrome's or Perfetto's viewer.
    """

    def __init__(self, path: str, warmup: int, trace: str | None = None) -> None:
        self.path = Path(path)
        self.warmup = warmup
        self.trace = trace
        self.stopwatch = Stopwatch()
        self.ledger: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.stopwatch.start()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.trace and trainer.global_step == trainer.max_steps - TRACED:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.stopwatch.lap()
        if trainer.global_step == self.warmup:
            self.ledger = dict(pl_module.ledger.totals)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        steps = trainer.global_step - self.warmup
        spent = {
            name: (value - self.ledger.get(name, 0.0)) / steps
            for name, value in pl_module.ledger.totals.items()
            if name in ("rollout_tokens", "rollout_seconds", "teacher_seconds", "train_seconds")
        }
        tokens = spent.pop("rollout_tokens")
        self.stopwatch.report(self.path, self.warmup, tokens=tokens, phases=spent)
        if self.trace:
            self.profiler.stop()
            self.profiler.export_chrome_trace(self.trace)


def check(folder: Path, output: Path, batch: int, new_tokens: int) -> None:
    """Write loss and gradient of a fixed batch."""
    student = load_model(str(folder / "student"))
    teacher = load_model(str(folder / "teacher"))
    size = vocabulary_size(student)
    tokenizer = load_tokenizer(str(folder / "student"))
    prompts, completions = fixed_batch(folder, tokenizer, batch, new_tokens, size)
    ids = torch.zeros(batch, max(map(len, completions)), dtype=torch.long)
    for i, completion in enumerate(completions):
        ids[i, : len(completion)] = torch.tensor(completion)
    lengths = torch.tensor([len(completion) for completion in completions])
    micro = Rollouts(
        PromptBatch.collate([Prompt(i, tuple(p)) for i, p in enumerate(prompts)], 0),
        ids,
        lengths,
        torch.ones(batch, dtype=torch.bool),
        torch.zeros(ids.shape),
    )
    opinions = {"teacher": LocalTeacher(teacher, vocabulary=size).read(micro)}
    compared = compare(
        student, micro, opinions, ReverseKL(), token_metrics, vocabulary=size, temperature=1.0
    )
    loss = compared.total / micro.num_tokens
    loss.backward()
    found = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    save_file({"loss": loss.detach(), **found}, output)


def run(folder: Path, output: Path, options: dict[str, Any]) -> None:
    """Train for some steps, by the command that a user would type."""
    from opd.cli import main

    torch.set_num_threads(options["threads"])
    steps = options["warmup"] + options["steps"]
    words = {
        "model.student": folder / "student",
        "model.teacher": folder / "teacher",
        "model.max_new_tokens": options["new_tokens"],
        "data.train": folder / "prompts.jsonl",
        "data.batch_size": options["batch"],
        "model.optimizer.class_path": "torch.optim.AdamW",
        "model.optimizer.init_args.lr": 1e-5,
        "model.optimizer.init_args.weight_decay": 0.0,
        "trainer.max_steps": steps,
        "trainer.accelerator": "auto",
        "trainer.enable_progress_bar": "false",
        "checkpoint.every_n_train_steps": 10**6,
        "samples.every_n_steps": 10**6,
        "output": output.with_suffix(""),
        "trainer.callbacks+": "eval.bench.ours.Clock",
        "trainer.callbacks.path": output,
        "trainer.callbacks.warmup": options["warmup"],
    }
    if options["fixed"]:
        words["model.eos_token_ids"] = "[0]"  # padding, which ends next to no completion
    if options["trace"]:
        words["trainer.callbacks.trace"] = options["trace"]
    code = main(["fit", *(f"--{name}={value}" for name, value in words.items())])
    if code:
        sys.exit(code)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    places = Path(asked.pop("folder")), Path(asked.pop("output"))
    if asked.pop("check"):
        check(*places, asked["batch"], asked["new_tokens"])
    else:
        run(*places, asked)
