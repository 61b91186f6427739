"""Decoding of a batch, token by token: equal prompts are read once, and rows that end leave it.

:class:`Decoding` is what ``generate`` of transformers calls instead of a loop of its own
(``custom_generate``), once it has prepared mask, positions and cache as the model wants them.

Shapes: B completions, U different prompts, P prompt tokens, C completion tokens, V vocabulary.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from opd.randomness import uniform
from opd.rollouts.layers import with_room
from opd.rollouts.rollouts import Sampler
from opd.rollouts.sampling import sample

SHARE = 0.75  # rows that have ended leave when so few are left: to copy the others' cache costs
CHECK_EVERY = {"cpu": 1, "cuda": 16}  # tokens between looks for rows that have ended: a GPU waits
NUMBERS = 64  # positions whose random numbers are made together


class Decoding:
    """Decodes one batch.

    Args:
        prompt_of: Which of the U prompts each completion is of, [B].
        seeds: Of each completion, [B].
        sampler: How to sample.
        progress_seconds: Long rollouts log their progress so often.

    Attributes:
        ids: Token ids, padded after the end, [B, C].
        logprobs: Of each token, under what it was drawn from, float32 [B, C]; anything at padding.
    """

    def __init__(
        self, prompt_of: Tensor, seeds: Tensor, sampler: Sampler, progress_seconds: float
    ) -> None:
        self.prompt_of = prompt_of
        self.seeds = seeds
        self.sampler = sampler
        self.progress_seconds = progress_seconds
        self.next_report = time.monotonic() + progress_seconds
        shape = (len(seeds), sampler.max_new_tokens)
        self.ids = seeds.new_full(shape, sampler.pad_token_id)
        self.logprobs = torch.zeros(shape, device=seeds.device)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Decode, after all that ``generate`` has prepared; returns ``ids``."""
        device, last = self.seeds.device, self.sampler.max_new_tokens - 1
        ends = torch.tensor(self.sampler.eos_token_ids, device=device, dtype=torch.long)
        check_every = CHECK_EVERY.get(device.type, 16)
        batch = _Batch(model, input_ids, kwargs)
        logits = batch.read(self.prompt_of)
        rows = torch.arange(len(self.seeds), device=device)  # those that are still decoded
        ended = torch.zeros_like(rows, dtype=torch.bool)
        for position in range(last + 1):
            if position % NUMBERS == 0:
                coming = torch.arange(position, position + NUMBERS, device=device)
                numbers = uniform(self.seeds[:, None], coming)
            drawn_with = numbers[rows, position % NUMBERS]
            tokens, logprobs = sample(logits, self.sampler, drawn_with)
            tokens = tokens.masked_fill(ended, self.sampler.pad_token_id)
            self.ids[rows, position] = tokens
            self.logprobs[rows, position] = logprobs
            ended |= torch.isin(tokens, ends)
            self._report(position + 1, len(rows))
            if position % check_every == 0 or position == last:
                left = (~ended).nonzero().flatten()
                if position == last or not len(left):
                    break
                if len(left) <= SHARE * len(rows) and batch.can_select:
                    batch.select(left)
                    rows, tokens, ended = rows[left], tokens[left], ended[left]
            logits = batch.extend(tokens)
        self.ids, self.logprobs = self.ids[:, : position + 1], self.logprobs[:, : position + 1]
        return self.ids

    def _report(self, done: int, completions: int) -> None:
        if time.monotonic() > self.next_report:
            from lightning.pytorch.utilities import rank_zero_info  # `opd evaluate` does without

            self.next_report = time.monotonic() + self.progress_seconds
            limit = self.sampler.max_new_tokens
            rank_zero_info(f"rollout: token {done} of at most {limit}, {completions} completions")


class _Batch:
    """Sequences that a model reads, with what ``generate`` keeps of them.

    Args:
        model: Causal language model.
        input_ids: All that has been read or is about to be, [U, P], then [B, P + C].
        kwargs: Cache, mask and the like, as ``generate`` has prepared them.
    """

    def __init__(self, model: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
        self.model = model
        self.input_ids = input_ids
        self.kwargs = kwargs
        if (mask := kwargs.get("attention_mask")) is not None and bool(mask.all()):
            del kwargs["attention_mask"]  # or it would be made anew, [B, 1, 1, P + C], per token
        if isinstance(cache := kwargs.get("past_key_values"), DynamicCache):
            with_room(cache)

    @property
    def can_select(self) -> bool:
        """Whether sequences can leave, or become several: not where state has other shapes."""
        cache = self.kwargs.get("past_key_values")
        return isinstance(cache, DynamicCache) and not any(
            isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers
        )

    def read(self, prompt_of: Tensor) -> Tensor:
        """Read the prompts; returns the logits of the first token of each completion, [B, V]."""
        if not self.can_select:
            self.select(prompt_of)
            return self._forward(is_first_iteration=True)
        logits = self._forward(is_first_iteration=True)
        if len(prompt_of) == len(logits):
            return logits
        self.select(prompt_of)
        return logits[prompt_of]

    def extend(self, tokens: Tensor) -> Tensor:
        """Read one more token of each sequence, [B]; returns the logits of the next, [B, V]."""
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=1)
        new = 1 if self.kwargs.get("use_cache") else None
        return self._forward(next_sequence_length=new)

    def select(self, rows: Tensor) -> None:
        """Keep some sequences, in the order given, each as often as it is named."""
        count = len(self.input_ids)
        for name, value in self.kwargs.items():
            if isinstance(value, DynamicCache):
                if value.get_seq_length():
                    value.batch_select_indices(rows)
            elif isinstance(value, Tensor) and value.ndim:
                along = 0 if value.shape[0] == count else 1  # positions may be [3, B, P]
                if value.ndim > along and value.shape[along] == count:
                    self.kwargs[name] = value.index_select(along, rows)
        self.input_ids = self.input_ids[rows]

    def _forward(self, **how: Any) -> Tensor:
        inputs = self.model.prepare_inputs_for_generation(self.input_ids, **how, **self.kwargs)
        outputs = self.model(**inputs, return_dict=True)
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)
        logits: Tensor = outputs.logits[:, -1]
        return logits
