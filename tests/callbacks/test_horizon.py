"""Completions that begin short and grow: how long those of each step are, and nothing else."""

import json

import pytest
from conftest import assert_same, load
from test_step import batch_of, module_of

from callbacks import Horizon
from callbacks.horizon import length_of
from opd.errors import UserError
from opd.metrics_rows import read_metrics
from opd.step import StepRequest, sample

HORIZON = ["--trainer.callbacks+=callbacks.Horizon", "--trainer.callbacks.start", "2"]
GROWS = [*HORIZON, "--trainer.callbacks.steps", "3", "--trainer.callbacks.end", "8"]


def lengths(count: int, *options) -> list[int]:
    return [length_of(t, *options) for t in range(1, count + 1)]


def test_linear_growth_ends_after_so_many_steps():
    assert lengths(7, 10, 30, 5, "linear") == [10, 14, 18, 22, 26, 30, 30]
    assert lengths(4, 3, 4, 2, "linear") == [3, 3, 4, 4]
    assert lengths(3, 5, 5, 9, "linear") == [5, 5, 5]


def test_doublings_are_held_equally_long_and_the_last_one_ends_where_it_should():
    assert lengths(8, 8, 64, 6, "doubling") == [8, 8, 16, 16, 32, 32, 64, 64]
    assert lengths(6, 8, 50, 3, "doubling") == [8, 16, 32, 50, 50, 50]
    assert lengths(3, 8, 64, 1, "doubling") == [8, 64, 64]
    assert lengths(3, 5, 5, 9, "doubling") == [5, 5, 5]


def test_a_completion_that_is_cut_is_the_beginning_of_the_whole_one(tiny):
    module = module_of(tiny)
    whole, same, cut = (sample(module, batch_of(module), 1, limit) for limit in (None, 99, 3))
    assert_same(same.completion_ids, whole.completion_ids)
    assert max(whole.lengths) > 3 == max(cut.lengths)
    assert_same(cut.completion_ids, whole.completion_ids[:, :3])
    assert cut.finished.tolist() == (whole.finished & (whole.lengths <= 3)).tolist()


def longest(folder) -> list[int]:
    rows = [row for row in read_metrics(folder / "metrics.csv") if "rollout/length_max" in row]
    return [int(float(row["rollout/length_max"])) for row in rows]


@pytest.mark.slow
def test_each_step_has_its_length_whether_resumed_or_not_and_validation_the_whole(fit):
    straight = fit("straight", *GROWS, steps=5)
    assert longest(straight) == [2, 4, 6, 8, 8]
    said = (straight / "validation" / "step_000000.jsonl").read_text().splitlines()
    assert max(len(json.loads(line)["completion_ids"]) for line in said) > 8
    fit("resumed", *GROWS, steps=2)
    resumed = fit("resumed", *GROWS, "--ckpt_path", "last", steps=5)
    assert longest(resumed) == [2, 4, 6, 8, 8]
    assert_same(load(resumed)["state_dict"], load(straight)["state_dict"])


def test_without_an_end_it_grows_to_that_of_the_module_and_searches_go_on(fit):
    """EffOPD judges by completions of the step that are held out: short ones, too."""
    effopd = ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.schedule", "every 1"]
    effopd += ["--trainer.callbacks.score", "opd.scores.TeacherKL"]
    effopd += ["--trainer.callbacks.score.rollouts", "held_out"]
    doubling = ["--trainer.callbacks.growth", "doubling", "--trainer.callbacks.steps", "2"]
    limit = ["--model.max_new_tokens", "8"]
    folder = fit("run", *HORIZON, *doubling, *effopd, *limit, steps=3)
    assert longest(folder) == [2, 4, 8]
    searches = json.loads((folder / "summary.json").read_text())["extrapolation"]
    assert [search["step"] for search in searches] == [1, 2, 3]
    assert all(search["candidates"] for search in searches)


@pytest.mark.parametrize("options", [{"start": 0}, {"steps": 0}, {"end": 1}])
def test_nonsense_is_refused(options):
    with pytest.raises(UserError, match="must be at least 1, end at least start"):
        Horizon(**{"start": 2, "steps": 3, **options})


def test_longer_than_the_module_samples_is_refused_and_the_end_is_the_modules(tiny):
    module = module_of(tiny)
    for options in ({"start": 17}, {"start": 2, "end": 17}):
        with pytest.raises(UserError, match=r"at most model\.max_new_tokens=16"):
            Horizon(steps=3, **options).setup(None, module, "fit")
    horizon = Horizon(start=1, steps=3)
    horizon.setup(None, module, "fit")
    assert [horizon.step_request(t) for t in (1, 2, 9)] == [
        StepRequest(max_new_tokens=limit) for limit in (1, 6, 16)
    ]
