"""Which steps and how many completions are written, and which validation is the last one."""

import json

import pytest

from opd.metrics_csv import read_metrics


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


def test_a_resumed_run_keeps_its_first_validation(fit):
    rows_of = {}
    for name, steps in [("straight", (2,)), ("resumed", (1, 2))]:
        for step in steps:
            resume = ["--ckpt_path", "last"] if step > steps[0] else []
            folder = fit(name, "--trainer.val_check_interval", "1", *resume, steps=step)
        summary = json.loads((folder / "summary.json").read_text())
        rows = read_metrics(folder / "metrics.csv")
        kept = ("val/", "opd/", "rollout/")
        rows_of[name] = [
            {n: v for n, v in row.items() if n == "step" or n.startswith(kept)} for row in rows
        ]
        rows_of[name] += [summary["accuracy"], summary["reverse_kl"], summary["steps"]]
    assert rows_of["resumed"] == rows_of["straight"]
