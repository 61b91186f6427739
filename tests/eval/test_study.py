"""opd study: what it runs, what it makes of hand-made runs, and a small study in earnest."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import hand_made
import numpy as np
import pytest
import yaml
from conftest import QUICKSTART, ROOT, SHRUNK
from hand_made import fails_at_once, write_run

from eval.runs import Point, Run
from eval.study import figures
from eval.study.command import study
from eval.study.grid import Trial
from eval.study.outcomes import (
    Bounds,
    Median,
    comparisons,
    grouped,
    mean_over_steps,
    median,
    outcome_of,
    ratio,
)
from eval.study.results import Study, cell, page, tables
from eval.study.trials import run_all
from opd.cli import main
from opd.errors import UserError
from opd.objectives import GeneralizedJSD

LINE_SEARCH = str(ROOT / "configs" / "effopd" / "line_search.yaml")
README = ROOT / "README.md"
PAPER = str(ROOT / "configs" / "effopd" / "paper.yaml")


def write_trial(folder: Path, reached: int | None, final: float, search_seconds: float) -> None:
    """A trial that goes on for ten steps after it is there; 0.5 seconds and 100 tokens a step."""
    end = reached + 10 if reached else 40
    accuracies = [(0, 0.3, 1.0), *([(reached, 0.9, 0.7)] if reached else []), (end, final, 0.5)]
    costs = {
        step: (0.25 * step, 0.125 * step, 0.125 * step, search_seconds, 7.0, 100 * step, 11, 99, 0)
        for step in range(1, end + 1)
    }
    write_run(folder, accuracies, costs, [])


class HandMade:
    """Stands for the command line: a trial's folder is written at once; remembers what it ran."""

    def __init__(self, trials: dict[str, list] | None = None) -> None:
        self.trials = trials or {}
        self.ran: dict[str, list[str]] = {}

    def __call__(self, command: list[str]) -> int:
        folder = Path(command[command.index("--output") + 1])
        name, _, seed = folder.name.partition("_seed")
        self.ran[folder.name] = command
        shutil.rmtree(folder, ignore_errors=True)
        outcomes = self.trials.get(name)
        write_trial(folder, *(outcomes[int(seed)] if outcomes else (10, 0.9, 0.0)))
        return 0


@pytest.fixture
def _in_threads(monkeypatch):
    """Trials run in this process."""
    pool = lambda workers, *_: ThreadPoolExecutor(workers)  # noqa: E731
    monkeypatch.setattr("eval.study.trials.ProcessPoolExecutor", pool)


@pytest.fixture
def _unwritten(monkeypatch):
    """Nothing is made of what was run; pictures take a second."""
    monkeypatch.setattr("eval.study.command.contents", lambda study: {})


# --- what is run ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_in_threads", "_unwritten")
def test_every_method_runs_at_each_point_of_the_grid_with_all_that_is_its_own(tmp_path):
    methods = {
        "vanilla": None,
        "paper": "effopd/paper",
        "both": ["effopd/paper", LINE_SEARCH],
        "prodigy": {"arguments": ["--model.optimizer", "P", "--x", 3], "learning_rates": [1]},
        "jsd": {"configs": "effopd/paper", "arguments": ["--model.objective=J"]},
    }
    opd = HandMade()
    grid = {"--model.temperature": [0.7, 1], "data.x": [None]}
    study(
        *(QUICKSTART, str(tmp_path), methods),
        learning_rates=["1e-4", 1e-3],
        grid=grid,
        seeds=[2],
        arguments=["--model.optimizer", "Q"],
        max_steps=7,
        check_every=3,
        opd=opd,
    )
    assert len(opd.ran) == (4 * 2 + 1) * 2
    common = ["--trainer.max_steps", "7", "--trainer.val_check_interval", "3"]
    for name, configs, arguments, rate in [
        ("vanilla", [], [], "0.0001"),
        ("paper", [PAPER], [], "0.001"),
        ("both", [PAPER, LINE_SEARCH], [], "0.0001"),
        ("prodigy", [], ["--model.optimizer", "P", "--x", "3"], "1.0"),
        ("jsd", [PAPER], ["--model.objective=J"], "0.001"),
    ]:
        command = opd.ran[f"{name}_model.temperature=0.7_data.x=null_lr{rate}_seed2"]
        stacked = [word for config in [QUICKSTART, *configs] for word in ("--config", config)]
        assert command[: len(stacked) + 1] == ["fit", *stacked]
        own = ["--model.optimizer", "Q", *arguments]  # the study's, the method's, the trial's
        own += ["--model.temperature", "0.7", "--data.x", "null"]
        own += ["--model.optimizer.lr", rate, "--seed_everything", "2", *common]
        at = command.index("--model.optimizer")
        assert command[at : at + len(own)] == own


