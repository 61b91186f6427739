"""What report, figures and study say of run folders written by hand, worked out by hand."""

import csv
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import QUICKSTART

from eval.figures import curves, steps_to_target
from eval.report import report
from eval.runs import Point, read_run
from eval.study import study
from opd.cli import main
from opd.errors import UserError

COSTS = "rollout_seconds teacher_seconds train_seconds search_seconds validation_seconds"
COSTS = [f"cost/{name}" for name in COSTS.split()]
COSTS += [f"cost/{kind}_tokens" for kind in ("rollout", "search_generated", "search", "teacher")]


def write_run(folder: Path, validations: list, costs: dict, searches: list) -> Path:
    """Write the files of a run.

    Args:
        folder: The run folder.
        validations: (step, accuracy, reverse KL).
        costs: By step, a value for each of COSTS.
        searches: For summary.json.
    """
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "val/accuracy", "val/reverse_kl", *COSTS])
        writer.writeheader()
        for step, accuracy, kl in validations:
            writer.writerow({"step": step, "val/accuracy": accuracy, "val/reverse_kl": kl})
        for step, values in costs.items():
            writer.writerow({"step": step, **dict(zip(COSTS, values, strict=True))})
    last = max(costs)
    summary = {
        "steps": last,
        "accuracy": {"initial": validations[0][1], "final": validations[-1][1]},
        "reverse_kl": {"initial": validations[0][2], "final": validations[-1][2]},
        "cost": {n.removeprefix("cost/"): v for n, v in zip(COSTS, costs[last], strict=True)},
        "extrapolation": searches,
        "versions": {"opd": "9.8.7"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def search(step, coefficient, *candidates):
    tried = [{"coefficient": c, "score": s, "accepted": c == coefficient} for c, s in candidates]
    return {
        **{"step": step, "coefficient": coefficient, "candidates": tried},
        **{"seconds": 0.25 * step, "tokens": 1000 * step + 234},
    }


@pytest.fixture
def tortoise(tmp_path) -> Path:
    """0.96 at step 4, less at the end; seconds and tokens at each step are all different."""
    return write_run(
        tmp_path / "tortoise",
        [(0, 0.1, 2.0), (2, 0.4, 1.0), (4, 0.96, 0.25), (8, 0.9, 0.5)],
        {  # seconds of rollout, teacher, train, search, validation; tokens
            1: (0.5, 0.25, 0.75, 0.0, 50.0, 100, 0, 0, 100),
            2: (1.0, 0.5, 1.5, 2.0, 100.0, 200, 30, 700, 200),
            4: (2.0, 1.0, 3.0, 4.0, 150.0, 400, 50, 900, 400),
            8: (4.0, 2.0, 6.0, 4.0, 200.0, 800, 50, 900, 800),
        },
        [search(2, 4.0, (2.0, 0.5), (4.0, 0.625)), search(3, 0.0, (2.0, -1.5))],
    )


def test_points_join_validations_with_what_was_spent_by_then(tortoise):
    run = read_run(tortoise)
    assert run.name == "tortoise"
    assert run.points == [
        Point(0, 0.1, 2.0, 0.0, 0.0),
        Point(2, 0.4, 1.0, 1.0 + 0.5 + 1.5 + 2.0, 200 + 30),
        Point(4, 0.96, 0.25, 2.0 + 1.0 + 3.0 + 4.0, 400 + 50),
        Point(8, 0.9, 0.5, 4.0 + 2.0 + 6.0 + 4.0, 800 + 50),
    ]


@pytest.mark.parametrize(
    ("accuracy", "step"), [(0.05, 0), (0.2, 2), (0.4, 2), (0.9, 4), (0.96, 4), (0.97, None)]
)
def test_reached_is_the_first_validation_with_at_least_this_accuracy(tortoise, accuracy, step):
    point = read_run(tortoise).reached(accuracy)
    assert (point.step if point else None) == step


def test_a_run_without_answers_reaches_nothing(tmp_path):
    costs = {1: [1.0] * len(COSTS)}
    run = read_run(write_run(tmp_path / "run", [(0, None, 2.0), (1, None, 1.0)], costs, []))
    assert [point.accuracy for point in run.points] == [None, None]
    assert run.reached(0.01) is None


def test_benchmarks_are_read_from_the_run_and_from_a_folder_of_results(tortoise, tmp_path):
    for folder, score in [(tortoise / "evaluation", 0.75), (tmp_path / "hub", 0.5)]:
        folder.mkdir()
        results = {"adding": {"alias": "adding", "accuracy,none": score}}
        (folder / "results.json").write_text(json.dumps({"results": results}))
    assert read_run(tortoise).benchmarks == {"adding/accuracy": 0.75}
    assert len(read_run(tortoise).points) == 4
    assert read_run(tmp_path / "hub").benchmarks == {"adding/accuracy": 0.5}
    with pytest.raises(UserError, match="nowhere: does not exist"):
        read_run(tmp_path / "nowhere")


def cells(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading."""
    table = re.search(rf"{heading}.*?<table>(.*?)</table>", page, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_report_says_what_the_runs_cost_and_reached(tortoise, tmp_path):
    hare = write_run(
        tmp_path / "hare",
        [(0, None, 2.0), (2000, None, 1.5)],
        {2000: (1.0, 1.0, 1.0, 1.0, 9.0, 1_200_000, 34_567, 5, 5)},
        [],
    )
    (hare / "evaluation").mkdir()
    scores = {"results": {"b": {"accuracy,none": 0.12345}, "a": {"accuracy,none": 1.0}}}
    (hare / "evaluation" / "results.json").write_text(json.dumps(scores))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "results.json").write_text('{"results": {"b": {"accuracy,none": 0.5}}}')
    output = tmp_path / "report.html"
    folders = [str(tortoise), str(hare), str(tmp_path / "hub")]
    assert main(["report", *folders, "--output", str(output), "--target", "0.95"]) == 0
    page = output.read_text()
    assert cells(page, "<h2>Runs") == [
        [
            *("run", "steps", "generated tokens", "seconds", "of which search"),
            *("accuracy", "reverse KL", "steps to 0.95", "seconds to 0.95"),
        ],
        [
            *("tortoise", "8", "850", "16.0", "25%"),
            *("0.100 → 0.900", "2.000 → 0.500", "4", "10.0"),
        ],
        [
            *("hare", "2000", "1,234,567", "4.0", "25%"),
            *("- → -", "2.000 → 1.500", "not reached", "not reached"),
        ],
    ]
    assert cells(page, "<h2>Benchmarks") == [
        ["model", "a/accuracy", "b/accuracy"],
        ["hare", "1.000", "0.123"],
        ["hub", "-", "0.500"],
    ]
    assert "tortoise: 2 searches, 1 accepted" in page
    assert cells(page, "<h2>Extrapolations") == [
        ["step", "coefficient", "candidates: score", "seconds", "tokens"],
        ["2", "4", "2: 0.500, 4: 0.625", "0.50", "2,234"],
        ["3", "refused", "2: -1.500", "0.75", "3,234"],
    ]
    assert "opd 9.8.7" in page


def lines(axis) -> list[tuple[str, list[float], list[float]]]:
    """What an axis shows: marker, x and y of each line."""
    return [
        (str(line.get_marker()), *([float(v) for v in line.get_data()[i]] for i in (0, 1)))
        for line in axis.get_lines()
    ]


def test_curves_show_the_points_and_mark_the_searches(tortoise):
    """Step 2 was validated; step 3 lies halfway between 2 and 4."""
    figure = curves([read_run(tortoise)])
    panels = {(a.get_xlabel(), a.get_ylabel()): lines(a) for a in figure.axes}
    steps, accuracy, kl = [0, 2, 4, 8], [0.1, 0.4, 0.96, 0.9], [2.0, 1.0, 0.25, 0.5]
    searches = [("^", [2.0], [0.4]), ("x", [3.0], [pytest.approx(0.68)])]
    assert panels["optimizer steps", "held-out accuracy"] == [("None", steps, accuracy), *searches]
    kl_searches = [("^", [2.0], [1.0]), ("x", [3.0], [0.625])]
    assert panels["optimizer steps", "reverse KL, nats per token"] == [
        ("None", steps, kl),
        *kl_searches,
    ]
    seconds = panels["seconds (validation left out)", "held-out accuracy"]
    assert seconds == [("None", [0, 5, 10, 16], accuracy)]
    tokens = panels["generated tokens (searches included)", "held-out accuracy"]
    assert tokens == [("None", [0, 230, 450, 850], accuracy)]


def test_steps_to_target_shows_the_middle_seed_and_draws_what_was_not_reached_above():
    results = {"vanilla": {1e-3: [None, 40, 60], 1e-4: [30, 10, 20]}}
    (axis,) = steps_to_target(results, 0.9, max_steps=100).axes
    (marker, rates, middle), limit = lines(axis)
    assert (marker, rates, middle) == ("o", [1e-4, 1e-3], [20, 60])
    assert limit[2] == [100, 100]
    corners = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (min(corners), max(corners)) == (10, pytest.approx(115))


def write_trial(folder: Path, reached: int | None, final: float, search_seconds: float) -> None:
    """A trial that goes on for ten steps after it is there; 0.5 seconds and 100 tokens a step."""
    end = reached + 10 if reached else 40
    accuracies = [(0, 0.3, 1.0), *([(reached, 0.9, 0.7)] if reached else []), (end, final, 0.5)]
    costs = {
        step: (0.25 * step, 0.125 * step, 0.125 * step, search_seconds, 7.0, 100 * step, 11, 99, 0)
        for step in range(1, end + 1)
    }
    write_run(folder, accuracies, costs, [])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("summary.json", "[]", "summary.json"),
        ("summary.json", '{"steps": 8}', "summary.json"),
        ("summary.json", '{"steps": 8, "cost": {}', "summary.json: not valid JSON"),
        ("metrics.csv", "a,b\n1,2\n", "metrics.csv line 1: not a metrics.csv"),
        ("metrics.csv", "step,val/reverse_kl\n1,much\n", "val/reverse_kl must be a number"),
        ("metrics.csv", b"\xff\xfe\n", "not a metrics.csv"),
        ("evaluation/results.json", '{"results": [1]}', "results.json"),
        ("evaluation/results.json", '{"results": {"a/b": "high"}}', "results.json"),
    ],
)
def test_what_a_damaged_file_lacks_is_said_in_one_line(tortoise, tmp_path, file, content, said):
    (tortoise / file).parent.mkdir(exist_ok=True)
    (tortoise / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    page = tmp_path / "report.html"
    with pytest.raises(UserError, match=re.escape(said)):
        report([str(tortoise)], str(page))
    assert not page.exists()


class HandMade:
    """Stands for the command line: a trial's folder is written at once; remembers what it ran."""

    def __init__(self, trials: dict[str, list]) -> None:
        self.trials = trials
        self.ran: list[str] = []

    def __call__(self, command: list[str]) -> int:
        folder = Path(command[command.index("--output") + 1])
        name, _, seed = folder.name.partition("_seed")
        self.ran.append(folder.name)
        shutil.rmtree(folder, ignore_errors=True)
        write_trial(folder, *self.trials[name][int(seed)])
        return 0


@pytest.fixture
def in_threads(monkeypatch):
    """Trials run in this process."""
    pool = lambda workers, *_: ThreadPoolExecutor(workers)  # noqa: E731
    monkeypatch.setattr("eval.study.ProcessPoolExecutor", pool)


@pytest.mark.usefixtures("in_threads")
def test_study_compares_trials(tmp_path, capsys):
    """Medians over seeds; a dash where a seed did not reach the target."""
    trials = {  # steps to 0.9 (None: not within 40), final accuracy, seconds of searches
        "vanilla_lr0.001": [(10, 0.95, 0.0), (30, 0.9, 0.0), (20, 0.92, 0.0)],
        "vanilla_lr0.0001": [(None, 0.5, 0.0), (40, 0.91, 0.0), (None, 0.25, 0.0)],
        "fast_lr0.001": [(10, 0.7, 5.0), (20, 0.9, 30.0), (10, 1.0, 1.25)],
        "fast_lr0.0001": [(10, 0.9, 0.0), (10, 0.9, 0.0), (10, 0.9, 0.0)],
    }
    study(
        QUICKSTART,
        {"vanilla": None, "fast": None},
        [1e-3, 1e-4],
        str(tmp_path),
        target=0.9,
        max_steps=40,
        opd=HandMade(trials),
    )
    table = (tmp_path / "results.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0] == [
        *("accelerator", "learning rate", "reached", "steps to 0.9"),
        *("generated tokens", "seconds", "search share", "final accuracy"),
    ]
    assert rows[2:] == [
        ["vanilla", "0.0001", "1/3", ">40, 40, >40", "-", "-", "0%", "0.500, 0.910, 0.250"],
        ["fast", "0.0001", "3/3", "10, 10, 10", "1,011", "5.0", "0%", "0.900, 0.900, 0.900"],
        ["vanilla", "0.001", "3/3", "10, 30, 20", "2,011", "10.0", "0%", "0.950, 0.900, 0.920"],
        # seconds 5 + 5, 10 + 30, 5 + 1.25; shares 5 / 15, 30 / 45, 1.25 / 11.25
        ["fast", "0.001", "3/3", "10, 20, 10", "1,011", "10.0", "33%", "0.700, 0.900, 1.000"],
    ]
    outcomes = json.loads((tmp_path / "results.json").read_text())
    assert len(outcomes) == 12
    assert outcomes[3] == {
        "trial": {"accelerator": "fast", "learning_rate": 1e-4, "seed": 0},
        **{"steps": 10, "tokens": 1011, "seconds": 5.0},
        **{"search_share": 0.0, "final_accuracy": 0.9},
    }
    assert table in capsys.readouterr().out


@pytest.mark.usefixtures("in_threads")
def test_a_study_goes_on_with_trials_of_the_same_settings_only(tmp_path, capsys):
    """Others, also those of a recipe or preset that has been edited, are run again and named."""
    recipe, preset = tmp_path / "recipe.yaml", tmp_path / "preset.yaml"
    recipe.write_text(Path(QUICKSTART).read_text())
    preset.write_text("trainer: {max_epochs: 3}\n")
    opd = HandMade({"a_lr0.001": [(10, 0.9, 0.0)] * 3, "b_lr0.001": [(10, 0.9, 0.0)] * 3})
    accelerators = {"a": None, "b": str(preset)}

    def runs(seeds: list[int], **options) -> list[str]:
        opd.ran.clear()
        output = str(tmp_path / "study")
        study(str(recipe), accelerators, [1e-3], output, seeds, target=0.9, opd=opd, **options)
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
    recipe.write_text(recipe.read_text() + "# a word\n")
    assert len(runs([0, 1], max_steps=60)) == 4
