"""Forward passes of causal language models, body and head apart.

A head's logits are float32 under any precision: rounding them to bfloat16 before the softmax costs
several per cent of the gradient. On a GPU that computes in bfloat16, what is multiplied is rounded,
and what comes out of the product is not.

Shapes: B sequences, T positions, N selected positions, n of those in a tile, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd.models.adapters import effective_weight
from opd.sharding import forward_pass

PACKED = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
PARTS = 8  # of a head's gradient, made one after the other where it cannot be added in place


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off within."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply two matrices of the same dtype; the result is float32, and never rounded to less.

    Args:
        a: [n, k].
        b: [k, m].
        out: Where to put it, [n, m], without gradient; fresh memory of this size can be slower than
            the product itself. None: somewhere new.
    """
    if a.is_cuda and a.dtype != torch.float32:
        found = torch.mm(a, b, out_dtype=torch.float32)
        return found if out is None else out.copy_(found)
    return torch.mm(a.float(), b.float(), out=out)


def product_dtype(model: PreTrainedModel) -> torch.dtype:
    """What a head is multiplied in: on a GPU what the model computes in, float32 elsewhere."""
    weight = model.get_output_embeddings().weight
    if weight.device.type != "cuda":
        return torch.float32
    autocast = torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if autocast else weight.dtype


@dataclass(frozen=True)
class Head:
    """A model's output head; holds for as long as its parameters are gathered.

    Attributes:
        weight: Of the model, [V, H].
        bias: Float32, [V], or None.
        softcap: Logits are squeezed into +-softcap by a tanh; None: they are not.
        scale: Factor of the logits.
        factor: The weight in the dtype of products, [V, H]; None: it is that.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    factor: Tensor | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        vocabulary: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Head:
        """Take a model's head, or the part of it for the first ``vocabulary`` tokens.

        Args:
            model: Causal language model.
            vocabulary: None: all tokens.
            dtype: Of what is multiplied.
        """
        head = model.get_output_embeddings()
        config = model.config.get_text_config()
        weight, bias = effective_weight(head), None if head.bias is None else head.bias.float()
        if vocabulary is not None and vocabulary < len(weight):  # or backward makes a copy for it
            weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
        return cls(
            weight,
            bias,
            softcap=getattr(config, "final_logit_softcapping", None),
            scale=(getattr(config, "logit_scale", None) or 1.0)
            / (getattr(config, "logits_scaling", None) or 1.0),
            factor=None if weight.dtype == dtype else weight.detach().to(dtype),
        )

    @property
    def multiplied(self) -> Tensor:
        """What hidden states are multiplied with, [V, H]."""
        return self.weight if self.factor is None else self.factor

    def product(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply hidden states, [n, H], with the weight: float32 [n, V]; see :func:`multiply`."""
        weight = self.multiplied
        product = multiply(hidden.to(weight.dtype), weight.T, out)
        return product if self.bias is None else product.add_(self.bias)

    def by_hidden(self, gradient: Tensor, out: Tensor) -> None:
        """Put the gradient by hidden states, [n, H], given that by products, [n, V]."""
        weight = self.multiplied
        multiply(gradient.to(weight.dtype), weight, out)

    def add_by_weight(self, gradient: Tensor, hidden: Tensor, total: Tensor) -> None:
        """Add the gradient by the weight to its float32 sum, [V, H], given that by products."""
        dtype = self.multiplied.dtype
        if dtype == torch.float32:
            total.addmm_(gradient.T, hidden.float())
            return
        rounded, hidden = gradient.to(dtype), hidden.to(dtype)
        for some in torch.arange(len(total)).chunk(PARTS):  # a product of that size is as large
            rows = slice(int(some[0]), int(some[-1]) + 1)
            total[rows] += multiply(rounded[:, rows].T, hidden)

    def finish(self, product: Tensor) -> Tensor:
        """Turn products into logits, [n, V]."""
        if self.softcap is not None:
            product = self.softcap * torch.tanh(product / self.softcap)
        return product if self.scale == 1.0 else product * self.scale

    def slope(self, product: Tensor, by_logits: Tensor, temperature: float) -> None:
        """Put the gradient by products in their place, [n, V], given that by logits / T."""
        if self.softcap is not None:
            by_logits = by_logits * (1 - torch.tanh(product / self.softcap).square())
        torch.mul(by_logits, self.scale / temperature, out=product)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Turn hidden states, [n, H], into float32 logits, [n, V]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.finish(self.product(hidden))


class Buffer:
    """Memory for products of a head, used again and again."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, hidden: Tensor, size: int) -> Tensor:
        """Return room for [n, size] float32 numbers, where ``hidden`` [n, H] is."""
        if self._memory.numel() < len(hidden) * size:
            self._memory = torch.empty(len(hidden) * size, device=hidden.device)
        return self._memory[: len(hidden) * size].view(len(hidden), size)


def body(model: PreTrainedModel, ids: Tensor, mask: Tensor, select: Tensor) -> Tensor:
    """Run all but the head, within a pass; see :func:`hidden_states`.

    Where attention takes sequences of unequal length one after the other, nothing is computed for
    padding.
    """
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    inner: Any = model.base_model
    if inner is model:  # where a class does not say under which name it has it (Llama 4)
        inner = model.model
    if _takes_packed(model):
        packed = {"input_ids": ids[mask][None], "position_ids": positions[mask][None]}
        of_tokens: Tensor = inner(**packed, use_cache=False).last_hidden_state[0]
        return of_tokens[select[mask]]
    output = inner(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state[select]
    return hidden


def _takes_packed(model: PreTrainedModel) -> bool:
    """Whether attention tells sequences apart by positions that begin anew, and all layers do."""
    config: Any = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return config._attn_implementation in PACKED and kinds <= {
        "full_attention",
        "sliding_attention",
    }


@forward_pass
def hidden_states(model: PreTrainedModel, ids: Tensor, mask: Tensor, select: Tensor) -> Tensor:
    """Run a model's body and return the last hidden states of the positions asked for.

    Args:
        model: Causal language model.
        ids: Token ids, [B, T].
        mask: True at tokens, False at padding on either side, [B, T].
        select: Positions to keep, bool [B, T], N of them True.

    Returns:
        [N, H].
    """
    return body(model, ids, mask, select)


@forward_pass
def completion_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, select: Tensor) -> Tensor:
    """Run body and head on the positions asked for; returns float32 logits, [N, V]."""
    return Head.of(model)(body(model, ids, mask, select))
