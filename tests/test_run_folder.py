"""Nothing of a user's may be lost: what a run deletes and when, what it saves and goes on from."""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import pytest
import torch
from conftest import (
    QUICKSTART,
    QUIET,
    SHRUNK,
    assert_same,
    copy_of,
    launch_environment,
    load,
    run_fit,
    slow_but,
    torchrun_command,
)
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from callbacks import RunCheckpoint
from opd.checkpoints import STUDENT_FILES, find_all, newest_checkpoint, read_step
from opd.cli import main, run_folder
from opd.errors import UserError
from opd.metrics_rows import read_metrics
from opd.rollouts import TransformersEngine

ONE_STEP = ["--data.validation_limit", "8", "--trainer.max_steps", "1"]
OVERWRITE = ["--overwrite", "true"]
MINE = {
    "mine.yaml": "x: 1",
    "labels.json": "{}",
    "table.csv": "a,b",
    "checkpoints/my-model/model.safetensors": "weights",
    "checkpoints/pretrained.ckpt": "of another program",
    "samples/a.wav": "wav",
    "validation/mine.jsonl": "{}",
    "events.out.tfevents.1.host": "of another program",
}


def command(folder, *arguments):
    options = [*SHRUNK, *QUIET, *ONE_STEP, "--output", str(folder)]
    return ["fit", "--config", QUICKSTART, *options, *arguments]


def refusal(capsys, arguments):
    """Run a command that must be refused; returns its line."""
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder with a digest, links with where they point."""
    return {
        str(path.relative_to(folder)): (
            os.readlink(path)
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def put_mine(folder: Path) -> None:
    for name, text in MINE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def steps_of(folder: Path) -> list[int]:
    return [int(row["step"]) for row in read_metrics(folder / "metrics.csv") if "opd/loss" in row]


# --- what may be deleted --------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "overwrite"), [(None, False), (None, True), ("last", False)])
@pytest.mark.parametrize("name", [*MINE, "config.yaml", "metrics.csv", "notes/deep.txt"])
def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path, name, wanted, overwrite):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("step,a\n1,2\n")
    before = contents(tmp_path)
    folder, _ = run_folder.choose(str(tmp_path), [])
    with pytest.raises(UserError, match="holds no run of opd"):
        run_folder.plan(folder, wanted, overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("arguments", [[], OVERWRITE, ["--ckpt_path", "last"]])
def test_the_command_refuses_it_too(tmp_path, capsys, arguments):
    put_mine(tmp_path)
    before = contents(tmp_path)
    assert "holds no run of opd" in refusal(capsys, command(tmp_path, *arguments))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["", "  "])
def test_an_output_without_a_name_is_refused(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "names no folder" in refusal(capsys, command(name, *OVERWRITE))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".", "..", "link"])
def test_the_working_directory_its_parent_and_links_are_no_exceptions(
    tmp_path, capsys, monkeypatch, name
):
    work = tmp_path / "project" / "work"
    put_mine(work)
    (work / "link").symlink_to(work.parent, target_is_directory=True)
    before = contents(tmp_path)
    monkeypatch.chdir(work)
    assert "holds no run of opd" in refusal(capsys, command(name, *OVERWRITE))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("marked", slow_but(True, False))
def test_overwrite_replaces_the_run_and_keeps_what_is_beside_it(vanilla, tmp_path, marked):
    folder = copy_of(vanilla, tmp_path)
    put_mine(folder)
    kept = "checkpoints/copy-that-i-keep.ckpt"
    shutil.copy(folder / "checkpoints" / "step=000002.ckpt", folder / kept)
    (folder / "checkpoints" / "best.ckpt").symlink_to(kept.partition("/")[2])
    if not marked:
        (folder / run_folder.MARKER).unlink()
    before = contents(folder)
    run_fit(folder, *OVERWRITE, steps=1)
    after = contents(folder)
    mine = {*MINE, kept, "checkpoints/best.ckpt"}
    assert {name: after[name] for name in mine} == {name: before[name] for name in mine}
    assert steps_of(folder) == [1]
    gone = {"samples/step_000002.jsonl", "checkpoints/step=000002.ckpt"}
    gone |= {"validation/step_000003.jsonl"}
    assert gone <= set(before)
    assert not gone & set(after)
    assert len(list(folder.glob("events.out.tfevents.*.opd"))) == 1


BAD = {
    "model": ["--model.teacher", "embedded:techer"],
    "no such student": ["--model.student", "/no/such/model"],
    "data": ["--data.train", "/no/such/file.jsonl"],
    "option": ["--model.studnt", "x"],
    "value": ["--data.batch_size", "many"],
    "context": ["--model.max_new_tokens", "500"],
    "precision": ["--trainer.precision", "bf16-true"],
    "trainer": ["--trainer.accelerator", "abacus"],
    "monitor mode": ["--checkpoint.mode", "sideways"],
    "schedule": ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.schedule", "x"],
    "parameters": ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.parameters", "x"],
}


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old") / "run"
    samples = ["--samples.every_n_steps", "1"]
    assert main(command(folder, *samples)) == 0
    return folder


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_run_that_cannot_start_leaves_the_old_one_byte_for_byte(old_run, capsys, bad):
    before = contents(old_run)
    refusal(capsys, command(old_run, *OVERWRITE, *bad))
    assert contents(old_run) == before


def test_a_run_that_fails_in_its_first_step_brings_the_old_one_back(old_run, capsys, tmp_path):
    """EffOPD without answers is only found out by the first search."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "123+456="}\n' * 4)
    search = ["--trainer.callbacks+=callbacks.EffOPD", "--data.train", str(prompts)]
    before = contents(old_run)
    assert "label_free" in refusal(capsys, command(old_run, *OVERWRITE, *search))
    assert contents(old_run) == before


