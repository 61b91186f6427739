"""Own random generators, so that nothing the library draws disturbs anything else."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def derive_seed(*key: int | str) -> int:
    """Hash a key such as ``(seed, step, rank, purpose)`` to a seed in [0, 2**63)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """Return a fresh generator on ``device`` that depends on the key alone."""
    return torch.Generator(device=device).manual_seed(derive_seed(*key))


@contextmanager
def own_randomness(device: torch.device, *key: int | str) -> Iterator[None]:
    """Run a block (dropout) on global random state of its own, and put the old state back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(*key))
        yield


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
        torch.cuda.set_rng_state_all(state["cuda"])