@pytest.mark.usefixtures("_in_threads", "_unwritten")
@pytest.mark.parametrize("stop", [True, False])
def test_a_run_stops_at_the_target_only_if_it_is_to(tmp_path, stop):
    opd = HandMade()
    study(QUICKSTART, str(tmp_path), {"a": None}, {}, [1e-3], stop_at_target=stop, opd=opd)
    for command in opd.ran.values():
        stops = [word for word in command if "EarlyStopping" in word or "threshold" in word]
        assert len(stops) == (2 if stop else 0)


@pytest.mark.usefixtures("_in_threads", "_unwritten")
def test_a_study_goes_on_with_trials_of_the_same_settings_only(tmp_path, capsys):
    """Others, also those of a recipe or preset that has been edited, are run again and named."""
    recipe, preset = tmp_path / "recipe.yaml", tmp_path / "preset.yaml"
    recipe.write_text(Path(QUICKSTART).read_text())
    preset.write_text("trainer: {max_epochs: 3}\n")
    opd = HandMade()

    def runs(seeds: list[int], b: object = str(preset), **options) -> list[str]:
        opd.ran.clear()
        methods = {"a": None, "b": b}
        output = str(tmp_path / "study")
        study(str(recipe), output, {}, methods, [1e-3], {}, seeds, target=0.9, opd=opd, **options)
        return sorted(opd.ran)

    assert runs([0]) == ["a_lr0.001_seed0", "b_lr0.001_seed0"]
    assert runs([0]) == []
    assert runs([0, 1]) == ["a_lr0.001_seed1", "b_lr0.001_seed1"]
    capsys.readouterr()
    assert runs([0, 1], max_steps=60) == [f"{n}_lr0.001_seed{s}" for n in "ab" for s in (0, 1)]
    assert (
        "a_lr0.001_seed0: was made with --trainer.max_steps 128, not 60" in capsys.readouterr().out
    )
    preset.write_text("trainer: {max_epochs: 4}\n")
    assert runs([0], max_steps=60) == ["b_lr0.001_seed0"]
    more = {"configs": [str(preset)], "arguments": ["--x", "1"]}
    assert runs([0], more, max_steps=60) == ["b_lr0.001_seed0"]
    recipe.write_text(recipe.read_text() + "# a word\n")
    assert len(runs([0, 1], max_steps=60)) == 4


@pytest.mark.usefixtures("_in_threads", "_unwritten")
def test_the_study_of_the_readme_is_accepted(tmp_path):
    (block,) = re.findall(r"```yaml\n(# my_study.yaml.*?)```", README.read_text(), re.DOTALL)
    opd = HandMade()
    here = {"output": str(tmp_path), "workers": 1}
    study(**{**yaml.safe_load(block), **here}, opd=opd)
    assert len(opd.ran) == (3 + 3 + 1) * 2 * 5
    assert "opd.objectives.GeneralizedJSD" in block
    assert callable(GeneralizedJSD)


