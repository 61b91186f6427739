"""How a model's layers run while a batch is decoded token by token: the same numbers, sooner.

A token of a small batch costs what it takes to read the weights and the cache. transformers copies
the whole cache for each token, once to append to it and once more for grouped-query attention under
a mask; and on a CPU, torch packs weights anew for each product.

Shapes: B sequences, K key-value heads, G query heads of each, T positions, D head size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opd.sharding import is_sharded

GROWTH = 1.5  # of a cache that is full
LEAST_TOKENS = 16  # to be decoded, for it to pay to pack weights
LEAST_NUMBERS = 2**16  # of a weight: smaller ones stay in a processor's cache


@contextlib.contextmanager
def decoding(model: nn.Module, rows: int, tokens: int) -> Iterator[None]:
    """Decode up to ``tokens`` tokens of ``rows`` sequences within; no weight changes meanwhile."""
    AttentionInterface.register("sdpa", _attend)
    try:
        with _packed(model, rows) if tokens >= LEAST_TOKENS else contextlib.nullcontext():
            yield
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)


# --- weights --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _packed(model: nn.Module, rows: int) -> Iterator[None]:
    """Let large linear layers on a CPU multiply with copies of their weights, packed by oneDNN."""
    packed: list[nn.Linear] = []
    try:
        if torch.backends.mkldnn.is_available() and not is_sharded(model):
            for layer in model.modules():
                if type(layer) is nn.Linear and _is_large(layer.weight):
                    layer.forward = _product(layer, rows)  # type: ignore[method-assign, assignment]
                    packed.append(layer)
        yield
    finally:
        for layer in packed:
            del layer.forward


def _is_large(weight: Tensor) -> bool:
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.numel() >= LEAST_NUMBERS


def _product(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a layer on its weight packed for so many rows."""
    ops: Any = torch.ops.mkldnn  # what torch.compile uses on a CPU
    weight, bias = ops._reorder_linear_weight(layer.weight.detach(), rows), layer.bias
    return lambda hidden: ops._linear_pointwise(hidden, weight, bias, "none", [], "")


# --- attention ------------------------------------------------------------------------------------


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers does with sdpa; the G queries of one token and head are a sequence.

    Args:
        module: The attention layer.
        query: [B, K G, T, D].
        key: [B, K, T, D].
        value: [B, K, T, D].
        attention_mask: True where to look, [B, 1, 1, T], or None.
        dropout: None is left while decoding.
        scaling: Of the products.
        kwargs: What else layers hand over.

    Returns:
        [B, T, K G, D], and no weights.
    """
    if "cache" in kwargs:
        return _attend_pages(module, query, key, value, attention_mask, scaling, **kwargs), None
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    masked_alike = attention_mask is None or attention_mask.shape[1] == 1
    biased = kwargs.get("position_bias") is not None
    if length > 1 or groups == 1 or biased or not masked_alike:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    grouped = query.view(batch, key.shape[1], groups, size)
    found = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return found.reshape(batch, 1, heads, value.shape[-1]), None


def _attend_pages(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    cache: Any,
    **kwargs: Any,
) -> Tensor:
    """Attend where sequences of unequal length stand one behind the other, each to itself alone.

    transformers attends over all of them at once, under a mask that hides the others: what that
    costs grows with the square of their number.

    Args:
        module: The attention layer.
        query: Of the new tokens of all sequences, [1, K G, T, D].
        key: Of the same tokens, [1, K, T, D].
        value: [1, K, T, D].
        attention_mask: Added to products with all S tokens, new or not, [1, 1, T or more, S or
            more].
        scaling: Of the products.
        cache: Pages of keys and values.
        kwargs: Where they are, and where each sequence ends among the T and the S.

    Returns:
        [1, T, K G, D].
    """
    assert attention_mask is not None
    assert kwargs.get("position_bias") is None
    # Under autocast, a model of float32 weights computes in another dtype than it has
    key, value = key.to(cache.dtype), value.to(cache.dtype)
    key, value = cache.update(key, value, module.layer_idx, kwargs)  # now [1, K, S, D]
    key, value = key.to(query.dtype), value.to(query.dtype)
    ends = [kwargs[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    found = []
    for new, seen in zip(*map(itertools.pairwise, ends), strict=True):
        t, s = slice(*new), slice(*seen)
        mask = attention_mask[:, :, t, s]
        attended = _attend(
            module, query[:, :, t], key[:, :, s], value[:, :, s], mask, scaling=scaling
        )
        found.append(attended[0])
    return torch.cat(found, dim=1)


# --- cache ----------------------------------------------------------------------------------------


class GrowingLayer(DynamicLayer):
    """A layer's cache with room for more: what is there is copied when it is full only."""

    _room: tuple[Tensor, Tensor] | None = None  # [B, K, more than T, D]
    _filled: tuple[Tensor, Tensor] | None = None  # the part of it that was last handed out

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, [B, K, T, D]; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        length = before + key_states.shape[-2]
        ours = self._filled is not None and self._filled[0] is self.keys  # and no selection of it
        if not ours or self._room is None or self._room[0].shape[2] < length:
            self._room = (
                self._copied(key_states, self.keys),
                self._copied(value_states, self.values),
            )
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, before:length] = new
        keys, values = (room[:, :, :length] for room in self._room)
        self.keys, self.values = self._filled = keys, values
        return keys, values

    def _copied(self, new: Tensor, old: Any) -> Tensor:
        """Make room for what is there and as much as comes, and half of that again."""
        before = self.get_seq_length()
        room = int((before + new.shape[2]) * GROWTH) + LEAST_TOKENS
        copy = new.new_empty(*new.shape[:2], room, new.shape[3])
        if before:
            copy[:, :, :before] = old
        return copy


def with_room(cache: DynamicCache) -> None:
    """Let the plain layers of an empty cache grow without a copy for each token."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer
        for layer in cache.layers
    ]
