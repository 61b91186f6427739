"""What both sides are given: models, prompts and sizes, made here from a seed or named by the user.

A made pair has random weights, a tokenizer of words, and prompts of eight tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd.errors import UserError

PAD, END = 0, 1
PROMPTS, PROMPT_TOKENS = 256, 8
HIDDEN = {"student": 32, "teacher": 64}
PUSH = 4.0  # what all embeddings of a pair with a tail share; by it the head tells the end


@dataclass(frozen=True)
class Workload:
    """Steps of training.

    Attributes:
        about: For the table.
        batch: Prompts per step, one completion each, all in one forward and backward.
        new_tokens: Longest completion.
        steps: Steps that are timed, after ``warmup``.
        vocabulary: Of a pair to be made; 0: the models are given.
        mean_tokens: Mean length of completions; None: all have the longest.
        warmup: Steps before.
    """

    about: str
    batch: int
    new_tokens: int
    steps: int
    vocabulary: int = 0
    mean_tokens: int | None = None
    warmup: int = 3


WORKLOADS = {
    "small": Workload("vocabulary 512, 8 x 16 tokens", 8, 16, 40, vocabulary=512),
    "large": Workload("vocabulary 151,936, 8 x 16 tokens", 8, 16, 8, vocabulary=151_936),
    "tail": Workload(
        "vocabulary 151,936, 16 x 1 to 96 tokens", 16, 96, 4, vocabulary=151_936, mean_tokens=16
    ),
    "model": Workload("the model named, 8 x 128 tokens", 8, 128, 1, warmup=1),
}


def prepare(workload: Workload, folder: Path, model: str | None) -> None:
    """Write ``student``, ``teacher`` and ``prompts.jsonl`` into a folder.

    Args:
        workload: Which.
        folder: Where to.
        model: Folder with the model that is both, where none is to be made.

    Raises:
        UserError: A model is to be given, and is not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    if workload.vocabulary:
        tokenizer = _tokenizer(workload.vocabulary)
        for seed, (role, hidden) in enumerate(HIDDEN.items()):
            made = _model(workload, hidden, seed)
            made.save_pretrained(folder / role)
            tokenizer.save_pretrained(folder / role)
        shape = (PROMPTS, PROMPT_TOKENS)
        tokens = torch.randint(2, workload.vocabulary, shape, generator=generator).tolist()
        rows: list[object] = [" ".join(f"t{token}" for token in row) for row in tokens]
    else:
        if model is None or not Path(model).expanduser().is_dir():
            raise UserError("--workloads model: name the folder of a model with --model")
        for role in HIDDEN:
            (folder / role).symlink_to(Path(model).expanduser().resolve())
        numbers = torch.randint(10, 100, (PROMPTS, 2), generator=generator).tolist()
        rows = [[{"role": "user", "content": f"What is {a} + {b}? Show all."}] for a, b in numbers]
    lines = "".join(json.dumps({"prompt": row}) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": END, **{f"t{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def _model(workload: Workload, hidden: int, seed: int) -> Qwen3ForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=workload.vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        model: Qwen3ForCausalLM = Qwen3ForCausalLM(config).float().eval()
        if workload.mean_tokens is not None:
            _let_end(model, 1 / workload.mean_tokens)
    return model


@torch.no_grad()
def _let_end(model: Qwen3ForCausalLM, share: float) -> None:
    """Change a model so that each token is the end with about this probability."""
    embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
    embeddings += PUSH * torch.ones_like(embeddings)
    ids = torch.randint(2, len(embeddings), (64, PROMPT_TOKENS))
    hidden = model.model(input_ids=ids).last_hidden_state.flatten(0, 1)
    common = hidden.mean(dim=0)
    others = (hidden @ head[END + 1 :].T).logsumexp(dim=1).mean()
    wanted = others + torch.tensor(share / (1 - share)).log()
    head[END] = common * wanted / common.square().sum()