ONE = {"vanilla": None}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": {}}, "methods: names none; for vanilla OPD alone: {vanilla: null}"),
        ({"methods": {"a/b": None}}, "methods.a/b: 'a/b' names folders"),
        ({"accelerators": {"vanilla": None}}, "accelerators: vanilla is one of methods too"),
        ({"methods": {"a": "nope"}}, "methods.a nope: there is no such file"),
        ({"methods": {"a": ["effopd/paper", "nope"]}}, "methods.a nope: there is no such file"),
        ({"methods": {"a": 3}}, "methods.a.configs: must be a list, as [a, b], not 3"),
        ({"methods": {"a": [None]}}, "methods.a: None is neither a configuration nor null"),
        (
            {"methods": {"a": {"config": "x"}}},
            "methods.a: 'config' is none of configs, arguments, learning_rates",
        ),
        ({"methods": {"a": {"arguments": "--x 1"}}}, "methods.a.arguments: must be a list, as"),
        (
            {"methods": {"a": {"arguments": ["--output=x"]}}},
            "methods.a.arguments: --output=x is set for every trial; change output instead",
        ),
        ({"methods": {"a": {"learning_rates": 1}}}, "methods.a.learning_rates: must be a list"),
        ({"methods": {"a": {"learning_rates": []}}}, "methods.a.learning_rates: names none"),
        ({"methods": {"a": {"learning_rates": ["fast"]}}}, "learning_rates: fast is no number"),
        ({"methods": {"a": {"learning_rates": [-1]}}}, "learning_rates: -1.0 must be above 0"),
        ({"learning_rates": []}, "learning_rates: names none, nor does methods.vanilla"),
        ({"grid": {"--model.x": 3}}, "grid.model.x: must be a list, as [a, b], not 3"),
        ({"grid": {"--model.x": []}}, "grid.model.x: names none"),
        ({"grid": {"--model.x": [1, 1]}}, "grid.model.x: 1 is there twice"),
        ({"grid": {"seed_everything": [1]}}, "grid: --seed_everything is set for every trial"),
        ({"grid": {"x": ["a/b", "a:b"]}}, "grid: two trials would be called vanilla_x=a-b_lr0.001"),
        ({"baseline": "b"}, "baseline b: is none of the methods vanilla"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_study_can_be_made_of_is_said_before_anything_runs(tmp_path, options, said):
    opd = HandMade()
    given = {"methods": ONE, "learning_rates": [1e-3], **options}
    with pytest.raises(UserError, match=re.escape(said)):
        study(QUICKSTART, str(tmp_path), **given, opd=opd)
    assert not opd.ran
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_after_a_failure_no_trial_begins(tmp_path):
    waiting = {f"trial{i}": ([], []) for i in range(20)}
    with pytest.raises(UserError, match=r"trial\d+ failed \(opd fit: error: it is broken\)"):
        run_all(waiting, tmp_path, 1, 1, fails_at_once, done=0)
    assert len(list(tmp_path.glob("*.log"))) < 10


@pytest.mark.slow
def test_a_study_that_is_killed_leaves_no_trial_behind(tmp_path):
    """Which would still write where the same command, given again, goes on."""
    study = subprocess.Popen([sys.executable, hand_made.__file__, str(tmp_path)])
    found = tmp_path / "process"
    try:
        wait_until(lambda: found.is_file() and found.read_text())
        trial = Path(f"/proc/{found.read_text()}")
        assert trial.is_dir()
    finally:
        study.kill()
        study.wait()
    wait_until(lambda: not trial.is_dir())


def wait_until(holds) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("not within a minute")


# --- costs, medians and ratios --------------------------------------------------------------------


def exactly(*values: float) -> list[Bounds]:
    return [Bounds(value, value) for value in values]


def above(value: float) -> Bounds:
    return Bounds(value, math.inf)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (exactly(30, 10, 20), Bounds(20, 20)),
        (exactly(40, 10, 20, 30), Bounds(25, 25)),
        ([*exactly(20, 10), above(128)], Bounds(20, 20)),  # whatever the third needs
        ([*exactly(20), above(128), above(128)], above(128)),
        ([*exactly(40), above(128)], above(84)),  # midway between 40 and more than 128
        ([*exactly(20, 50), above(30)], Bounds(30, 50)),  # the third may be the middle one
        ([Bounds(0, 9)], Bounds(0, 9)),
    ],
)
def test_the_median_is_known_as_far_as_its_seeds_are(values, expected):
    assert median(values).value == expected


