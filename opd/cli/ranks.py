"""What torchrun, SLURM or Lightning's launcher say of this process, before Lightning starts."""

from __future__ import annotations

import os

INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which Lightning starts the ranks


def name() -> str | None:
    """Say which of several processes this is; None for the first of them, or the only one."""
    if "RANK" in os.environ:
        found = f"rank {os.environ['RANK']}"
    elif "LOCAL_RANK" in os.environ or "NODE_RANK" in os.environ:
        node, local = os.environ.get("NODE_RANK", "0"), os.environ.get("LOCAL_RANK", "0")
        found = f"rank {local}" if node == "0" else f"node {node}, rank {local} there"
    else:
        found = f"rank {os.environ.get('SLURM_PROCID', '0')}"
    return None if found == "rank 0" else found


def world_size() -> int:
    """Number of processes that have been launched together, by what has launched them."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    started_by_slurm = os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE
    return int(os.environ.get("SLURM_NTASKS", "1")) if started_by_slurm else 1


def torchrun_size() -> tuple[int, int] | None:
    """Processes per node and nodes, if torchrun has started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_WORLD_SIZE"])
