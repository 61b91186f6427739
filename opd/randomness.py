"""Own random numbers, so that nothing the library draws disturbs anything else."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def derive_seed(*key: int | str) -> int:
    """Hash a key such as ``(seed, step, rank, purpose)`` to a seed in [0, 2**63)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return numbers, each a function of its (seed, position) alone: no state, no order.

    A counter-based generator: seed and position are hashed by the finaliser of SplitMix64 (Steele,
    Lea and Flood, OOPSLA 2014).

    Args:
        seeds: int64.
        positions: From 0, int64, of a shape that goes with that of the seeds.

    Returns:
        Uniform in [0, 1), float64 with 53 random bits.
    """
    bits = _mix(seeds + _int64(_GOLDEN_GAMMA) * (positions + 1))
    return _shift_right(bits, 11).double() / 2**53


def normal(seed: int, positions: Tensor) -> Tensor:
    """Return numbers of the standard normal distribution, likewise (Box and Muller, 1958).

    Args:
        seed: In [0, 2**63).
        positions: From 0, int64.

    Returns:
        float64, of the shape of the positions.
    """
    seeds = torch.full_like(positions, seed)
    radius = (-2 * (1 - uniform(seeds, 2 * positions)).log()).sqrt()  # of what is never 0
    return radius * (2 * math.pi * uniform(seeds, 2 * positions + 1)).cos()


_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def _mix(z: Tensor) -> Tensor:
    """Finalise 64 bits; int64 arithmetic wraps around as uint64's does."""
    for shift, factor in [(30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)]:
        z = (z ^ _shift_right(z, shift)) * _int64(factor)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _int64(value: int) -> int:
    """Read the lowest 64 bits of an integer as two's complement."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


@contextmanager
def own_randomness(device: torch.device, *key: int | str) -> Iterator[None]:
    """Run a block (dropout) on global random state of its own, and put the old state back."""
    seed, state = derive_seed(*key), torch.get_rng_state()
    of_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for all devices first
        if of_gpu is not None:
            torch.cuda.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu, device)


def random_state() -> dict[str, Any]:
    """Collect the global random state of Python and torch."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the global random state back."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