@pytest.mark.parametrize("n", [2, 3, 5, 7, 9, 11])
def test_the_interval_is_that_of_the_bootstrap_in_closed_form(n):
    """Of an odd number, the resampled median is at most the k-th value if most draws are.

    So its distribution is binomial: most of n draws, each of which is among the first k of n values
    with chance k / n. Of two the resampled medians are both values and the middle.
    """
    if n == 2:
        assert median(exactly(10, 30)) == Median(Bounds(20, 20), 10, 30)
        return

    def at_most(k: int) -> float:
        chance = k / n
        return sum(
            math.comb(n, m) * chance**m * (1 - chance) ** (n - m) for m in range(n // 2 + 1, n + 1)
        )

    low = next(k for k in range(1, n + 1) if at_most(k) > 0.025)
    values = exactly(*(k**2 for k in range(n, 0, -1)))
    assert median(values) == Median(
        Bounds(((n + 1) / 2) ** 2, ((n + 1) / 2) ** 2), low**2, (n + 1 - low) ** 2
    )


def test_the_interval_holds_the_median_as_often_as_its_docstring_says():
    """Of 5 seeds it is their range, which misses the median if all are on one side: 2 / 2^5."""
    generator = np.random.default_rng(1)
    found = [median(exactly(*generator.exponential(size=5))) for _ in range(400)]
    held = sum(one.low <= math.log(2) <= one.high for one in found)
    assert held / 400 == pytest.approx(1 - 2 / 2**5, abs=0.03)


def test_one_seed_says_nothing_of_others():
    assert median(exactly(3)) == Median(Bounds(3, 3), None, None)


def test_seeds_that_may_need_any_number_leave_the_interval_open():
    one_of_three = median([*exactly(10, 20), above(40)])
    assert one_of_three == Median(Bounds(20, 20), 10, math.inf)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (*exactly(30, 60), Bounds(0.5, 0.5)),
        (Bounds(2, 6), Bounds(3, 4), Bounds(0.5, 2)),
        (Bounds(30, 30), above(120), Bounds(0, 0.25)),  # the baseline needs more than 120
        (above(120), Bounds(30, 30), above(4)),
        (above(120), above(120), Bounds(0, math.inf)),
        (*exactly(0, 0), Bounds(0, math.inf)),
        (*exactly(0, 4), Bounds(0, 0)),
    ],
)
def test_a_ratio_is_known_as_far_as_both_are(a, b, expected):
    assert ratio(a, b) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Median(Bounds(20, 20), None, None), "20.0"),
        (Median(Bounds(20, 20), 10, 30), "20.0 [10.0, 30.0]"),
        (Median(above(128), 40, math.inf), ">128.0 [40.0, ∞]"),
        (Median(Bounds(0, 0.25), 0, 0.5), "<0.2 [0.0, 0.5]"),
        (Median(Bounds(30, 50), None, None), "30.0 to 50.0"),
        (Median(above(0), 0, math.inf), "? [0.0, ∞]"),
        (None, "-"),
    ],
)
def test_what_is_not_known_exactly_is_written_as_such(value, text):
    assert cell(value, ".1f") == text


def test_the_mean_over_steps_is_the_mean_of_the_curve_read_at_every_moment():
    curve = [(0, 1.0), (2, 3.0), (8, 0.5)]
    moments = (np.arange(80_000) + 0.5) / 10_000
    read = np.interp(moments, *zip(*curve, strict=True)).mean()
    assert mean_over_steps(curve, 8) == pytest.approx(read, rel=1e-6)
    assert mean_over_steps(curve, 8) == pytest.approx((2 * 2 + 6 * 1.75) / 8)
    assert mean_over_steps(curve, 9) is None  # it ended before
    assert mean_over_steps(curve[1:], 8) is None
    assert mean_over_steps([], 8) is None


