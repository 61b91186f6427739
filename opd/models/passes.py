"""Forward passes of causal language models, body and head apart.

The head's product is done in float32 under any precision plugin: rounding logits to bfloat16 before
the softmax costs several per cent of the gradient.

Shapes: B sequences, T positions, N selected positions, n of those in a tile, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from opd.sharding import forward_pass


@dataclass(frozen=True)
class Head:
    """A model's output head; holds for as long as its parameters are gathered.

    Attributes:
        weight: Float32, [V, H].
        bias: Float32, [V], or None.
        softcap: Logits are squeezed into +-softcap by a tanh; None: they are not.
        scale: Factor of the logits.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, model: PreTrainedModel, vocabulary: int | None = None) -> Head:
        """Take a model's head, or the part of it for the first ``vocabulary`` tokens."""
        head = model.get_output_embeddings()
        config = model.config.get_text_config()
        weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
        if vocabulary is not None and vocabulary < len(weight):  # or backward makes a copy for it
            weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
        return cls(
            weight,
            bias,
            softcap=getattr(config, "final_logit_softcapping", None),
            scale=(getattr(config, "logit_scale", None) or 1.0)
            / (getattr(config, "logits_scaling", None) or 1.0),
        )

    def product(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply hidden states, [n, H], with the weight: [n, V].

        Args:
            hidden: Hidden states.
            out: Where to put it, without gradient; fresh memory of this size is slower than the
                product itself. None: somewhere new.
        """
        if out is None:
            return F.linear(hidden.float(), self.weight, self.bias)
        torch.mm(hidden.float(), self.weight.T, out=out)
        return out if self.bias is None else out.add_(self.bias)

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
    """Run all but the head, within a pass; see :func:`hidden_states`."""
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    inner: Any = model.base_model
    if inner is model:  # where a class does not say under which name it has it (Llama 4)
        inner = model.model
    output = inner(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state[select]
    return hidden


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
