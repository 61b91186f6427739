"""Forward passes of causal language models, body and head apart.

Shapes: B sequences, T positions, N selected positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from opd.sharding import forward_pass


def _hidden_states(model: PreTrainedModel, ids: Tensor, mask: Tensor, select: Tensor) -> Tensor:
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    body = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    )
    hidden: Tensor = body.last_hidden_state[select]
    return hidden


def _project(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        logits = F.linear(hidden.float(), head.weight.float(), bias)
    config = model.config.get_text_config()
    if softcap := getattr(config, "final_logit_softcapping", None):
        logits = softcap * torch.tanh(logits / softcap)
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    return logits


@forward_pass
def completion_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, select: Tensor) -> Tensor:
    """Run a causal language model and return float32 logits of the positions asked for.

    The product with the head is done in float32 under any precision plugin: rounding logits to
    bfloat16 before the softmax costs several per cent of the gradient.

    Args:
        model: Causal language model.
        ids: Token ids, [B, T].
        mask: True at tokens, False at padding on either side, [B, T].
        select: Positions to keep, bool [B, T], N of them True.

    Returns:
        Logits, float32, [N, V].
    """
    return _project(model, _hidden_states(model, ids, mask, select))


@forward_pass
def hidden_states(model: PreTrainedModel, ids: Tensor, mask: Tensor, select: Tensor) -> Tensor:
    """Run the body only; returns last hidden states, [N, H], ready for :func:`project`."""
    return _hidden_states(model, ids, mask, select)


@forward_pass
def project(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Project hidden states, [N, H], onto float32 logits, [N, V], as :func:`completion_logits`."""
    return _project(model, hidden)