# --- runs and what is made of them ----------------------------------------------------------------


def run_of(*points: tuple, tokens_known: bool = True) -> Run:
    """A run by (step, accuracy, reverse KL): a second and 10 tokens a step, a quarter searched."""
    made = [
        Point(step, accuracy, kl, float(step), 10.0 * step if tokens_known else None)
        for step, accuracy, kl in points
    ]
    end = points[-1][0]
    seconds = {"rollout_seconds": end / 4, "teacher_seconds": end / 4, "train_seconds": end / 4}
    seconds["search_seconds"] = end / 4
    cost = {**seconds, "rollout_tokens": 8 * end, "search_generated_tokens": 2 * end}
    return Run("run", Path("run"), made, {"steps": end, "cost": cost})


SWINGS = run_of((0, 0.1, 2.0), (4, 0.9, 0.1), (6, 0.8, 0.4), (10, 0.85, 0.3))
TRIAL = Trial("a", 1e-3, 0)


def test_an_outcome_is_read_off_a_run():
    outcome = outcome_of(TRIAL, SWINGS, target=0.9, max_steps=10)
    assert (outcome.steps, outcome.tokens, outcome.seconds) == (4, 40.0, 4.0)
    assert outcome.total == {"steps": 10, "tokens": 100, "seconds": 10.0}
    assert (outcome.search_share, outcome.final_accuracy) == (0.25, 0.85)
    assert outcome.mean_accuracy == pytest.approx((4 * 0.5 + 2 * 0.85 + 4 * 0.825) / 10)
    assert outcome.mean_reverse_kl == pytest.approx((4 * 1.05 + 2 * 0.25 + 4 * 0.35) / 10)
    assert (outcome.final_reverse_kl, outcome.lowest_reverse_kl) == (0.3, 0.1)
    assert outcome.rise == pytest.approx(3)
    assert [outcome.measured(m) for m in ("steps", "tokens")] == exactly(4, 40)


def test_what_was_not_reached_or_not_logged_is_known_within_bounds():
    censored = outcome_of(TRIAL, SWINGS, target=0.95, max_steps=20)
    measured = [censored.measured(m) for m in ("steps", "tokens", "seconds", "mean_reverse_kl")]
    assert measured == [above(20), above(100), above(10), None]  # it has diverged at step 10
    unlogged = run_of((0, 0.1, 2.0), (4, 0.9, 0.1), (10, 0.8, 0.4), tokens_known=False)
    outcome = outcome_of(TRIAL, unlogged, target=0.9, max_steps=10)
    assert [outcome.measured(m) for m in ("steps", "tokens")] == [Bounds(4, 4), Bounds(0, 100)]
    with pytest.raises(UserError, match="run: no accuracy was measured"):
        outcome_of(TRIAL, run_of((0, None, 1.0)), target=0.9, max_steps=10)


def reaches(step: int | None) -> Run:
    end = [(step, 0.9, 0.5)] if step else []
    return run_of((0, 0.1, 1.0), *end, (128, 0.9 if step else 0.5, 0.25))


def groups_of(**steps: list) -> list:
    """Groups by method; each its steps by learning rate, one per seed."""
    runs = {
        Trial(method, rate, seed): reaches(step)
        for method, by_rate in steps.items()
        for rate, of_seeds in by_rate.items()
        for seed, step in enumerate(of_seeds)
    }
    return grouped([outcome_of(trial, run, 0.9, 128) for trial, run in runs.items()])


