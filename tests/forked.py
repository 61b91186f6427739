"""Ranks of a run as torchrun starts them, but forked from a process that has imported everything.

To import torch, transformers and Lightning takes longer than most runs of the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(  # nothing of ours: each process takes it from where the tests do
    [
        *("lightning.pytorch.cli", "lightning.pytorch.loggers", "torch.utils.tensorboard"),
        *("torch.distributed.fsdp", "torch.distributed.checkpoint", "torchmetrics", "pytest"),
        *("transformers.models.qwen3.modeling_qwen3", "transformers.generation.utils"),
    ]
)


def rank(environment: dict[str, str], arguments: list[str], log: Path, largest_file: int) -> None:
    """What a rank does: the command line, and nothing else."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in the foreground
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    limit = (largest_file, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    from opd.cli import main

    sys.exit(main(arguments))


def start(arguments: list[str], log: Path) -> BaseProcess:
    """Start one process of its own, without a launcher."""
    process = SERVER.Process(target=rank, args=({}, arguments, log, -1), daemon=True)
    process.start()
    return process


def run_ranks(
    processes: int, arguments: list[str], folder: Path, largest_file: int = -1
) -> tuple[list[int], str]:
    """Run a command on several ranks.

    Returns:
        The ranks' exit codes, and what they have printed.

    Args:
        processes: Number of ranks.
        arguments: Of ``opd``.
        folder: For what they print.
        largest_file: Bytes that a file may have, as on a disk that runs full; -1: any.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "GROUP_RANK": "0"}
    common |= {"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    common |= {"GROUP_WORLD_SIZE": "1"}
    logs = [folder / f"rank_{i}.log" for i in range(processes)]
    ranks = []
    for i, log in enumerate(logs):
        environment = {**common, "RANK": str(i), "LOCAL_RANK": str(i)}
        parameters = (environment, arguments, log, largest_file)
        ranks.append(SERVER.Process(target=rank, args=parameters, daemon=True))
        ranks[-1].start()
    deadline = time.monotonic() + 300
    for process in ranks:
        process.join(max(0, deadline - time.monotonic()))
    hanging = [process for process in ranks if process.is_alive()]
    for process in hanging:
        process.kill()
    printed = "".join(log.read_text() for log in logs)
    assert not hanging, f"hangs: {printed[-3000:]}"
    return [process.exitcode or 0 for process in ranks], printed
