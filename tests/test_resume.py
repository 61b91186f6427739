"""Nothing is lost: kill -9 and resume, resume across an epoch, the same command twice."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
from conftest import AUTO, QUICKSTART, SHRUNK, assert_same, copy_of, load, run_fit, slow_but

from opd.checkpoints import newest_checkpoint
from opd.cli import main
from opd.metrics_csv import MetricsCSV
from opd.metrics_rows import read_metrics

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


@pytest.fixture(scope="module", params=[SEARCH, AUTO], ids=["powers_of_two", "auto"])
def two_epochs(request, tmp_path_factory):
    """Options of a run of three batches an epoch, and the undisturbed run."""
    folder = tmp_path_factory.mktemp("epochs")
    rows = [{"prompt": f"{100 + i}+{200 + i}=", "answer": f"{300 + 2 * i}"} for i in range(20)]
    prompts = folder / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data.train", str(prompts), *request.param]
    return options, run_fit(folder / "run", *options, steps=6)


@pytest.mark.parametrize("stop", slow_but(3, 2, 4))
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
    searches = [
        [{name: value for name, value in search.items() if name != "seconds"} for search in found]
        for found in (ours["extrapolation"], theirs["extrapolation"])
    ]
    assert searches[0] == searches[1]
    assert searches[0][0]["step"] == 1 < len(searches[0])
    if AUTO[1] in options:
        assert theirs["extrapolation"][-1]["learning_rate_factor"] not in (0, 1)


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


# --- resumed with other options ---

COSINE = "torch.optim.lr_scheduler.CosineAnnealingLR"


def rates(folder):
    rows = read_metrics(folder / "metrics.csv")
    return [float(row["optim/lr"]) for row in rows if row.get("optim/lr")]


def test_a_resumed_run_takes_the_options_it_is_given(fit, caplog):
    fit("run", "--model.optimizer.lr", "1e-3", steps=2)
    decay = ["--model.optimizer.lr", "1e-4", "--model.optimizer.weight_decay", "0.5"]
    folder = fit("run", *decay, "--ckpt_path", "last", steps=3)
    assert "lr 0.001 -> 0.0001; weight_decay 0.0 -> 0.5" in caplog.text
    assert rates(folder) == pytest.approx([1e-3, 1e-3, 1e-4])
    assert load(folder)["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.5
    moments = load(folder)["optimizer_states"][0]["state"][0]
    assert moments["step"] == 3  # which the checkpoint has brought


def test_a_resumed_run_says_which_options_are_others(fit, caplog):
    fit("run", steps=1)
    fit("run", "--ckpt_path", "last", steps=2)
    assert "other options" not in caplog.text
    others = ["--model.temperature", "0.5", "--samples.rollouts", "3"]
    fit("run", "--ckpt_path", "last", *others, steps=3)
    (said,) = [r.getMessage() for r in caplog.records if "other options" in r.getMessage()]
    assert "model.temperature 1.0 -> 0.5" in said
    assert "samples.rollouts 16 -> 3" in said
    assert said.count(" -> ") == 2


@pytest.mark.parametrize("before", [2, 4, None])
def test_a_schedule_is_that_of_the_configuration_whatever_the_checkpoint_had(fit, before):
    """Closed form: lr (1 + cos(pi t / T)) / 2 after t steps."""
    cosine = ["--model.scheduler", COSINE, "--model.scheduler.T_max"]
    fit("run", *([*cosine, str(before)] if before else []), steps=2)
    folder = fit("run", *cosine, "4", "--ckpt_path", "last", steps=4)
    first = rates(folder)[0]
    expected = [first * (1 + math.cos(math.pi * t / 4)) / 2 for t in (2, 3)]
    assert rates(folder)[2:] == pytest.approx(expected, rel=1e-6)


def test_another_optimizer_or_student_cannot_go_on(fit, tiny, capsys):
    last = ["--ckpt_path", str(fit("run", steps=1) / "checkpoints" / "last.ckpt")]
    sgd = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1e-3"]
    llama = ["--model.student", str(tiny / "llama-student")]
    llama += ["--model.teacher", str(tiny / "llama-teacher")]
    for options, said in [(sgd, "AdamW, and model.optimizer is SGD"), (llama, "another student")]:
        output = ["--output", str(tiny / "elsewhere"), "--model.max_new_tokens", "4"]
        assert main(["fit", "--config", QUICKSTART, *SHRUNK, *output, *options, *last]) == 2
        assert said in capsys.readouterr().err


# --- resumed on other prompts ---

SHOWN = ["--samples.every_n_steps", "1", "--samples.rollouts", "99", "--data.validation", "null"]


def rows_by_step(folder):
    files = sorted(folder.glob("samples/*.jsonl"))
    return [{json.loads(line)["row"] for line in file.read_text().splitlines()} for file in files]


def test_a_run_resumed_with_another_batch_size_has_every_prompt_once_an_epoch(fit, two_epochs):
    """Twenty prompts: five, five, and then six at a time, until Lightning has ended two epochs."""
    options = [*two_epochs[0][:2], *SHOWN]
    fit("run", *options, "--data.batch_size", "5", steps=2)
    run = fit("run", *options, "--data.batch_size", "6", "--ckpt_path", "last", steps=8)
    steps = rows_by_step(run)
    assert [len(rows) for rows in steps] == [5, 5, 6, 4, 6, 6, 6, 2]
    for epoch in (steps[:4], steps[4:]):
        assert set().union(*epoch) == set(range(20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data.train", "embedded:test"], "there were 20 and are"),
        (["--seed_everything", "5"], "seed_everything was 0 and is 5"),
    ],
)
def test_a_run_is_not_resumed_on_other_prompts(fit, two_epochs, capsys, change, message):
    options = [*two_epochs[0][:2], *SHOWN]
    run = fit("run", *options, steps=1)
    before = (run / "config.yaml").read_text()
    arguments = [*options, *change, "--ckpt_path", "last", "--output", str(run)]
    assert main(["fit", "--config", QUICKSTART, "--trainer.max_steps", "2", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "go on with the same data" in error
    assert (run / "config.yaml").read_text() == before
