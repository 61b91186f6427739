"""Nothing is lost: kill -9 and resume, resume across an epoch, the same command twice."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import QUICKSTART, SHRUNK, assert_same, copy_of, load, run_fit

from opd.checkpoints import newest_checkpoint
from opd.metrics_csv import MetricsCSV, read_metrics

SEARCH = [
    "--trainer.callbacks+=callbacks.EffOPD",
    "--trainer.callbacks.score",
    "opd.scores.TeacherKL",
]
SAVE = ["--checkpoint.every_n_train_steps", "2"]


def trained(folder):
    """What must be equal: weights, optimizer, EffOPD's anchor, data position, random state."""
    checkpoint = load(folder)
    parts = [checkpoint[key] for key in ("state_dict", "optimizer_states", "random_state")]
    assert "effopd_anchor.student/model/norm/weight" in checkpoint["state_dict"]
    return [*parts, checkpoint["loops"]["fit_loop"]["state_dict"]]


def test_the_same_command_twice_gives_the_same_weights(fit):
    first, again = (trained(fit(name, *SEARCH, steps=3)) for name in ("first", "again"))
    assert_same(first, again)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """Options of a run of three batches an epoch, and the undisturbed run."""
    folder = tmp_path_factory.mktemp("epochs")
    rows = [{"prompt": f"{100 + i}+{200 + i}=", "answer": f"{300 + 2 * i}"} for i in range(20)]
    prompts = folder / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data.train", str(prompts), *SEARCH]
    return options, run_fit(folder / "run", *options, steps=6)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resume_continues_bit_identically_across_epochs(fit, two_epochs, stop):
    """Three batches an epoch, stopped within one, at its end, and within the next."""
    options, straight = two_epochs
    fit("resumed", *options, steps=stop)
    resumed = fit("resumed", *options, "--ckpt_path", "last", steps=6)
    assert_same(trained(resumed), trained(straight))
    rows = [int(row["step"]) for row in read_metrics(resumed / "metrics.csv") if "opd/loss" in row]
    assert rows == [1, 2, 3, 4, 5, 6]
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (resumed, straight))
    for part in ("steps", "accuracy", "reverse_kl"):
        assert ours[part] == theirs[part]
    assert ours["cost"]["rollout_tokens"] == theirs["cost"]["rollout_tokens"]
    steps = [search["step"] for search in ours["extrapolation"]]
    assert steps == [1, 2, 4]


def test_kill_9_and_resume_gives_the_weights_of_the_undisturbed_run(fit, tmp_path):
    undisturbed = fit("undisturbed", *SEARCH, *SAVE, steps=6)
    folder = tmp_path / "killed"
    options = [
        "--data.validation_limit",
        "16",
        "--output",
        str(folder),
        "--trainer.max_steps",
        "1000000",
    ]
    command = [sys.executable, "-m", "opd.cli", "fit", "--config", QUICKSTART]
    process = subprocess.Popen(
        [*command, *SHRUNK, *options, *SEARCH, *SAVE],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "step=000004.ckpt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = newest_checkpoint(folder / "checkpoints")
    assert saved is not None
    step = int(saved.stem.partition("=")[2])
    if step > 6:
        pytest.fail(f"killed too late: step {step}")
    resumed = fit("killed", *SEARCH, *SAVE, "--ckpt_path", "last", steps=6)
    assert_same(trained(resumed), trained(undisturbed))


def test_a_half_written_checkpoint_is_named_and_passed_over(vanilla, tmp_path, caplog):
    folder = copy_of(vanilla, tmp_path)
    whole = folder / "checkpoints" / "step=000003.ckpt"
    half = folder / "checkpoints" / "step=000004.ckpt"
    half.write_bytes(whole.read_bytes()[:-1000])
    assert newest_checkpoint(folder / "checkpoints") == whole
    assert "step=000004.ckpt is passed over: the file is cut short" in caplog.text


def test_resuming_a_run_that_has_not_saved_yet_starts_anew(fit, caplog):
    folder = fit("run", "--ckpt_path", "last", steps=1)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    assert "starting anew" in caplog.text


def test_checkpoints_hold_no_teacher(vanilla):
    state = load(vanilla)["state_dict"]
    assert all(name.startswith("student.") for name in state)
    assert sum(tensor.numel() for tensor in state.values()) == 792_448


def test_metrics_csv_keeps_rows_and_replaces_what_a_resume_does_again(tmp_path):
    first = MetricsCSV(tmp_path)
    for step in range(4):
        first.log_metrics({"a": float(step)}, step)
    first.log_metrics({"b": 0.5}, 3)
    resumed = MetricsCSV(tmp_path)
    resumed.log_metrics({"a": 20.0, "c": 1.0}, 2)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows == [
        {"step": "0", "a": "0"},
        {"step": "1", "a": "1"},
        {"step": "2", "a": "20", "c": "1"},
    ]
