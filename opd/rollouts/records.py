"""Rollouts as text: verified by their answers, or as JSON records for people and scripts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd.answers import Verifier
from opd.rollouts.rollouts import INSERTED, SAMPLED, Rollouts

RIGHT = "right"  # column: 1 right, 0 wrong, NaN where the prompt has no answer, [B]
UTF8_BYTES = 4  # of a character, and so tokens, at most


def rollout_records(
    rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase, **per_token: Tensor
) -> Iterator[dict[str, Any]]:
    """Turn rollouts into JSON records, one per completion.

    Args:
        rollouts: B completions.
        tokenizer: Decodes prompts and completions; special tokens are kept.
        per_token: Further values per token, [B, C]; their padding is cut off.
    """
    ids, lengths = rollouts.completion_ids.tolist(), rollouts.lengths.tolist()
    finished = rollouts.finished.tolist()
    sampled = rollouts.columns.get(SAMPLED, torch.ones(len(rollouts))).tolist()
    columns = {"engine_logprob": rollouts.engine_logprobs, **per_token}
    if INSERTED in rollouts.columns:
        columns[INSERTED] = rollouts.columns[INSERTED]
    values = {name: tensor.tolist() for name, tensor in columns.items()}
    for i, prompt in enumerate(rollouts.prompts.prompts):
        token_ids = ids[i][: lengths[i]]
        record = {
            "row": prompt.row,
            "data_set": prompt.data_set,
            "prompt": tokenizer.decode(list(prompt.token_ids)),
            "completion": tokenizer.decode(token_ids),
            "answer": prompt.answer,
            "teacher": prompt.teacher,
            "finish_reason": "stop" if finished[i] else "length",
            "prompt_ids": list(prompt.token_ids),
            "completion_ids": token_ids,
            **{
                name: [round(value, 6) for value in value_rows[i][: lengths[i]]]
                for name, value_rows in values.items()
            },
        }
        if not sampled[i]:
            record |= {"finish_reason": "given", "engine_logprob": None}
        yield record


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """Split the text of a completion into what each of its tokens adds to it.

    Some tokens are no text by themselves: a tokenizer drops the space that a first token begins
    with, and a character may be spread over several tokens. So each is decoded with the one before
    it, and a character belongs to the token that completes it; those before it add nothing.
    """
    texts: list[str] = []
    start = told = 0  # tokens from start are decoded; the text of those before told is known
    for i in range(1, len(token_ids) + 1):
        known = tokenizer.decode(list(token_ids[start:told]))
        text = tokenizer.decode(list(token_ids[start:i]))
        assert isinstance(known, str)
        assert isinstance(text, str)
        if text.endswith("\ufffd") and i - told < UTF8_BYTES and i < len(token_ids):
            texts.append("")
        else:
            texts.append(text[len(known) :])
            start, told = told, i
    return texts


def verify(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase, verifier: Verifier) -> Tensor:
    """Check the answers of the prompts that have one: 1 right, 0 wrong, float64.

    Of a conversation, the last turn of the student's is looked at.
    """
    answers = [prompt.answer for prompt in rollouts.prompts.prompts]
    answered = [i for i, answer in enumerate(answers) if answer is not None]
    completions = completion_texts(rollouts.select(answered), tokenizer)
    references = [answer for answer in answers if answer is not None]
    return torch.tensor(verifier.verify(completions, references), dtype=torch.float64)


def completion_texts(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode B completions, of conversations the last turn, without special tokens."""
    bounds = zip(rollouts.last_turns.tolist(), rollouts.lengths.tolist(), strict=True)
    parts = [
        ids[start:end]
        for ids, (start, end) in zip(rollouts.completion_ids.tolist(), bounds, strict=True)
    ]
    return [str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts]


def note_right(rollouts: Rollouts, right: Tensor) -> None:
    """Add the column ``right``, from the verdicts of those prompts that have an answer."""
    answered = torch.tensor([p.answer is not None for p in rollouts.prompts.prompts]).bool()
    column = torch.full((len(rollouts),), math.nan, dtype=right.dtype)
    column[answered] = right
    rollouts.columns[RIGHT] = column.to(rollouts.lengths.device)
