"""What torchrun, SLURM or Lightning's launcher say of this process, before Lightning starts."""

from __future__ import annotations

import os


def rank() -> int | None:
    """Rank of this process; None if nobody has launched it as one of several."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return None


def world_size() -> int:
    """Number of processes that have been launched together, by what has launched them."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def torchrun_size() -> tuple[int, int] | None:
    """Processes per node and nodes, if torchrun has started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_WORLD_SIZE"])
