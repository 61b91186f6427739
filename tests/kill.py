"""Kill a two-process FSDP2 run with SIGKILL at random, resume it, and compare what comes out.

    python tests/kill.py --rounds 20

Every round is a new run that dies, once or more often: rank 0, rank 1, or all with the launcher; at
a random moment of training and searching, or while a checkpoint is being written. After each death
it is resumed, and in the end it must have the weights, optimizer, anchor and data position of a run
that nobody disturbed.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from conftest import (
    AUTO,
    FSDP2,
    assert_same,
    launch,
    launch_environment,
    load_any,
    torchrun_command,
)

STEPS = 8
OPTIONS = [*FSDP2, *AUTO, "--checkpoint.every_n_train_steps", "2"]
GO_ON = ["--ckpt_path", "last", "--overwrite", "true"]  # anew, if it died before it had saved
PATIENCE = 120  # seconds until a run that does not end counts as hanging


def final_state(folder: Path) -> list:
    checkpoint = load_any(folder)
    parts = ("state_dict", "optimizer_0", "random_state", "global_step")
    loaders = checkpoint["loops"]["fit_loop"]["state_dict"]
    return [*(checkpoint[part] for part in parts), loaders]


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.001)


def read_rows(folder: Path) -> list[str]:
    """Return the rows of metrics.csv, as far as they are written."""
    path = folder / "metrics.csv"
    return path.read_text().splitlines() if path.exists() else []


def workers(launcher: int) -> list[int]:
    """Process ids of the ranks, in order."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    except OSError:  # it is over
        return []
    return [int(pid) for pid in children]


def start(folder: Path) -> subprocess.Popen:
    """Start a run in the background."""
    return subprocess.Popen(
        torchrun_command(2, folder, *OPTIONS, *GO_ON, steps=STEPS),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=launch_environment(),
        start_new_session=True,
    )


def start_and_kill(folder: Path, dice: random.Random, seconds: float) -> str | None:
    """Start a run, or go on with it, and kill it.

    Returns:
        What was done to it; None if it was over before.

    Args:
        folder: Run folder.
        dice: Chooses victim and moment.
        seconds: How long an undisturbed run takes from its first step to its last.
    """
    victim = dice.choice(["rank 0", "rank 1", "all"])
    saving = dice.random() < 1 / 3
    process = start(folder)
    if saving:
        wait_for(lambda: list(folder.glob("checkpoints/*.partial")), process)
        time.sleep(dice.uniform(0, 0.05))
    else:
        begun = len(read_rows(folder))
        wait_for(lambda: len(read_rows(folder)) > begun, process)
        time.sleep(dice.uniform(0, seconds))
    moment = sorted(path.name for path in folder.glob("checkpoints/*"))
    ranks = workers(process.pid)
    if len(ranks) == 2 and victim == "all":
        os.kill(process.pid, signal.SIGKILL)  # or it would report the others' deaths
        for pid in ranks:  # which have a session of their own, and would go on without it
            os.kill(pid, signal.SIGKILL)
    elif len(ranks) == 2:
        os.kill(ranks[int(victim[-1])], signal.SIGKILL)
    if process.wait(timeout=PATIENCE) == 0:  # if one rank is dead, the other must not wait for ever
        return None
    return f"{victim}, {'saving' if saving else 'training or searching'}, with {moment}"


def check(rounds: int, first_seed: int, folder: Path, undisturbed: Path, deaths: int = 1) -> None:
    """Run all rounds.

    Args:
        rounds: Number of runs.
        first_seed: Seed of the first of them.
        folder: Where they go.
        undisturbed: The run to compare with.
        deaths: How often each dies.

    Raises:
        AssertionError: A resumed run ended otherwise than the undisturbed one.
    """
    expected = final_state(undisturbed)
    times = [path.stat().st_mtime for path in undisturbed.glob("*.csv")]
    begun = (undisturbed / "config.yaml").stat().st_mtime
    for seed in range(first_seed, first_seed + rounds):
        run = folder / f"killed_{seed}"
        dice = random.Random(seed)
        for _ in range(deaths):
            while (what := start_and_kill(run, dice, (max(times) - begun) / deaths)) is None:
                shutil.rmtree(run)  # too late: once more, from the beginning
            print(f"seed {seed}: killed {what}", flush=True)
        launch(2, run, *OPTIONS, *GO_ON, steps=STEPS)
        assert_same(final_state(run), expected, f"seed {seed}")
        shutil.rmtree(run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed = launch(2, Path(temporary) / "undisturbed", *OPTIONS, steps=STEPS)
        check(arguments.rounds, arguments.seed, Path(temporary), undisturbed)
    print(f"{arguments.rounds} of {arguments.rounds} resumed runs are bit-identical")