def test_methods_are_paired_by_seed_with_the_same_rate_and_with_the_best():
    groups = groups_of(
        base={1e-3: [20, 40, 80], 1e-2: [None, None, 64]},
        fast={1e-3: [10, 20, 40], 1e-2: [10, 16, None], 1.0: [40, 120, 80]},
    )
    found = {
        (one.group.learning_rate, one.baseline.learning_rate): one.ratios["steps"]
        for one in comparisons(groups, "base")
    }
    half = Median(Bounds(0.5, 0.5), 0.5, 0.5)  # of each pair, though seeds differ by a factor of 4
    assert found == {
        (1e-3, 1e-3): half,
        # 10 / (above 128), 16 / (above 128), (above 128) / 64
        (1e-2, 1e-2): Median(Bounds(0, 0.125), 0, math.inf),
        (1e-2, 1e-3): Median(Bounds(0.5, 0.5), 0.4, math.inf),  # 0.5, 0.4, above 1.6
        (1.0, 1e-3): Median(Bounds(2, 2), 1, 3),
    }


def rows_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|") and "--" not in line]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_of_rates_that_never_get_there_the_most_accurate_is_the_best():
    made = Study.of(
        {
            Trial("base", rate, seed): run_of((0, 0.1, 1.0), (128, accuracy, 0.5))
            for rate, accuracy in [(1e-4, 0.3), (1e-3, 0.6), (1e-2, 0.2)]
            for seed in (0, 1)
        },
        **{"baseline": "base", "target": 0.9, "max_steps": 128},
    )
    assert [row[1] for row in rows_of(tables(made))[1:]] == ["0.0001", "0.001 *", "0.01"]


def test_a_late_swing_of_one_seed_shows():
    runs = {Trial("a", 1e-3, 0): SWINGS, Trial("a", 1e-3, 1): reaches(20)}
    made = Study.of(runs, baseline="a", target=0.9, max_steps=10)
    header, row = rows_of(tables(made))
    assert dict(zip(header, row, strict=True))["worst final/lowest"] == "3.00"


@pytest.mark.usefixtures("_in_threads")
def test_study_compares_trials(tmp_path, capsys):
    trials = {  # steps to 0.9 (None: not within 40), final accuracy, seconds of searches
        "vanilla_lr0.001": [(10, 0.95, 0.0), (30, 0.9, 0.0), (20, 0.92, 0.0)],
        "vanilla_lr0.0001": [(None, 0.5, 0.0), (40, 0.91, 0.0), (None, 0.25, 0.0)],
        "fast_lr0.001": [(10, 0.7, 5.0), (20, 0.9, 30.0), (10, 1.0, 1.25)],
        "fast_lr0.0001": [(10, 0.9, 0.0), (10, 0.9, 0.0), (10, 0.9, 0.0)],
    }
    study(
        *(QUICKSTART, str(tmp_path), {}, {"vanilla": None, "fast": None}, [1e-3, 1e-4]),
        target=0.9,
        max_steps=40,
        opd=HandMade(trials),
    )
    text = (tmp_path / "results.md").read_text()
    costs, compared = map(rows_of, text.split("\n\n")[0::2])
    assert costs[0][:6] == [
        *("method", "learning rate", "reached", "steps to 0.9", "generated tokens", "seconds")
    ]
    # To the target: 100 tokens a step and 11 of searches; half a second a step, and searches
    assert [row[:6] for row in costs[1:]] == [
        ["vanilla", "0.0001", "1/3", ">40 [40, ∞]", ">4,011 [4,011, ∞]", ">20.0 [20.0, ∞]"],
        ["fast", "0.0001 *", "3/3", "10 [10, 10]", "1,011 [1,011, 1,011]", "5.0 [5.0, 5.0]"],
        ["vanilla", "0.001 *", "3/3", "20 [10, 30]", "2,011 [1,011, 3,011]", "10.0 [5.0, 15.0]"],
        ["fast", "0.001", "3/3", "10 [10, 20]", "1,011 [1,011, 2,011]", "10.0 [6.2, 40.0]"],
    ]
    by_name = [dict(zip(costs[0], row, strict=True)) for row in costs[1:]]
    assert [row["final accuracy"] for row in by_name] == ["0.500", "0.900", "0.920", "0.900"]
    # Ended at 20, 30, 20 steps, with searches of 5, 30 and 1.25 seconds: a third, 2/3, a ninth
    assert [row["search share"] for row in by_name] == ["0%", "0%", "0%", "33%"]
    assert [row["worst final/lowest"] for row in by_name] == ["1.00"] * 4
    assert compared[0][:4] == ["method", "learning rate", "vanilla's", "steps to 0.9"]
    assert [row[:4] for row in compared[1:]] == [
        # 10 / (above 40), 10 / 40, 10 / (above 40); 10 / 10, 10 / 30, 10 / 20
        ["fast", "0.0001 *", "0.0001", "<0.25 [0.00, 0.25]"],
        ["fast", "0.0001 *", "0.001 *", "0.50 [0.33, 1.00]"],
        ["fast", "0.001", "0.001 *", "0.67 [0.50, 1.00]"],
    ]
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["trials"]) == 12
    trial = found["trials"][3]
    assert trial["trial"] == {"method": "fast", "learning_rate": 1e-4, "settings": {}, "seed": 0}
    assert (trial["steps"], trial["tokens"], trial["seconds"]) == (10, 1011, 5.0)
    never = found["medians"][0]
    assert (never["method"], never["learning_rate"]) == ("vanilla", 1e-4)
    assert never["steps"] == {"median": [40, None], "interval": [40, None]}
    assert found["comparisons"][1]["baseline_learning_rate"] == 1e-3
    assert found["comparisons"][1]["ratios"]["steps"] == {
        "median": [0.5, 0.5],
        "interval": [pytest.approx(1 / 3), 1.0],
    }
    assert text.strip() in capsys.readouterr().out


