"""Directions to search along that are not W - anchor: controls for EffOPD.

A search along W - anchor (:mod:`opd.extrapolation`) that helps may owe it to the direction, or to
candidates and a good score, which would find something along any line. A random direction of the
same length tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opd.randomness import normal

AT_A_TIME = 2**22  # numbers drawn at a time: each takes some fifty bytes meanwhile


@torch.no_grad()
def random_anchor(
    weights: Sequence[Tensor],
    anchor: Sequence[Tensor],
    seeds: Sequence[int],
    starts: Sequence[int],
    reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Tensor]:
    """Return an anchor that is as far from W in every tensor, but in a random direction.

    The direction's numbers are Gaussian, so that all directions are equally likely, and scaled to
    the norm of W - anchor tensor by tensor: the layers share the length out as they do in W -
    anchor, and what differs is the direction alone. A number depends on its seed and its place in
    the whole tensor only: it is the same however the tensor is sharded.

    Takes a copy of the weights, on the devices of the anchor.

    Args:
        weights: W, perhaps this rank's shards.
        anchor: The anchor, on the same or another device.
        seeds: Of each tensor.
        starts: Where in its whole, flattened tensor each shard begins.
        reduce_sum: Sums a tensor over ranks if they hold shards; called once, then a collective.
    """
    drawn = [_gaussian(*each) for each in zip(weights, seeds, starts, strict=True)]
    squares = [
        [_square(w.double() - a.to(w.device)) for w, a in zip(weights, anchor, strict=True)],
        [_square(direction.double()) for direction in drawn],
    ]
    wanted, found = reduce_sum(torch.stack([torch.stack(part) for part in squares])).sqrt()
    scales = (wanted / found).tolist()
    return [
        torch.sub(w, d, alpha=scale).to(a.device)
        for w, a, d, scale in zip(weights, anchor, drawn, scales, strict=True)
    ]


def _square(tensor: Tensor) -> Tensor:
    return tensor.square().sum()


def _gaussian(weight: Tensor, seed: int, start: int) -> Tensor:
    """Draw a number for each of a shard's, in the dtype of the weights."""
    drawn = torch.empty(weight.numel(), dtype=weight.dtype, device=weight.device)
    for begin in range(0, weight.numel(), AT_A_TIME):
        part = drawn[begin : begin + AT_A_TIME]
        positions = torch.arange(len(part), device=weight.device) + (start + begin)
        part.copy_(normal(seed, positions))
    return drawn.view_as(weight)