def test_a_run_that_is_killed_in_its_first_step_brings_the_old_one_back(vanilla, tmp_path):
    folder = copy_of(vanilla, tmp_path)
    before = contents(folder)
    run_folder.begin(run_folder.plan(folder, None, overwrite=True))
    assert not (folder / "metrics.csv").exists()
    (folder / "metrics.csv").write_text("step,a\n0,1\n")  # and here it dies
    run_folder.bring_back(folder)
    assert contents(folder) == before


def test_a_file_of_the_user_in_a_sharded_checkpoint_is_kept(vanilla, tmp_path):
    folder = copy_of(vanilla, tmp_path)
    checkpoint = folder / "checkpoints" / "old-step=000009.ckpt"
    checkpoint.mkdir()
    meta = {"student_files": {}, "saved_as": "step=000009.ckpt"}
    torch.save(meta, checkpoint / "meta.pt")
    FileSystemWriter(checkpoint).finish(Metadata({}), [])
    assert checkpoint in run_folder.files(folder)
    (checkpoint / "notes.txt").write_text("mine")
    run_folder.begin(run_folder.plan(folder, None, overwrite=True))
    run_folder.settle(folder)
    assert [p.name for p in folder.rglob("*kept/*")] == ["notes.txt"]
    assert not checkpoint.exists()


def test_overwrite_does_not_delete_what_the_new_run_reads(old_run, capsys):
    before = contents(old_run)
    student = ["--model.student", str(old_run / "checkpoints" / "last.ckpt")]
    assert "which this run reads" in refusal(capsys, command(old_run, *OVERWRITE, *student))
    assert contents(old_run) == before


def test_the_saved_configuration_names_no_folder(old_run):
    """Else to repeat a run from its configuration would replace it."""
    text = (old_run / "config.yaml").read_text()
    assert str(old_run) not in text
    assert "overwrite: false" in text
    assert "ckpt_path: null" in text


def test_predict_evaluate_and_report_replace_nothing_unasked(old_run, capsys, tmp_path):
    predict = ["predict", *command(tmp_path)[1:]]
    (tmp_path / "predictions.jsonl").write_text("mine")
    assert "predictions.jsonl exists" in refusal(capsys, predict)
    assert main([*predict, *OVERWRITE]) == 0
    evaluate = ["evaluate", "--model", "embedded:base", "--tasks", "arithmetic", "--limit", "2"]
    (tmp_path / "results.json").write_text("mine")
    assert "results.json exists" in refusal(capsys, [*evaluate, "--output", str(tmp_path)])
    (tmp_path / "plot.png").write_text("mine")
    for name in ("plot.png", "plot.html", "results.json"):
        refusal(capsys, ["report", str(old_run), "--output", str(tmp_path / name)])
    assert (tmp_path / "plot.png").read_text() == "mine"
    page = ["report", str(old_run), "--output", str(tmp_path / "page.html")]
    assert main(page) == main(page) == 0


