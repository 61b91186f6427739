"""What report and figures say of run folders written by hand, worked out by hand."""

import json
import re
from pathlib import Path

import pytest
from hand_made import COSTS, search, write_run

from eval.figures import curves
from eval.report import report
from eval.runs import Point, read_run
from opd.cli import main
from opd.errors import UserError


@pytest.fixture
def tortoise(tmp_path) -> Path:
    """0.96 at step 4, less at the end; seconds and tokens at each step are all different."""
    return write_run(
        tmp_path / "tortoise",
        [(0, 0.1, 2.0, 3.0), (2, 0.4, 1.0, 1.5, 0.75), (4, 0.96, 0.25, 1.0, 0.5), (8, 0.9, 0.5)],
        {  # seconds of rollout, teacher, train, search, validation; tokens
            1: (0.5, 0.25, 0.75, 0.0, 50.0, 100, 0, 0, 100),
            2: (1.0, 0.5, 1.5, 2.0, 100.0, 200, 30, 700, 200),
            4: (2.0, 1.0, 3.0, 4.0, 150.0, 400, 50, 900, 400),
            8: (4.0, 2.0, 6.0, 4.0, 200.0, 800, 50, 900, 800),
        },
        [
            {"step": 1, "seconds": 0.125, "tokens": 0},  # an accelerator has only looked
            search(2, 4.0, (2.0, 0.5), (4.0, 0.625)),
            search(3, 0.0, (2.0, -1.5)),
        ],
    )


def test_points_join_validations_with_what_was_spent_by_then(tortoise):
    run = read_run(tortoise)
    assert run.name == "tortoise"
    assert run.points == [
        Point(0, 0.1, 2.0, 0.0, 0.0, 3.0),
        Point(2, 0.4, 1.0, 1.0 + 0.5 + 1.5 + 2.0, 200 + 30, 1.5, 0.75),
        Point(4, 0.96, 0.25, 2.0 + 1.0 + 3.0 + 4.0, 400 + 50, 1.0, 0.5),
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
        ["1", "-", "", "0.12", "0"],
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
    entropy_searches = [("^", [2.0], [1.5]), ("x", [3.0], [1.25])]
    assert panels["optimizer steps", "student's entropy, nats per token"] == [
        ("None", [0, 2, 4], [3.0, 1.5, 1.0]),
        *entropy_searches,
    ]
    far_searches = [("^", [2.0], [0.75]), ("x", [3.0], [0.625])]
    assert panels["optimizer steps", "share of tokens with KL above 5 nats"] == [
        ("None", [2, 4], [0.75, 0.5]),
        *far_searches,
    ]
    seconds = panels["seconds (validation left out)", "held-out accuracy"]
    assert seconds == [("None", [0, 5, 10, 16], accuracy)]
    tokens = panels["generated tokens (searches included)", "held-out accuracy"]
    assert tokens == [("None", [0, 230, 450, 850], accuracy)]


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
