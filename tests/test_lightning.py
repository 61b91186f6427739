"""Lightning's usual things work as its users know them; what cannot is in ``bad_input.txt``."""

import csv
import logging

import pytest
from conftest import QUICKSTART, QUIET, SHRUNK, assert_same, load, student_of

from opd.cli import main
from opd.metrics_rows import read_metrics

WATCHING = "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val/accuracy"
WORKS = [
    f"{WATCHING} --trainer.callbacks.mode max",
    f"{WATCHING} --trainer.callbacks.mode max {WATCHING} --trainer.callbacks.mode min",
    "--trainer.callbacks+=LearningRateMonitor",
    "--trainer.callbacks+=DeviceStatsMonitor",
    "--trainer.callbacks+=SpikeDetection",
    "--trainer.callbacks+=EMAWeightAveraging",
    "--trainer.callbacks+=ModelSummary",
    "--trainer.callbacks+=Timer --trainer.callbacks.duration 00:01:00:00",
    "--trainer.precision bf16-mixed",
    "--trainer.profiler simple",
    "--trainer.detect_anomaly true",
    "--trainer.deterministic true",
    "--trainer.limit_val_batches 0",
    "--trainer.max_time 00:01:00:00",
    "--trainer.logger false",
]


@pytest.mark.parametrize("options", WORKS)
def test_it_works(fit, options):
    folder = fit("run", *options.split(), steps=2)
    assert load(folder)["global_step"] == 2
    assert (folder / "config.yaml").is_file()
    assert read_metrics(folder / "metrics.csv")[-1]["step"] == "2"


def test_another_logger_has_the_metrics_and_so_has_the_run_folder(fit, tmp_path):
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "logs")]
    folder = fit("run", *logger, steps=2)
    (theirs,) = (tmp_path / "logs").rglob("metrics.csv")
    loss = [row["opd/loss"] for row in csv.DictReader(theirs.open()) if row["opd/loss"]]
    ours = [row["opd/loss"] for row in read_metrics(folder / "metrics.csv") if "opd/loss" in row]
    assert [float(value) for value in loss] == pytest.approx([float(value) for value in ours])
    assert len(ours) == 2


def test_fast_dev_run_takes_a_step_and_leaves_no_run(tmp_path):
    output = ["--output", str(tmp_path / "run"), "--data.validation_limit", "4"]
    fast = ["--trainer.fast_dev_run", "true"]
    assert main(["fit", "--config", QUICKSTART, *SHRUNK, *QUIET, *output, *fast]) == 0
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_a_limit_of_1_is_one_batch_and_of_1_0_all_of_them(tmp_path):
    few = ["--data.validation_limit", "6", "--data.validation_batch_size", "2"]
    for limit, records in [("1", 2), ("1.0", 6)]:
        output = tmp_path / limit
        options = ["--trainer.limit_predict_batches", limit, "--output", str(output)]
        assert main(["predict", "--config", QUICKSTART, *QUIET, *few, *options]) == 0
        assert len((output / "predictions.jsonl").read_text().splitlines()) == records


def test_a_run_advertises_nothing(fit, caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit("run", steps=1)
    said = [record.getMessage() for record in caplog.records]
    assert any("GPU available" in line for line in said)
    assert not any("install" in line for line in said)


def test_what_print_config_prints_is_a_configuration(fit, tmp_path, capsys):
    options = [*SHRUNK, "--data.validation_limit", "16", "--trainer.max_steps", "1"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", QUICKSTART, *options, "--print_config"])
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    again = ["--output", str(tmp_path / "again"), "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(tmp_path / "all.yaml"), *again]) == 0
    student = student_of(load(fit("first", steps=1)))
    assert_same(student_of(load(tmp_path / "again")), student)