# --- what is saved --------------------------------------------------------------------------------


class Measured(LightningModule):
    """A weight that every step moves, and a validation that logs an accuracy."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.automatic_optimization = False
        self.steps = []

    def training_step(self, batch, batch_idx):
        self.optimizers().step()
        self.steps.append(self.trainer.global_step)

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", 1.0 / (1 + self.trainer.global_step))

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=1.0)

    def on_save_checkpoint(self, checkpoint):
        checkpoint[STUDENT_FILES] = {}


def train(folder, steps, ckpt_path=None, **options):
    """Train with our checkpoints as ``opd fit`` configures them; returns the steps it did."""
    defaults = {"filename": "step={step:06d}", "save_on_train_epoch_end": False}
    defaults |= {"auto_insert_metric_name": False, "enable_version_counter": False}
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=[RunCheckpoint(folder, every_n_train_steps=2, **defaults, **options)],
        check_val_every_n_epoch=None,
        val_check_interval=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = torch.utils.data.DataLoader(torch.zeros(9, 1))
    module = Measured()
    trainer.fit(module, batches, batches, ckpt_path=ckpt_path)
    return module.steps


BEST = {"monitor": "val/accuracy", "mode": "max"}
MONITOR = ["--checkpoint.monitor", "val/accuracy", "--checkpoint.mode", "max"]


@pytest.mark.parametrize("options", [{}, BEST, {"save_last": "link"}])
def test_a_run_that_is_not_to_save_its_end_does_not(tmp_path, options):
    """It saves after each second step, so that step 3 is not saved."""
    train(tmp_path, 3, save_end=False, **options)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert read_step(newest) == 2


@pytest.mark.parametrize("save_last", ["link", True, False])
@pytest.mark.parametrize(
    "options",
    [BEST, {"monitor": "val/no_such_metric"}, {**BEST, "save_top_k": 2}, {}]
    + [{"save_top_k": k} for k in (0, -1)],
    ids=["best", "never comes", "best 2", "newest", "none", "all"],
)
def test_the_last_step_is_saved_whatever_is_configured(tmp_path, options, save_last):
    assert train(tmp_path, 3, save_last=save_last, **options) == [1, 2, 3]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert read_step(newest) == 3
    if save_last:
        assert read_step(tmp_path / "last.ckpt") == 3
    assert train(tmp_path, 4, save_last=save_last, **options, ckpt_path=newest) == [4]


@pytest.mark.parametrize(
    "options",
    [[*MONITOR, "--checkpoint.save_last", "true"], []],
    ids=["best", "newest"],
)
def test_a_run_goes_on_from_its_last_step_whatever_is_configured(fit, options):
    every = ["--checkpoint.every_n_train_steps", "2", "--trainer.val_check_interval", "2"]
    folder = fit("run", *every, *options, steps=3)
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert read_step(newest) == 3
    fit("run", *every, *options, "--ckpt_path", "last", steps=4)
    assert steps_of(folder) == [1, 2, 3, 4]


@pytest.mark.parametrize("moved", slow_but(True, False))
def test_a_resumed_run_keeps_as_many_checkpoints_as_an_unbroken_one(fit, tmp_path, moved):
    folder = fit("run", "--checkpoint.every_n_train_steps", "1", steps=1)
    if moved:
        folder = folder.rename(tmp_path / "elsewhere")
    fit(folder.name, "--checkpoint.every_n_train_steps", "2", "--ckpt_path", "last", steps=2)
    assert [path.name for path in find_all(folder / "checkpoints")] == ["step=000002.ckpt"]
    assert read_step(folder / "checkpoints" / "last.ckpt") == 2


def test_the_best_checkpoint_is_the_one_that_was_measured_best(fit):
    """It is kept beside the newest, under the metric of its own weights."""
    name = ["--checkpoint.filename", "{step}-{val/reverse_kl:.5f}"]
    monitor = ["--checkpoint.monitor", "val/reverse_kl", "--checkpoint.every_n_train_steps", "2"]
    rate = ["--model.optimizer.lr", "1e-3", "--trainer.val_check_interval", "2"]
    folder = fit("run", *name, *monitor, *rate, steps=6)
    rows = read_metrics(folder / "metrics.csv")
    measured = {int(r["step"]): float(r["val/reverse_kl"]) for r in rows if "val/reverse_kl" in r}
    del measured[0]
    best = min(measured, key=lambda step: measured[step])
    (path,) = [p for p in (folder / "checkpoints").rglob("*.ckpt") if p.name != "last.ckpt"]
    assert read_step(path) == best
    assert f"{measured[best]:.5f}" in path.name
    assert load(folder)["global_step"] == 6


def test_a_loss_that_is_not_finite_saves_the_step_before_it(tmp_path):
    folder = tmp_path / "run"
    broken = ["--model.optimizer.lr", "1e30", "--trainer.max_steps", "9"]
    never = ["--trainer.val_check_interval", "100", "--checkpoint.every_n_train_steps", "100"]
    assert main([*command(folder, *MONITOR, *never), *broken]) == 2
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert read_step(newest) == steps_of(folder)[-1]


def test_out_of_memory_saves_the_step_before_it_and_names_what_lowers_it(
    tmp_path, capsys, monkeypatch
):
    """A step of rollouts too many: the third one finds no memory."""
    sample, calls = TransformersEngine.__call__, iter(range(100))

    def run_out(engine, prompts, sampler, seeds):
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore text")
        return sample(engine, prompts, sampler, seeds)

    monkeypatch.setattr(TransformersEngine, "__call__", run_out)
    folder = tmp_path / "run"
    line = refusal(capsys, command(folder, "--data.validation", "null", "--trainer.max_steps", "9"))
    for remedy in ("model.micro_batch_tokens", "model.gradient_checkpointing", "batch_size"):
        assert remedy in line
    assert "rollouts" in line
    assert "9 GiB" in line
    assert read_step(folder / "checkpoints" / "last.ckpt") == 2
    monkeypatch.setattr(TransformersEngine, "__call__", sample)
    ends = ["--data.validation", "null", "--trainer.max_steps", "3"]
    assert main([*command(folder, *ends), "--ckpt_path", "last"]) == 0
    assert main([*command(tmp_path / "undisturbed", *ends)]) == 0
    assert_same(load(folder)["state_dict"], load(tmp_path / "undisturbed")["state_dict"])


def test_two_runs_at_once_in_one_folder(tmp_path, capsys):
    """The second is refused, and the folder is free again when the first has ended."""
    folder = tmp_path / "run"
    folder.mkdir()
    first = run_folder.lock(folder)
    assert "another run is writing there" in refusal(capsys, command(folder))
    os.close(first)
    assert main([*command(folder), "--trainer.max_steps", "1"]) == 0


# --- what `last` and others go on from ------------------------------------------------------------


def test_last_finds_names_with_a_slash(fit):
    name = ["--checkpoint.filename", "{step}-{val/accuracy:.3f}"]
    folder = fit("run", *name, steps=1)
    fit("run", *name, "--ckpt_path", "last", steps=2)
    assert steps_of(folder) == [1, 2]


def test_checkpoints_may_be_on_another_disk(vanilla, tmp_path):
    folder = copy_of(vanilla, tmp_path)
    (folder / "checkpoints").rename(tmp_path / "disk")
    (folder / "checkpoints").symlink_to(tmp_path / "disk")
    run_fit(folder, "--ckpt_path", "last", steps=4)
    assert steps_of(folder) == [1, 2, 3, 4]
    run_fit(folder, *OVERWRITE, steps=1)
    assert {p.name for p in (tmp_path / "disk").iterdir()} == {"step=000001.ckpt", "last.ckpt"}


def test_last_goes_by_the_step_not_by_the_time_of_the_file(vanilla, tmp_path):
    folder = copy_of(vanilla, tmp_path)
    (folder / "checkpoints" / "step=000001.ckpt").touch()
    assert newest_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "step=000003.ckpt"


def test_last_does_not_start_anew_over_a_run(vanilla, tmp_path, capsys):
    folder = copy_of(vanilla, tmp_path)
    for path in (folder / "checkpoints").glob("step*.ckpt"):
        path.write_bytes(path.read_bytes()[:-1000])
    before = contents(folder)
    assert "no checkpoint to go on from" in refusal(capsys, command(folder, "--ckpt_path", "last"))
    shutil.rmtree(folder / "checkpoints")
    assert "no checkpoint to go on from" in refusal(capsys, command(folder, "--ckpt_path", "last"))
    assert (folder / "metrics.csv").read_bytes()
    assert contents(folder).items() <= before.items()
    run_fit(folder, "--ckpt_path", "last", *OVERWRITE, steps=1)
    assert steps_of(folder) == [1]


def test_a_checkpoint_of_another_run_does_not_mix_with_the_one_in_the_folder(
    fit, vanilla, searched, capsys
):
    x, y = vanilla, searched
    before = contents(y)
    other = ["--ckpt_path", str(x / "checkpoints" / "last.ckpt")]
    assert "is not of the run in it" in refusal(capsys, command(y, *other))
    assert "not a whole checkpoint" in refusal(capsys, command(y, "--ckpt_path", QUICKSTART))
    assert contents(y) == before
    z = fit("z", *other, steps=4)
    assert steps_of(z) == [4]


def test_an_earlier_checkpoint_of_the_run_is_not_mixed_with_later_ones(vanilla, tmp_path, capsys):
    folder = copy_of(vanilla, tmp_path)
    earlier = ["--ckpt_path", str(folder / "checkpoints" / "step=000001.ckpt")]
    assert "has gone further" in refusal(capsys, command(folder, *earlier))
    run_fit(folder, *earlier, *OVERWRITE, steps=2)
    assert steps_of(folder) == [1, 2]
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.name == "step=000002.ckpt"


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_last_that_finds_nothing_scores_nothing(tmp_path, capsys, subcommand):
    arguments = [subcommand, "--config", QUICKSTART, "--ckpt_path", "last"]
    assert "--ckpt_path last" in refusal(capsys, [*arguments, "--output", str(tmp_path)])


# --- Ctrl-C ---------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str) -> BaseProcess:
    """Start a run without end."""
    endless = ["--trainer.max_steps", "100000", "--trainer.val_check_interval", "100000"]
    return forked.start([*command(folder, *endless), *arguments], folder.parent / "log")


def wait_for(condition, is_running):
    deadline = time.monotonic() + 120
    while not condition():
        assert is_running()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ctrl_c(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)


def rows(folder):
    path = folder / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.exists() else 0


@pytest.mark.parametrize("options", [[], MONITOR], ids=["newest", "monitor"])
def test_ctrl_c_ends_the_step_and_saves_it(tmp_path, options):
    process = start(tmp_path / "run", *options)
    wait_for(lambda: rows(tmp_path / "run") > 4, process.is_alive)
    ctrl_c(process)
    process.join(timeout=60)
    assert process.exitcode == 130
    printed = (tmp_path / "log").read_text().splitlines()
    assert printed[-1] == "opd fit: stopped by Ctrl-C; go on with --ckpt_path last"
    assert load(tmp_path / "run")["global_step"] == steps_of(tmp_path / "run")[-1]


def test_ctrl_c_before_there_is_anything_to_save(tmp_path):
    process = start(tmp_path / "run")
    wait_for((tmp_path / "run").exists, process.is_alive)
    ctrl_c(process)
    process.join(timeout=60)
    assert process.exitcode == 130
    printed = (tmp_path / "log").read_text()
    assert "stopped by Ctrl-C" in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    """The first one waits for a validation that takes for ever."""
    slow = ["--data.validation_limit", "512", "--data.validation_batch_size", "1"]
    process = start(tmp_path / "run", *slow)
    wait_for((tmp_path / "run" / "config.yaml").exists, process.is_alive)
    time.sleep(1)  # the validation begins
    ctrl_c(process)
    time.sleep(0.3)
    ctrl_c(process)
    process.join(timeout=5)
    assert process.exitcode == -signal.SIGINT


@pytest.mark.slow
def test_ctrl_c_under_torchrun(tmp_path):
    """It reaches the launcher alone, which passes it on."""
    process = subprocess.Popen(
        torchrun_command(2, tmp_path / "run", steps=100_000),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=launch_environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: rows(tmp_path / "run") > 3, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=90)[1]
    assert errors.count("stopped by Ctrl-C; go on with --ckpt_path last") == 2
    assert load(tmp_path / "run")["global_step"] == steps_of(tmp_path / "run")[-1]