def two_methods() -> dict[Trial, Run]:
    runs = {
        Trial("a & b", rate, seed): reaches(step)
        for rate, steps in [(1e-4, (None, None, 60)), (1e-3, (20, 10, 30))]
        for seed, step in enumerate(steps)
    }
    return runs | {Trial("alone", 1.0, seed): reaches(40) for seed in range(3)}


def test_the_figure_shows_medians_and_what_is_only_known_to_be_more():
    groups = grouped([outcome_of(trial, run, 0.9, 128) for trial, run in two_methods().items()])
    (axis,) = figures.costs(groups, {"steps": "steps to 0.9"}).axes
    (across,) = (line for line in axis.get_lines() if list(line.get_xdata()) == [0, 1])
    assert list(across.get_ydata()) == [40, 40]
    line, *points = (line for line in axis.get_lines() if line is not across)
    assert list(line.get_data()[0]) == [1e-4, 1e-3]
    assert list(line.get_data()[1]) == [128, 20]
    looks = {
        line.get_ydata()[0]: (line.get_marker(), line.get_markerfacecolor()) for line in points
    }
    assert looks[128] == ("^", "white")
    assert looks[20][0] == "o"
    band = axis.collections[0].get_paths()[0].vertices
    top = axis.get_ylim()[1]
    assert top > 128
    by_rate = {rate: sorted({y for x, y in band if x == rate}) for rate in (1e-4, 1e-3)}
    assert by_rate == {1e-4: [60, pytest.approx(top)], 1e-3: [10, 30]}
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")


def test_of_many_methods_each_has_a_row_of_medians():
    """The first is at 128 or more, and at 20 (10 to 30); the others at 40, with a rate each."""
    more = {Trial(f"m{i}", 1.0, seed): reaches(40) for i in range(6) for seed in range(3)}
    runs = two_methods() | more
    groups = grouped([outcome_of(trial, run, 0.9, 128) for trial, run in runs.items()])
    (axis,) = figures.costs(groups, {"steps": "steps to 0.9"}).axes
    rows = [label.get_text() for label in axis.get_yticklabels()]
    assert rows == ["a & b", "alone", *(f"m{i}" for i in range(6))]
    lines = [line for line in axis.get_lines() if round(line.get_ydata()[0]) == 0]
    spans, dots = lines[::2], lines[1::2]
    assert [dot.get_xdata()[0] for dot in dots] == [128, 20]
    assert [dot.get_marker() for dot in dots] == [">", "o"]
    assert [tuple(span.get_xdata()) for span in spans] == [(60, axis.get_xlim()[1]), (10, 30)]
    assert dots[0].get_ydata()[0] < dots[1].get_ydata()[0]  # by learning rate, from above
    assert axis.get_ylim() == (7.5, -0.5)


