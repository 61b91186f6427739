"""opd evaluate as a user would: stages that go on after a kill, processes, suites, comparisons."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from benchmark_rows import MAKERS
from conftest import (
    ROOT,
    assert_same,
    launch_environment,
    load,
    run_ranks,
    slow_but,
    student_of,
)

from eval.benchmarks import benchmarks, load_rows, tasks
from eval.benchmarks.scoring import SCORERS
from eval.evaluate import read_suite
from eval.figures import bench_curves
from eval.runs import read_run
from opd.cli import main
from opd.cli.recipes import names
from opd.metrics_rows import read_metrics
from opd.rollouts import TransformersEngine

COMMAND = ["evaluate", "--model", "embedded:base", "--tasks", "arithmetic", "--samples", "2"]


def arguments(folder, *options):
    return [*COMMAND, "--limit", "40", "--batch_size", "8", "--output", str(folder), *options]


def results(folder):
    """Everything that may not depend on how the work was done."""
    found = json.loads((folder / "results.json").read_text())
    samples = (folder / "samples_arithmetic.jsonl").read_text()
    return found["results"], found["n-samples"], [json.loads(x) for x in samples.splitlines()]


def completions(folder):
    lines = [
        line
        for path in (folder / "completions").iterdir()
        for line in path.read_text().splitlines()
    ]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(arguments(folder)) == 0
    return folder


def test_results_are_in_lm_evals_layout(undisturbed):
    found = json.loads((undisturbed / "results.json").read_text())
    for key in ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better"):
        assert "arithmetic" in found[key]
    assert found["n-samples"]["arithmetic"] == {"original": 512, "effective": 40}
    assert found["config"]["model"] == "embedded:base"
    _, _, samples = results(undisturbed)
    average = sum(sample["avg@2"] for sample in samples) / 40
    assert found["results"]["arithmetic"]["avg@2,none"] == pytest.approx(average)
    for sample in samples:
        right = [one["right"] for one in sample["completions"]]
        assert sample["avg@2"] == sum(right) / 2
        assert sample["length"] == sum(one["tokens"] for one in sample["completions"]) / 2
    assert f"{average:.4f}" in (undisturbed / "results.md").read_text()


@pytest.mark.slow
def test_kill_9_and_the_same_command_give_the_undisturbed_numbers(undisturbed, tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "opd.cli", *arguments(folder)]
    with subprocess.Popen(command, env=launch_environment(), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(folder.glob("completions/*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    kept = completions(folder)
    assert 0 < len(kept) < 80
    assert main(arguments(folder)) == 0
    assert results(folder) == results(undisturbed)
    assert completions(folder)[: len(kept)] == kept
    assert len(completions(folder)) == 80  # none of them twice


def test_a_line_that_a_kill_has_cut_is_made_again(undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    assert main(arguments(folder)) == 0
    (path,) = (folder / "completions").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    assert main(arguments(folder)) == 0
    assert results(folder) == results(undisturbed)
    monkeypatch.delattr(TransformersEngine, "__call__")  # and is whole
    monkeypatch.setattr(TransformersEngine, "__abstractmethods__", frozenset())
    assert main(arguments(folder)) == 0


def test_two_processes_give_the_numbers_of_one(undisturbed, tmp_path):
    folder = tmp_path / "out"
    codes, printed = run_ranks(2, arguments(folder), tmp_path)
    assert not any(codes), printed
    assert results(folder) == results(undisturbed)
    shares = [len(path.read_text().splitlines()) for path in (folder / "completions").iterdir()]
    assert sorted(shares) == [40, 40]


def test_scoring_again_needs_no_generation(undisturbed, monkeypatch):
    before = results(undisturbed)
    monkeypatch.delattr(TransformersEngine, "__call__")
    monkeypatch.setattr(TransformersEngine, "__abstractmethods__", frozenset())
    (undisturbed / "results.md").unlink()
    assert main(arguments(undisturbed)) == 0
    assert results(undisturbed) == before
    assert (undisturbed / "results.md").is_file()


@pytest.mark.parametrize(
    "other",
    slow_but(["--temperature", "0.5"], ["--model", "embedded:teacher"], ["--seed", "1"]),
)
def test_completions_of_another_evaluation_are_not_taken_for_its_own(undisturbed, tmp_path, other):
    folder = tmp_path / "out"
    shutil.copytree(undisturbed, folder)
    assert main(arguments(folder, *other, "--overwrite")) == 0
    assert main(arguments(tmp_path / "fresh", *other)) == 0
    assert results(folder) == results(tmp_path / "fresh")
    assert results(folder)[0] != results(undisturbed)[0]


def test_copies_of_a_problem_are_draws_of_their_own(undisturbed):
    said = {}
    for one in completions(undisturbed):
        said.setdefault(one["problem"], set()).add(one["text"])
    assert sum(len(texts) == 2 for texts in said.values()) > 20  # of 40


def test_a_verdict_is_kept_until_the_evaluation_ends(undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    judged = []

    def score(completion, doc, scorer=SCORERS["pattern"]):
        if len(judged) == stop:
            raise KeyboardInterrupt
        judged.append(completion)
        return scorer(completion, doc)

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # one thread
    monkeypatch.setattr("eval.harness.scorer_of", lambda *_: score)
    monkeypatch.setattr(score, "group", SCORERS["pattern"].group, raising=False)
    stop = 20
    assert main(arguments(folder)) == 130
    (kept,) = (folder / "verdicts").iterdir()
    assert len(kept.read_text().splitlines()) == 20
    stop = None
    assert main(arguments(folder)) == 0
    once = len(judged)
    assert once == len({(one["problem"], one["text"]) for one in completions(folder)})
    assert results(folder) == results(undisturbed)
    assert not (folder / "verdicts").exists()
    assert main(arguments(folder)) == 0  # scores all of them again
    assert len(judged) == 2 * once


def test_a_command_that_fails_leaves_no_folder(tmp_path, capsys):
    missing = ["evaluate", "--model", str(tmp_path / "missing"), "--tasks", "arithmetic"]
    assert main([*missing, "--output", str(tmp_path / "new" / "out")]) == 2
    assert "missing" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_other_settings_do_not_replace_results_unasked(undisturbed, tmp_path, capsys):
    before = (undisturbed / "results.json").read_bytes()
    assert main(arguments(undisturbed, "--temperature", "0.5")) == 2
    assert "results.json exists, of another evaluation" in capsys.readouterr().err
    assert (undisturbed / "results.json").read_bytes() == before


def test_sampling_options_hold(tmp_path):
    options = ["--temperature", "0", "--max_new_tokens", "5", "--limit", "8"]
    assert main(arguments(tmp_path / "greedy", *options)) == 0
    texts = {(one["problem"], one["text"]) for one in completions(tmp_path / "greedy")}
    assert len(texts) == 8  # both copies say the same
    _, _, samples = results(tmp_path / "greedy")
    assert all(sample["truncated"] == 1.0 and sample["length"] == 5 for sample in samples)
    assert (
        main(arguments(tmp_path / "top_k", "--top_k", "1", "--max_new_tokens=5", "--limit=8")) == 0
    )
    assert {(one["problem"], one["text"]) for one in completions(tmp_path / "top_k")} == texts


def test_more_samples_keep_those_that_are_there(undisturbed, tmp_path):
    folder = tmp_path / "out"
    assert main(arguments(folder)) == 0
    assert main(arguments(folder, "--samples", "3", "--overwrite")) == 0
    made = completions(folder)
    assert len(made) == 120
    assert [one for one in made if one["copy"] < 2] == completions(undisturbed)


# --- suites ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["math", "code", "science", "quick"])
def test_suites_name_tasks_that_are_there(name):
    assert f"eval/{name}" in names("eval")
    suite = read_suite(name)
    assert suite["tasks"]
    assert set(suite["tasks"]) <= set(benchmarks())


def test_options_win_over_a_suite(tmp_path):
    (tmp_path / "mine.yaml").write_text("tasks: [arithmetic]\nsamples: 3\nlimit: 6\n")
    command = ["evaluate", "--model", "embedded:base", "--suite", str(tmp_path / "mine.yaml")]
    assert main([*command, "--samples", "2", "--output", str(tmp_path / "out")]) == 0
    found, counts, _ = results(tmp_path / "out")
    assert "avg@2,none" in found["arithmetic"]
    assert counts["arithmetic"]["effective"] == 6


# --- comparisons ----------------------------------------------------------------------------------


def test_two_evaluations_are_compared_problem_by_problem(tmp_path, capsys):
    """By hand: differences 1, 0, 0.5, -0.5 have the mean 0.25 and the standard error 0.3227."""
    for name, values in [("a", [0, 1, 0.5, 0.5]), ("b", [1, 1, 1, 0])]:
        (tmp_path / name).mkdir()
        problems = list(enumerate(values))[:: 1 if name == "a" else -1]  # of rows in another order
        lines = [
            json.dumps({"doc_id": row, "id": f"p{i}", "metrics": ["avg@2"], "avg@2": value})
            for row, (i, value) in enumerate(problems)
        ]
        (tmp_path / name / "samples_sums.jsonl").write_text("\n".join(lines))
    assert main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    (row,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| sums")]
    assert row.startswith("| sums | 4 | +0.2500 ± 0.3227 |")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no results of opd evaluate"),
        ("{", "samples_sums.jsonl: is damaged"),
        ("[1]", "samples_sums.jsonl: is damaged"),
        ('{"doc_id": 0, "metrics": ["f1"], "f1": 1}', "none of its tasks has avg@n"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "samples_sums.jsonl").write_text(content)
    assert main(["evaluate", "--compare", str(tmp_path), str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


# --- what a user must not see or run unasked ------------------------------------------------------


@pytest.fixture
def patient(tiny, tmp_path):
    """A student whose context holds a question."""
    folder = shutil.copytree(tiny / "llama-student", tmp_path / "patient")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return str(folder)


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """A gated benchmark and one of code, each with two problems of our own."""
    found = {}
    for name in ("gpqa_diamond", "humaneval_plus"):
        benchmark = replace(benchmarks()[name], rows=2, problems=None, samples=2, max_tokens=8)
        found[name] = benchmark
        made = [MAKERS[name](i) for i in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    monkeypatch.setattr(tasks, "read_benchmark", lambda path: found[path.stem])
    return tmp_path


def test_a_gated_problem_is_nowhere_in_the_results(sums, patient, tmp_path):
    model = ["evaluate", "--model", patient, "--data", str(sums)]
    options = ["--tasks", "gpqa_diamond", "--samples", "2", "--max_new_tokens", "4"]
    assert main([*model, *options, "--output", str(tmp_path / "out")]) == 0
    record = json.loads((sums / "gpqa_diamond.jsonl").read_text().splitlines()[0])
    for path in (tmp_path / "out").glob("*.*"):
        for text in (record["Question"], record["Correct Answer"]):
            assert text.strip() not in path.read_text()
    (sample, _) = (tmp_path / "out" / "samples_gpqa_diamond.jsonl").read_text().splitlines()
    assert len(json.loads(sample)["completions"]) == 2


def test_programs_are_run_only_when_that_is_allowed(sums, patient, tmp_path, caplog):
    model = ["evaluate", "--model", patient, "--data", str(sums)]
    options = ["--tasks", "humaneval_plus", "--samples", "2", "--max_new_tokens", "4"]
    assert main([*model, *options, "--output", str(tmp_path / "out")]) == 2
    assert (
        main([*model, *options, "--allow-code-execution", "--output", str(tmp_path / "out")]) == 0
    )
    assert "programs of the model are run: programs are confined by" in caplog.text
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert found["humaneval_plus"]["avg@2,none"] == 0.0
    assert found["humaneval_plus"]["no_answer,none"] == 1.0


def test_the_context_bounds_a_completion(tiny, tmp_path, caplog):
    """Of a model with 128 positions, which does not know when to end."""
    (tmp_path / "aime24.jsonl").write_text(
        "".join(json.dumps(MAKERS["aime24"](i)) + "\n" for i in range(30))
    )
    command = ["evaluate", "--model", str(tiny / "llama-student"), "--data", str(tmp_path)]
    options = ["--tasks", "aime24", "--samples", "1", "--limit", "1", "--temperature", "0"]
    assert main([*command, *options, "--output", str(tmp_path / "out")]) == 0
    assert "rather than 16384: the model's context is 128 tokens" in caplog.text
    said = json.loads(next((tmp_path / "out" / "completions").iterdir()).read_text())
    assert 0 < said["tokens"] < 128


# --- benchmarks of a run --------------------------------------------------------------------------

BENCHMARKS = ["--trainer.callbacks+=callbacks.Benchmarks", "--trainer.callbacks.tasks=[arithmetic]"]
BENCHMARKS += ["--trainer.callbacks.limit=8", "--trainer.callbacks.samples=2"]


def benches(run, name="bench/arithmetic/avg@2"):
    rows = read_metrics(run / "metrics.csv")
    return {int(row["step"]): float(row[name]) for row in rows if name in row}


def test_training_goes_on_bit_for_bit_as_without_benchmarks(fit, searched):
    search = "--trainer.callbacks+=callbacks.EffOPD"
    run = fit("run", search, *BENCHMARKS, "--trainer.callbacks.every_n_steps=1", steps=2)
    assert set(benches(run)) == {1, 2}
    assert_same(student_of(load(run)), student_of(load(searched)))
    assert_same(load(run)["optimizer_states"], load(searched)["optimizer_states"])


def test_benchmarks_stand_before_and_after_a_search(fit):
    """Before it are the weights that the optimizer has left: those of a run without searches."""
    search = ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.schedule=2"]
    search += ["--trainer.callbacks.score=TeacherKL", "--model.optimizer.lr=3e-4"]
    around = [*BENCHMARKS, "--trainer.callbacks.every_n_steps=0"]
    run = fit("run", *search, *around, "--trainer.callbacks.around_searches=true", steps=2)
    plain = fit("plain", "--model.optimizer.lr=3e-4", *around, steps=2)
    before = benches(run, "bench/arithmetic/avg@2/before")
    assert before == benches(plain)
    assert set(before) == set(benches(run)) == {2}
    values = [row for row in read_metrics(run / "metrics.csv") if "bench/arithmetic/length" in row]
    assert len(values) == 1  # evaluated once after the search


def test_benchmarks_follow_a_schedule_too(fit):
    powers = ["--trainer.callbacks.every_n_steps=0", "--trainer.callbacks.schedule=powers_of_two"]
    assert set(benches(fit("run", *BENCHMARKS, *powers, steps=3))) == {1, 2, 3}  # 3 is the last


def test_the_report_draws_benchmarks(fit, tmp_path):
    run = fit("run", *BENCHMARKS, "--trainer.callbacks.every_n_steps=1", steps=2)
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert 'alt="benchmarks of the runs"' in (tmp_path / "page.html").read_text()
    figure = bench_curves([read_run(run)])
    (axis,) = [axis for axis in figure.axes if axis.lines]
    assert axis.get_title() == "arithmetic/avg@2"
    (line,) = axis.lines
    assert dict(zip(*line.get_data(), strict=True)) == pytest.approx(benches(run))


def write_sums(folder, monkeypatch, text="", instead=""):
    """Write a task of the user's, arithmetic by another name, perhaps with one change."""
    monkeypatch.setenv("OPD_TASKS", "")
    (folder / "sums.yaml").write_text(
        (ROOT / "tasks/arithmetic/arithmetic.yaml")
        .read_text()
        .replace("task: arithmetic", "task: sums")
        .replace(text or "task: sums", instead or "task: sums")
        .replace("../_shared", str(ROOT / "tasks/_shared"))
    )


