"""Rebuild the embedded models from nothing: ``python -m opd.embedded.build --output DIR``.

The base learns from an adder who slips now and then: it knows how to add (greedy decoding is right)
but is unsure of each sum (sampling often is not). The teacher is the base trained further without
slips: like an RL-tuned model, a sharpened version of the same base. The short pair ships as
embedded:base and embedded:teacher, the long one as embedded:base-long and embedded:teacher-long.
embedded:teacher-rl is the short base after RL with verifiable rewards (GRPO, as configs/rl/grpo).
About ten minutes, thirty, and three on two cores; the same seed, machine and library versions give
the same weights.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opd.answers import AnswerVerifier
from opd.embedded.arithmetic import CHARACTERS, LONG, SHORT, problems
from opd.module import OPDModule
from opd.objectives import ClippedPolicyGradient
from opd.prompts import PromptDataModule
from opd.rewards import Correctness, RewardTerm

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
}


@dataclass(frozen=True)
class Pair:
    """How a base and its teacher are trained.

    Attributes:
        suffix: Of the folders' names.
        numbers: Numbers to add.
        context: Positions of the models.
        batch_size: Chains per step.
        warmup: Steps over which the learning rate rises; after them it follows a cosine to 0.
        base_steps: Optimizer steps of the base.
        teacher_steps: Further optimizer steps of the teacher, without slips.
        learning_rate: Of the base; the teacher's is half of it where there is a warm-up.
        slip: Probability of a wrong sum digit in what the base learns from.
        rl_steps: Steps of RL that make a second teacher of the base; 0: there is none.
    """

    suffix: str
    numbers: int
    context: int
    batch_size: int
    warmup: int
    base_steps: int
    teacher_steps: int
    learning_rate: float
    slip: float
    rl_steps: int = 0

    @property
    def new_tokens(self) -> int:
        """Longest completion in tokens."""
        return len(next(problems("test", self.numbers)).chain()) + 2


PAIRS = {
    "short": Pair("", SHORT, 128, 128, 0, 1500, 600, 1e-3, 0.26, rl_steps=160),
    "long": Pair("-long", LONG, 320, 48, 160, 700, 150, 2e-3, 0.032),
}


def build_tokenizer(context: int = 128) -> PreTrainedTokenizerFast:
    """A character tokenizer of 18 tokens with a chat template, in Hugging Face's own format."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_max_length=context,
        chat_template=CHAT_TEMPLATE,
        **SPECIAL_TOKENS,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of 0.79 M parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pair: Pair,
    *,
    steps: int,
    warmup: int,
    learning_rate: float,
    slip: float,
    seed: int,
) -> None:
    """Supervised next-token training on chains, loss on the completion only."""
    stream, generator = problems("train", pair.numbers, seed), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    decay: torch.optim.lr_scheduler.LRScheduler
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if warmup:
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
        decay = torch.optim.lr_scheduler.ChainedScheduler([rise, decay])
    model.train()
    for step in range(1, steps + 1):
        batch = [next(stream) for _ in range(pair.batch_size)]
        texts = [p.prompt + p.chain(slip, generator) + "<eos>" for p in batch]
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        labels = ids.clone()
        labels[:, : len(batch[0].prompt)] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        if step % 50 == 0:
            print(f"step {step}/{steps}: loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    pair: Pair,
    *,
    sample: bool,
    count: int = 500,
) -> float:
    """The share of test problems answered right, greedy or sampled at temperature 1."""
    torch.manual_seed(0)
    stream = problems("test", pair.numbers, seed=1)
    batch = [next(stream) for _ in range(count)]
    ids = torch.tensor(tokenizer([p.prompt for p in batch])["input_ids"])
    output = model.eval().generate(
        ids, max_new_tokens=pair.new_tokens, do_sample=sample, top_k=0 if sample else None
    )
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    right = [text.rpartition("=")[2] == p.answer for text, p in zip(texts, batch, strict=True)]
    return sum(right) / count


def train_by_rewards(base: Path, pair: Pair, seed: int) -> PreTrainedModel:
    """GRPO from a base in a folder: 48 prompts a step, 8 completions each, 1 for a right sum."""
    module = OPDModule(
        str(base),
        objective=ClippedPolicyGradient(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0),
        max_new_tokens=pair.new_tokens,
        rollouts_per_prompt=8,
        reward=RewardTerm(Correctness(), per="completion"),
        verifier=AnswerVerifier(format=r"=(\d+)$"),
        seed=seed,
    )
    data = PromptDataModule("embedded:train", batch_size=48, seed=seed)
    trainer = Trainer(
        max_steps=pair.rl_steps, logger=False, enable_checkpointing=False, limit_val_batches=0
    )
    trainer.fit(module, data)
    return module.student


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder; float16 halves its size and is read back as float32."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build(
    output: Path,
    pairs: list[Literal["short", "long"]] = ["short", "long"],  # noqa: B006 - never changed
    seed: int = 0,
) -> None:
    """Train and save bases and teachers.

    Args:
        output: Folder that receives ``base``, ``teacher``, ``teacher-rl``, ``base-long`` and
            ``teacher-long``.
        pairs: Which pairs to build: short adds two numbers, long eight.
        seed: Seed of the weights, the problems and the slips.
    """
    for pair in (PAIRS[name] for name in pairs):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(pair.context)
        model = build_model(tokenizer)
        rate = pair.learning_rate
        stages = [
            ("base", pair.base_steps, pair.warmup, rate, pair.slip, seed),
            ("teacher", pair.teacher_steps, 0, rate / 2 if pair.warmup else rate, 0.0, seed + 1),
        ]
        for role, steps, warmup, learning_rate, slip, stage_seed in stages:
            train(
                model,
                tokenizer,
                pair,
                steps=steps,
                warmup=warmup,
                learning_rate=learning_rate,
                slip=slip,
                seed=stage_seed,
            )
            save(model, tokenizer, output / f"{role}{pair.suffix}")
            greedy, sampled = (accuracy(model, tokenizer, pair, sample=s) for s in (False, True))
            print(f"{role}{pair.suffix}: accuracy {greedy:.3f} greedy, {sampled:.3f} sampled")
        if pair.rl_steps:
            trained = train_by_rewards(output / f"base{pair.suffix}", pair, seed)
            save(trained, tokenizer, output / f"teacher-rl{pair.suffix}")
            greedy, sampled = (accuracy(trained, tokenizer, pair, sample=s) for s in (False, True))
            print(f"teacher-rl{pair.suffix}: accuracy {greedy:.3f} greedy, {sampled:.3f} sampled")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(build, as_positional=False)