def test_means_are_compared_where_all_runs_went_to_the_end():
    def measures(*runs):
        trials = {Trial(name, 1.0, 0): run for name, run in zip("ab", runs, strict=True)}
        return Study.of(trials, baseline="a", target=0.9, max_steps=4).measures

    slow, whole = run_of((0, 0.1, 1.0), (4, 0.2, 0.5)), run_of((0, 0.1, 1.0), (4, 0.9, 0.5))
    stopped, diverged = run_of((0, 0.1, 1.0), (2, 0.9, 0.5)), run_of((0, 0.1, 1.0), (2, 0.0, 9.0))
    assert "mean_reverse_kl" in measures(slow, whole)
    assert "mean_reverse_kl" not in measures(slow, stopped)
    assert "mean_reverse_kl" in measures(slow, diverged)  # which was stopped by no target


def test_curves_show_each_seed_and_their_median():
    runs = {
        Trial("a", 1e-3, seed): run_of((0, 0.1, 1.0), (2, 0.2, kl), *more)
        for seed, (kl, more) in enumerate([(0.5, [(4, 0.3, 0.1)]), (0.25, []), (0.125, [])])
    }
    (axis,) = figures.curves(list(runs.items())).axes
    *seeds, middle = [tuple(map(list, line.get_data())) for line in axis.get_lines()]
    assert seeds[0] == ([0, 2, 4], [1.0, 0.5, 0.1])
    assert len(seeds) == 3
    assert middle == ([0, 2], [1.0, 0.25])


def test_the_page_needs_nothing_else():
    made = Study.of(two_methods(), baseline="a & b", target=0.9, max_steps=128)
    text = page(made, b"PNG")
    assert not re.search(r"https?://|(src|href)=(?!.?data:)|@import|url\(", text)
    assert "a & b" not in text
    assert "a &amp; b" in text
    assert len(text) < 1_000_000
    headings = ["Cost against", "Beside a &amp; b", "Reverse KL on the way", "Every run"]
    places = [text.index(f"<h2>{heading}") for heading in headings]
    assert all(a < b for a, b in pairwise(places))


# --- in earnest -----------------------------------------------------------------------------------


def test_a_small_study_runs(tmp_path):
    config = {
        "recipe": QUICKSTART,
        "accelerators": {
            "vanilla": {"learning_rates": [1e-4, 1e30]},  # the latter diverges; the study goes on
            "line_search": {"configs": LINE_SEARCH, "learning_rates": [1e-4]},
        },
        "learning_rates": [1e-4],
        "grid": {"--model.temperature": [0.7]},
        "seeds": [0],
        "target": 0.05,
        "stop_at_target": False,
        "max_steps": 2,
        "arguments": ["--data.validation_limit=16", *SHRUNK],
        "output": str(tmp_path / "study"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["study", "--config", str(path)]) == 0
    folder = tmp_path / "study"
    found = json.loads((folder / "results.json").read_text())
    small, diverged, search = found["trials"]
    assert [t["trial"]["method"] for t in (small, diverged, search)] == [
        *("vanilla", "vanilla", "line_search")
    ]
    assert [one["total"]["steps"] for one in (small, diverged, search)] == [2, 0, 2]
    assert all(one["mean_reverse_kl"] > 0 for one in (small, search))
    assert diverged["mean_reverse_kl"] is None
    assert search["search_share"] > 0
    assert (folder / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "results.html").stat().st_size < 1_000_000
    left = {path.name for path in folder.glob("vanilla*lr0.0001*/*")}
    assert {"summary.json", "metrics.csv", "config.yaml"} < left
    assert not left & {"checkpoints", "samples", "validation"}
