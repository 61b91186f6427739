"""Rebuild the embedded pair from nothing: ``python -m opd.embedded.build --output DIR``.

The base learns chains in which digits are spoiled at random: it knows how to add (greedy decoding is
right) but is unsure of each digit (sampling often is not). The teacher is the base trained further
on clean chains: like an RL-tuned model, a sharpened version of the same base. About ten minutes on
two cores; the same seed, machine and library versions give the same weights.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd.embedded.arithmetic import CHARACTERS, Problem, problems

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer of 18 tokens with a chat template, in Hugging Face's own format."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_max_length=128,
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


def spoil(chain: str, noise: float, generator: random.Random) -> str:
    """Replace each digit by a random one with probability ``noise``."""
    return "".join(
        generator.choice("0123456789") if c.isdigit() and generator.random() < noise else c
        for c in chain
    )


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    noise: float,
    seed: int,
    learning_rate: float = 1e-3,
    batch_size: int = 128,
) -> None:
    """Supervised next-token training on chains, loss on the completion only, cosine decay."""
    stream, generator = problems("train", seed), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(1, steps + 1):
        batch = [next(stream) for _ in range(batch_size)]
        texts = [p.prompt + spoil(p.chain, noise, generator) + "<eos>" for p in batch]
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        labels = ids.clone()
        labels[:, : len(batch[0].prompt)] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{steps}: loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, sample: bool, count: int = 2000
) -> float:
    """The share of test problems answered right, greedy or sampled at temperature 1."""
    torch.manual_seed(0)
    stream = problems("test", seed=1)
    batch: list[Problem] = [next(stream) for _ in range(count)]
    ids = torch.tensor(tokenizer([p.prompt for p in batch])["input_ids"])
    output = model.eval().generate(ids, max_new_tokens=24, do_sample=sample, top_k=0)
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    right = [text.rpartition("=")[2] == p.answer for text, p in zip(texts, batch, strict=True)]
    return sum(right) / count


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder; float16 halves its size and is read back as float32."""
    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build(
    output: Path,
    seed: int = 0,
    base_steps: int = 1500,
    teacher_steps: int = 600,
    noise: float = 0.23,
) -> None:
    """Train and save the base and the teacher.

    Args:
        output: Folder that receives ``base`` and ``teacher``.
        seed: Seed of the weights, the problems and the noise.
        base_steps: Optimizer steps of the base.
        teacher_steps: Further optimizer steps of the teacher, on clean chains.
        noise: Probability with which a digit of the base's chains is replaced by a random one.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    for name, steps, spoiled in [("base", base_steps, noise), ("teacher", teacher_steps, 0.0)]:
        train(model, tokenizer, steps=steps, noise=spoiled, seed=seed + (name == "teacher"))
        save(model, tokenizer, output / name)
        greedy = accuracy(model, tokenizer, sample=False)
        sampled = accuracy(model, tokenizer, sample=True)
        print(f"{name}: accuracy {greedy:.3f} greedy, {sampled:.3f} sampled at temperature 1")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(build, as_positional=False)
