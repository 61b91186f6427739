"""TRL's side of a comparison, in a process of its own: ``python -m eval.bench.trl JSON``.

Written for TRL 1.16, transformers' AdamW without fused steps as TRL's own scripts choose it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from eval.bench.clock import Stopwatch, fixed_batch


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.stopwatch = Stopwatch()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.stopwatch.lap()


def _trainer(folder: Path, options: dict[str, Any], clock: _Clock) -> Any:
    trl: Any = importlib.import_module("trl")  # no dependency of ours

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32)
        for role in ("student", "teacher")
    )
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    fixed = {"min_new_tokens": options["new_tokens"]} if options["fixed"] else {}
    config = trl.DistillationConfig(
        output_dir=str(folder / "trl"),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=options["batch"],
        max_steps=options["warmup"] + options["steps"],
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        beta=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_completion_length=options["new_tokens"],
        generation_kwargs=fixed,
        shuffle_dataset=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=0,
    )
    return trl.DistillationTrainer(
        model=student,
        teacher_model=teacher.eval().requires_grad_(False),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "student", padding_side="left"),
        callbacks=[clock],
    )


def run(folder: Path, output: Path, options: dict[str, Any]) -> None:
    """Train for some steps."""
    torch.set_num_threads(options["threads"])
    clock = _Clock()
    trainer = _trainer(folder, options, clock)
    clock.stopwatch.start()
    trainer.train()
    logged = [entry.get("completions/mean_length") for entry in trainer.state.log_history]
    lengths = [length for length in logged if length is not None][options["warmup"] :]
    tokens = options["batch"] * sum(lengths) / len(lengths) if lengths else None
    clock.stopwatch.report(output, options["warmup"], tokens=tokens)


def check(folder: Path, output: Path, options: dict[str, Any]) -> None:
    """Write loss and gradient of a fixed batch."""
    trainer = _trainer(folder, options, _Clock())
    model, tokenizer = trainer.model, trainer.processing_class
    batch, size = options["batch"], model.get_output_embeddings().weight.shape[0]
    prompts, completions = fixed_batch(folder, tokenizer, batch, options["new_tokens"], size)
    widths = max(map(len, prompts)), max(map(len, completions))
    shape = {"prompt": (batch, widths[0]), "completion": (batch, widths[1])}
    inputs = {
        f"{part}_{kind}": torch.zeros(shape[part], dtype=torch.long)
        for part in shape
        for kind in ("ids", "mask")
    }
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        inputs["prompt_ids"][i, -len(prompt) :] = torch.tensor(prompt)
        inputs["prompt_mask"][i, -len(prompt) :] = 1
        inputs["completion_ids"][i, : len(completion)] = torch.tensor(completion)
        inputs["completion_mask"][i, : len(completion)] = 1
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    model.train()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    found = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    save_file({"loss": loss.detach().cpu(), **found}, output)


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    asked = json.loads(sys.argv[1])
    places = Path(asked.pop("folder")), Path(asked.pop("output"))
    if asked.pop("check"):
        check(*places, asked)
    else:
        run(*places, asked)
