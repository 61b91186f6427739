"""An engine that samples from something else than the student is noticed, and a cause named."""

import logging
import re

import pytest
from conftest import load, run_fit

from opd.cli import main
from opd.errors import StoppedBeforeStep, UserError
from opd.rollouts import GapAlarm, GapLimits, Sampler

SAMPLER = Sampler(4)


def check(alarm, *gaps):
    for t, gap in enumerate(gaps, start=1):
        alarm.check(t, gap, SAMPLER)


@pytest.mark.parametrize(
    ("gaps", "cause"),
    [
        ([0.02, 0.3], r"step 2: .* 0\.3 nats .* it was 0\.02 when the run began: new weights"),
        ([0.3], "from the first step on: probably precision"),
        ([0.3, 0.31], "from the first step on: probably precision"),
        ([0.9], "from the first step on: it has another model, other weights"),
    ],
)
def test_a_gap_is_warned_of_once_with_its_cause(gaps, cause, caplog):
    with caplog.at_level(logging.WARNING):
        check(GapAlarm(GapLimits()), *gaps, 0.5)
    (record,) = caplog.records
    assert re.search(cause, record.getMessage())


def test_a_large_gap_stops_before_the_step():
    alarm = GapAlarm(GapLimits(warn=0.1, stop=0.5))
    with pytest.raises(StoppedBeforeStep, match=r"The weights are those of step 1; .* is 0\.5"):
        check(alarm, 0.01, 0.6)


def test_small_gaps_and_limits_that_are_null_say_nothing(caplog):
    check(GapAlarm(GapLimits()), 1e-6, 0.09)
    check(GapAlarm(GapLimits(warn=None, stop=None)), 50.0)
    assert not caplog.records


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 5}])
def test_a_sampler_that_leaves_out_tokens_has_a_gap_of_its_own(options, caplog):
    GapAlarm(GapLimits()).check(1, 3.0, Sampler(4, **options))
    assert not caplog.records


@pytest.mark.parametrize("limits", [{"warn": 0.0}, {"stop": -1.0}, {"stop": float("nan")}])
def test_limits_are_above_0(limits):
    with pytest.raises(UserError, match=f"engine_gap.{next(iter(limits))}="):
        GapLimits(**limits)


def test_weights_that_do_not_reach_the_engine_stop_the_run_which_is_saved(tmp_path, capsys):
    options = ["--model.engine", "probes.StaleEngine", "--model.optimizer.lr", "0.01"]
    folder = tmp_path / "run"
    arguments = ["fit", "--config", "quickstart", *options, "--data.validation_limit", "8"]
    arguments += ["--data.batch_size", "8", "--trainer.max_steps", "20", "--output", str(folder)]
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "new weights do not reach it" in line
    stopped = int(line.partition("step ")[2].partition(":")[0])
    assert 1 < stopped < 20
    assert load(folder)["global_step"] == stopped - 1


def test_another_model_in_the_engine_is_warned_of_from_the_first_step(tmp_path, caplog):
    engine = ["--model.engine", "probes.OtherEngine", "--model.engine.noise", "0.013"]
    run_fit(tmp_path / "run", *engine, steps=2)
    said = [r.getMessage() for r in caplog.records if "engine's log-prob" in r.getMessage()]
    assert len(said) == 1
    assert "step 1:" in said[0]
    assert "from the first step on" in said[0]