def test_a_folder_of_the_users_has_tasks_too(tmp_path, monkeypatch):
    write_sums(tmp_path, monkeypatch)
    command = ["evaluate", "--model", "embedded:base", "--tasks", "sums,arithmetic"]
    options = ["--include_path", str(tmp_path), "--limit", "4", "--output", str(tmp_path / "out")]
    assert main([*command, *options]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert list(found) == ["sums", "arithmetic"]


def test_a_task_that_does_not_sample_is_greedy_whatever_its_temperature(tmp_path, monkeypatch):
    write_sums(tmp_path, monkeypatch, "do_sample: true", "do_sample: false")
    command = ["evaluate", "--model", "embedded:base", "--tasks", "sums", "--samples", "2"]
    options = ["--include_path", str(tmp_path), "--limit", "20", "--output", str(tmp_path / "out")]
    assert main([*command, *options]) == 0
    first, second = {}, {}
    for one in completions(tmp_path / "out"):
        (second if one["copy"] else first)[one["problem"]] = one["text"]
    assert first == second


def test_problems_are_read_once_in_a_run(fit, monkeypatch):
    read = []
    monkeypatch.setattr(tasks, "load_rows", lambda *args: read.append(args) or load_rows(*args))
    fit("run", *BENCHMARKS, "--trainer.callbacks.every_n_steps=1", steps=3)
    assert len(read) == 1
