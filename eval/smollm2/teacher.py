"""The teacher: SmolLM2 with a low-rank adapter, W + up down for each matrix of its layers.

The adapter lies beside this file. It was made by ``python -m eval.smollm2.teacher --model MODEL
--output FILE`` from sums that no evaluation asks for (about 10 minutes on one core; the same seed,
machine and library versions give the same numbers), where MODEL is the folder that ``make
demo-smollm2`` leaves in runs/smollm2/models/student.

Shapes: down [rank, in], up [out, rank].
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.smollm2.sums import Sum, sums
from opd.models import load_model, load_tokenizer

ADAPTER = Path(__file__).parent / "teacher.safetensors"
RANK, STEPS, BATCH, LEARNING_RATE, WARMUP, SEED = 4, 50, 16, 2e-3, 5, 0


def merge(model: PreTrainedModel, adapter: Path = ADAPTER) -> None:
    """Add an adapter to the weights of a model."""
    factors = load_file(adapter)
    with torch.no_grad():
        for name, linear in _matrices(model):
            down, up = factors[f"{name}.down"], factors[f"{name}.up"]
            linear.weight += up.float() @ down.float()


def build(model: str, output: Path) -> None:
    """Train an adapter on answers in the teacher's form, and save it in float16."""
    torch.manual_seed(SEED)
    tokenizer, base = load_tokenizer(model), load_model(model)
    base.requires_grad_(False)
    factors = {name: _attach(linear) for name, linear in _matrices(base)}
    parameters = [factor for pair in factors.values() for factor in pair]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([rise, fall])
    batches = _batches(tokenizer)
    for step in range(1, STEPS + 1):
        ids, attention, labels = next(batches)
        loss = base(input_ids=ids, attention_mask=attention, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(f"step {step}/{STEPS}: loss {loss.item():.4f}", flush=True)
    save_file(
        {
            f"{name}.{role}": factor.detach().half()
            for name, pair in factors.items()
            for role, factor in zip(("down", "up"), pair, strict=True)
        },
        output,
    )


def _matrices(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def _attach(linear: nn.Linear) -> tuple[nn.Parameter, nn.Parameter]:
    """Add up down x to what a matrix returns; up begins at zero, so that nothing changes yet."""
    down = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
    up = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + inputs[0] @ down.T @ up.T

    linear.register_forward_hook(add)
    return down, up


def _batches(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, attention mask and labels [BATCH, longest]; the loss is on completions only."""
    generator, rows = random.Random(SEED), sums()["train"]
    while True:
        yield _batch(tokenizer, generator.sample(rows, BATCH))


def _batch(tokenizer: PreTrainedTokenizerBase, rows: list[Sum]) -> tuple[Tensor, Tensor, Tensor]:
    pairs = []
    for row in rows:
        turns = [{"role": "user", "content": row.problem}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        texts = [prompt, f"{row.completion}{tokenizer.eos_token}"]
        pairs.append(tokenizer(texts, add_special_tokens=False)["input_ids"])
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, completion) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(completion)
        ids[i, :end] = torch.tensor(prompt + completion)
        attention[i, :end] = 1
        labels[i, start:end] = ids[i, start:end]
    return ids, attention, labels


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the teacher's adapter.")
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct, as a folder or GGUF")
    parser.add_argument("--output", required=True, type=Path, help="safetensors file to write")
    arguments = parser.parse_args()
    build(arguments.model, arguments.output)
