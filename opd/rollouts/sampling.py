"""Drawing tokens: one uniform number per completion and token, through the inverse distribution.

Nothing of the size of a batch's logits is made but their exponentials, in place of the logits; and
nothing is sorted unless top_p or top_k ask for it.

Shapes: B completions, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from opd.rollouts.rollouts import Sampler

BLOCK = 512  # tokens whose weights are added up before one of them is looked for


def sample(logits: Tensor, sampler: Sampler, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the next token of each completion.

    Args:
        logits: [B, V]; overwritten.
        sampler: How to sample.
        numbers: Uniform in [0, 1), float64, [B]; all that is random.

    Returns:
        Token ids [B], and their log-probabilities under what they were drawn from, float32 [B].
    """
    logits = logits[:, : sampler.vocabulary].float()
    if sampler.temperature == 0:
        chosen = logits.argmax(dim=1)
        return chosen, _of(logits, chosen) - logits.logsumexp(dim=1)
    if sampler.temperature != 1:
        logits /= sampler.temperature
    if warpers := _warpers(sampler):
        nothing = cast(LongTensor, logits.new_zeros((len(logits), 0), dtype=torch.long))
        logits = warpers(nothing, cast(FloatTensor, logits))
    weights = logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
    chosen, total = draw(weights, numbers)
    return chosen, (_of(weights, chosen) / total).log().float()


def draw(weights: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Draw tokens by the inverse of the cumulated distribution.

    Args:
        weights: Proportional to the probabilities, at least 0, [B, V].
        numbers: Uniform in [0, 1), float64, [B].

    Returns:
        Token ids [B]: never one of weight 0; the last one where weights are not numbers, so that
        what they do to the loss is found, and named, by the step. And the sum of the weights,
        float64, [B].
    """
    size = weights.shape[1]
    if size <= 4 * BLOCK:
        token, _, total = _find(weights, numbers)
        return token, total
    whole = size // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=2)
    if whole < size:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    block, wanted, total = _find(sums, numbers)
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = weights.gather(1, columns.clamp(max=size - 1)).masked_fill(columns >= size, 0.0)
    # A block's sum is rounded: what is wanted of it is told as a share
    share = (wanted / _of(sums, block).double()).clamp(max=1 - 2**-53)
    token, _, _ = _find(inside, share)
    return (block * BLOCK + token).clamp(max=size - 1), total


def _find(weights: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find where the cumulated weights pass a share of their sum.

    Returns:
        Columns [B], never one of weight 0; what is left of the share within them; the sum.
    """
    cumulated = weights.cumsum(dim=1, dtype=torch.float64)
    total = cumulated[:, -1]
    wanted = numbers * total
    found = torch.searchsorted(cumulated, wanted[:, None], right=True).squeeze(1)
    found = found.clamp(max=weights.shape[1] - 1)
    before = _of(cumulated, found) - _of(weights, found).double()
    return found, (wanted - before).clamp(min=0), total


def _of(values: Tensor, columns: Tensor) -> Tensor:
    return values.gather(1, columns[:, None]).squeeze(1)


def _warpers(sampler: Sampler) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if sampler.top_k > 0:
        warpers.append(TopKLogitsWarper(sampler.top_k))
    if sampler.top_p < 1:
        warpers.append(TopPLogitsWarper(sampler.top_p))
    return warpers
