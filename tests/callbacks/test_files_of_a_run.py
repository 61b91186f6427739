"""Which steps and how many completions are written, and which validation is the last one."""

import json

import pytest
from lightning.pytorch import Trainer

from callbacks import RunSummary, SampleWriter
from opd import OPDModule, PromptDataModule
from opd.checkpoints import read_step
from opd.errors import UserError
from opd.metrics_rows import read_metrics

QUIETLY = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_samples_and_validations_of_a_run(fit):
    """Three steps, a validation and a file of samples after every second."""
    often = ["--trainer.val_check_interval", "2", "--samples.every_n_steps", "2"]
    folder = fit("run", *often, "--samples.rollouts", "3", steps=3)
    (samples,) = (folder / "samples").iterdir()
    assert samples.name == "step_000002.jsonl"
    assert len(samples.read_text().splitlines()) == 3

    rows = [row for row in read_metrics(folder / "metrics.csv") if "val/reverse_kl" in row]
    assert [row["step"] for row in rows] == ["0", "2", "3"]  # the last step is validated too
    assert len({row["val/reverse_kl"] for row in rows}) == 3
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("accuracy", "reverse_kl"):
        for moment, row in [("initial", rows[0]), ("final", rows[2])]:
            assert summary[name][moment] == pytest.approx(float(row[f"val/{name}"]), rel=1e-6)
    assert summary["extrapolation"] == []
    assert summary["steps"] == 3


def test_a_run_resumed_from_an_earlier_step_writes_each_step_once(fit):
    """Step 3 is done again: its rows are replaced, and the first validation is kept."""

    def files_of(folder):
        rows = read_metrics(folder / "metrics.csv")
        kept = ("step", "val/", "opd/", "rollout/")
        summary = json.loads((folder / "summary.json").read_text())
        return [
            *({n: v for n, v in row.items() if n.startswith(kept)} for row in rows),
            *(summary[name] for name in ("steps", "accuracy", "reverse_kl")),
        ]

    often = ["--trainer.val_check_interval", "1", "--checkpoint.every_n_train_steps", "1"]
    folder = fit("run", *often, "--checkpoint.save_top_k", "-1", steps=3)
    straight = files_of(folder)
    back = ["--ckpt_path", str(folder / "checkpoints" / "step=000002.ckpt"), "--overwrite", "true"]
    fit("run", *often, *back, steps=3)
    assert files_of(folder) == straight


def test_a_checkpoint_bears_the_name_of_its_own_step(fit):
    """Whenever there was a validation, which logs a step of its own."""
    often = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]
    folder = fit("run", *often, "--trainer.val_check_interval", "2", steps=5)
    paths = [p for p in (folder / "checkpoints").iterdir() if p.name != "last.ckpt"]
    steps = {path.name: read_step(path) for path in paths}
    assert steps == {f"step={step:06d}.ckpt": step for step in range(1, 6)}
    assert read_step(folder / "checkpoints" / "last.ckpt") == 5


def test_the_seconds_of_the_last_validation_are_in_the_summary(vanilla):
    """It comes after the last step has been logged."""
    rows = read_metrics(vanilla / "metrics.csv")
    logged = [float(r["cost/validation_seconds"]) for r in rows if "cost/validation_seconds" in r]
    cost = json.loads((vanilla / "summary.json").read_text())["cost"]
    assert cost["validation_seconds"] > 1.001 * logged[-1]  # logged with eight digits


def test_callbacks_of_python_replace_no_earlier_run(tmp_path):
    """Names of files are the same in every run: each run needs a folder of its own."""
    module = OPDModule("embedded:base", "embedded:teacher", max_new_tokens=4)
    data = PromptDataModule("embedded:train", "embedded:test", batch_size=4, validation_limit=4)

    def trainer(*callbacks, max_steps=1):
        options = {"logger": False, "enable_checkpointing": False, **QUIETLY}
        return Trainer(
            default_root_dir=tmp_path / "run",
            callbacks=list(callbacks),
            max_steps=max_steps,
            **options,
        )

    first = trainer(RunSummary(), SampleWriter(every_n_steps=1))
    first.fit(module, data)
    first.save_checkpoint(tmp_path / "first.ckpt")
    trainer(SampleWriter()).predict(module, data)
    before = contents(tmp_path / "run")
    said = {f"validation/{name}.jsonl" for name in ("step_000000", "step_000001", "teacher")}
    written = {"summary.json", "samples/step_000001.jsonl", "predictions.jsonl", *said}
    assert before.keys() == written
    refused = pytest.raises(UserError, match="is there from an earlier run; move it away")
    for callback in (RunSummary(), SampleWriter(every_n_steps=1)):
        with refused:
            trainer(callback).fit(module, data)
    with refused:
        trainer(SampleWriter()).predict(module, data)
    assert contents(tmp_path / "run") == before
    trainer(RunSummary(), max_steps=2).fit(module, data, ckpt_path=tmp_path / "first.ckpt")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
