"""The table of benchmarks: each is loaded, asked and scored on made-up rows of its own schema."""

import base64
import csv
import json
import os
import pickle
import re
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from benchmark_rows import CHECKER, MAKERS, SECRET, packed
from conftest import ROOT
from datasets.exceptions import DatasetNotFoundError
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate as evaluate_tasks
from lm_eval.tasks import TaskManager

from eval.benchmarks import (
    Completion,
    Verdict,
    benchmarks,
    benchmarks_in,
    load_problems,
    read_benchmark,
    rows,
    scorer_of,
    use_data,
)
from eval.benchmarks.code import read_tests
from eval.benchmarks.formats import order_of
from eval.benchmarks.problem import render
from eval.benchmarks.scoring import letter
from eval.benchmarks.tasks import process_results
from eval.evaluate import evaluate
from eval.harness import Settings, load_tasks
from opd.embedded.arithmetic import ANSWER_PATTERN
from opd.errors import UserError
from opd.rewards import Sandbox

MATH = [
    *("aime24", "aime25", "aime26", "hmmt_feb25", "hmmt_nov25", "amc23", "math500", "minerva"),
    *("olympiadbench", "gsm8k"),
]
CODE = ["humaneval_plus", "mbpp_plus", "livecodebench", "taco", "codeforces"]
NAMES = [*MATH, "gpqa_diamond", *CODE, "arithmetic"]
SUFFIX = {"aime24": ".parquet", "aime25": ".csv", "gsm8k": ".arrow"}  # the others: .jsonl
LEFT = {"taco": 997, "codeforces": 463, "livecodebench": 374}
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."


def write(path, made):
    """Write rows as a file of any kind that is read."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, made[0])
            writer.writeheader()
            writer.writerows(made)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(made)
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path)
    return path


def made(name, count=None):
    return [MAKERS[name](i) for i in range(benchmarks()[name].rows if count is None else count)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with copies, which benchmarks are read from."""
    monkeypatch.setenv(rows.DATA, str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A copy of every benchmark."""
    folder = tmp_path_factory.mktemp("copies")
    for name in MAKERS:
        write(folder / f"{name}{SUFFIX.get(name, '.jsonl')}", made(name))
    return folder


@pytest.fixture
def problems(copies, monkeypatch):
    monkeypatch.setenv(rows.DATA, str(copies))

    def load(name):
        return load_problems(benchmarks()[name], copies).docs

    return load


def refusal(name, folder):
    with pytest.raises(UserError) as error:
        load_problems(benchmarks()[name], folder)
    message = str(error.value)
    assert "\n" not in message
    assert name in message
    assert "apples" not in message  # nothing of a row
    return message


def test_the_names_are_a_contract():
    index = TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False)
    assert sorted(index.all_tasks) == sorted(benchmarks()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_is_sampled_as_the_paper_does(name):
    benchmark = benchmarks()[name]
    short = name == "arithmetic"
    assert (benchmark.samples, benchmark.max_tokens) == ((1, 24) if short else (32, 16384))
    assert benchmark.licence
    if "(" in benchmark.label:  # a report says how many problems there are
        expected = benchmark.problems or benchmark.rows
        assert str(expected) in benchmark.label


@pytest.mark.parametrize("name", NAMES)
def test_lm_eval_loads_the_task_and_its_prompts_give_nothing_away(name, copies, monkeypatch):
    monkeypatch.setenv(rows.DATA, str(copies))
    manager = TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False)
    task = manager.load([name])["tasks"][name]
    config, benchmark = task.config, benchmarks()[name]
    assert (config.repeats, config.generation_kwargs["max_gen_toks"]) == (
        benchmark.samples,
        benchmark.max_tokens,
    )
    sampling = {"until": [], "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert sampling.items() <= config.generation_kwargs.items()
    assert (name in CODE) == task.UNSAFE_CODE if name in CODE else not hasattr(task, "UNSAFE_CODE")
    docs = list(task.eval_docs)
    assert len(docs) == LEFT.get(name, benchmark.rows)
    for doc in docs:
        prompt = task.doc_to_text(doc)
        assert prompt == doc["prompt"]
        assert SECRET not in prompt
        assert task.doc_to_target(doc) == doc["reference"]
        if name in MATH:
            basket = int(re.sub(r"\.0$|\D", "", doc["reference"])) - first(name)
            assert prompt.endswith(f"in basket {basket}?\n{BOXED}")
            assert doc["reference"] not in prompt


def first(name):
    return {"aime26": 277, "hmmt_feb25": 103, "hmmt_nov25": 3}.get(name, 90001)


@pytest.mark.parametrize("name", [*MATH, "gpqa_diamond", "arithmetic"])
def test_answers_are_scored(name, problems):
    doc = problems(name)[1]
    reference = doc["reference"]
    if name == "arithmetic":
        right, wrong, cut = f"3c0={reference}", "3c0=1", "3c0="
    elif name == "gpqa_diamond":
        right, cut = rf"so \boxed{{\text{{{reference}}}}}", r"so \boxed{"
        wrong = rf"so \boxed{{{'ABCD'['BCDA'.index(reference)]}}}"
    else:
        right, wrong, cut = rf"I say \boxed{{{reference}}}", r"I say \boxed{17}", r"I say \boxed{9"
    score = scorer_of(benchmarks()[name])
    verdicts = [score(completion, doc) for completion in (right, wrong, cut, "")]
    assert [verdict.right for verdict in verdicts] == [True, False, False, False]
    assert [verdict.answer is None for verdict in verdicts] == [False, False, True, True]
    metrics = process_results(doc, [[right, wrong, cut, "", right]])
    assert metrics["avg@5"] == pytest.approx(2 / 5)
    assert metrics["no_answer"] == pytest.approx(2 / 5)
    assert metrics["maj@5"] == 1.0
    assert "length" not in metrics  # plain text does not say


def program(name, i, add):
    """Right for problem i where add is i."""
    function = f"def add(n):\n    return n + {add}\n"
    if name in ("humaneval_plus", "mbpp_plus"):
        return function
    if name == "livecodebench" and i % 2:
        return (
            f"class Solution:\n    def add(self, a: List[int], b):\n        return a + b + {add}\n"
        )
    if name == "taco" and i % 2:
        return f"def add(a, b):\n    return a + b + {add}\n"
    if name == "codeforces":
        return f"a, b = map(int, input().split())\nprint(a + b + {add})\n"
    return f"a, b = int(input()), int(input())\nprint(a + b + {add})\n"


@pytest.mark.parametrize("name", CODE)
def test_programs_are_run_on_the_tests(name, problems):
    score = scorer_of(benchmarks()[name], Sandbox())
    for i, doc in enumerate(problems(name)[:8]):
        right, wrong = (f"Like so:\n```python\n{program(name, i, add)}```\n" for add in (i, i + 1))
        cut = right.rpartition("```")[0]
        verdicts = [score(completion, doc) for completion in (right, wrong, cut, "")]
        assert [verdict.right for verdict in verdicts] == [True, False, False, False], (name, i)
        assert verdicts[0].answer.strip("\n") == program(name, i, i).strip("\n")
        assert verdicts[2].answer is verdicts[3].answer is None
        carried = [Completion(text, 7, False, v) for text, v in zip("abcd", verdicts, strict=True)]
        metrics = process_results(doc, [carried])
        assert (metrics["avg@4"], metrics["no_answer"], metrics["length"]) == (0.25, 0.5, 7)
        assert not any(key.startswith("maj") for key in metrics)


def test_programs_are_not_run_unless_something_may(problems):
    doc = problems("mbpp_plus")[0]
    assert process_results(doc, [["no program"]])["no_answer"] == 1
    with pytest.raises(UserError, match="to run what a model wrote"):
        process_results(doc, [["```python\nprint()\n```"]])


def test_every_test_of_a_problem_counts(problems):
    """Of LiveCodeBench the private ones too, however they are kept."""
    for doc in problems("livecodebench")[:4]:
        tests = read_tests(doc["tests"])
        assert len(tests.cases) == 4
        assert (tests.seconds, tests.memory) == (6.0, 4 << 30)
        assert ("packed" in doc["tests"]) == (int(doc["id"][1:]) % 4 < 2)
    first, second = (json.loads(doc["tests"]) for doc in problems("codeforces")[:2])
    assert (first["seconds"], first["memory"]) == (2.5, 1 << 30)
    assert (second["seconds"], second["memory"]) == (2.5, 256 << 20)
    assert (first["checker"], second["checker"]) == ("", CHECKER)
    assert json.loads(problems("taco")[0]["tests"])["seconds"] == 10


def test_rows_that_are_no_problems_are_counted(copies, caplog):
    left = {name: load_problems(benchmarks()[name], copies).left_out for name in CODE}
    assert left["livecodebench"] == {"contests outside of 2024-08-01..2025-02-28": 681}
    assert left["taco"] == {"no tests": 2, "tests that cannot be read": 1}
    incomplete = {"official tests incomplete": 3, "interactive": 1, "read and write files": 1}
    assert left["codeforces"] == incomplete
    assert "taco: 3 of 1000 rows left out: 2 no tests, 1 tests that cannot be read" in caplog.text


def test_a_prompt_has_what_a_program_needs(problems):
    (human, _), (mbpp, _) = problems("humaneval_plus")[:2], problems("mbpp_plus")[:2]
    assert '"""Return n plus 0."""' in human["prompt"]
    assert "assert add(1) == 1" in mbpp["prompt"]
    reads, calls = problems("livecodebench")[:2]
    assert "### Format: Read the inputs from stdin" in reads["prompt"]
    assert "```python\nclass Solution:\n    def add(self, a: int" in calls["prompt"]
    text = problems("codeforces")[1]["prompt"]
    for part in ("Adding", "Time limit: 2.5 seconds", "256 megabytes", "Add two numbers and 1."):
        assert part in text
    for part in ("#### Input\nTwo numbers.", "Input:\n1 2\n\nOutput:\n4", "#### Note\nMind"):
        assert part in text


def test_only_what_is_plain_is_unpickled():
    class Trap:
        def __reduce__(self):
            return print, ("it was run",)

    for value, message in [
        (base64.b64encode(zlib.compress(pickle.dumps(Trap()))).decode(), "ask for builtins.print"),
        (packed([])[:-4], "cut short"),
        (base64.b64encode(zlib.compress(b"no pickle")).decode(), "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_tests(json.dumps({"kind": "stdin", "cases": [], "packed": value}))


def test_private_tests_that_are_none_are_found_when_they_are_read(data):
    given = made("livecodebench")
    for private in ("nonsense", base64.b64encode(zlib.compress(b"no pickle")).decode()):
        given[3]["private_test_cases"] = private
        write(data / "livecodebench.jsonl", given)
        message = refusal("livecodebench", data)
        assert "row 4 of lighteval/code_generation_lite cannot be read as livecodebench" in message


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_another_number_of_rows_is_refused(name, data):
    given = made(name)
    write(data / f"{name}.jsonl", given[:-1])
    assert f"has {len(given) - 1} rows, and the benchmark {len(given)}" in refusal(name, data)
    write(data / f"{name}.jsonl", [*given, given[0]])
    assert f"has {len(given) + 1} rows, and the benchmark {len(given)}" in refusal(name, data)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_missing_field_is_refused(name, data):
    given = made(name)
    for field in benchmarks()[name].fields.values():
        key = field if isinstance(field, str) else field[1]
        for row in given:
            row["elsewhere"] = row.pop(key)
        write(data / f"{name}.jsonl", given[:2])
        assert f"row 1, has no field {key!r} (it has" in refusal(name, data)
        for row in given:
            row[key] = row.pop("elsewhere")


def test_what_is_another_data_set_is_refused(data):
    given = made("aime26")
    write(data / "aime26.jsonl", given[::-1])
    assert "the first answer is not 277" in refusal("aime26", data)
    write(data / "aime26.jsonl", [*given[:-1], {**given[-1], "id": 5}])
    assert "row 30 of math-ai/aime26 has the id '5' of an earlier one" in refusal("aime26", data)
    write(data / "aime26.jsonl", [*given[:-1], {**given[-1], "answer": None}])
    assert "row 30 of math-ai/aime26: its field 'answer' is empty" in refusal("aime26", data)
    contests = made("livecodebench")
    contests[0]["contest_date"] = "2024-07-31T19:30:00"
    write(data / "livecodebench.jsonl", contests)
    assert "373 problems are left of 1055 rows" in refusal("livecodebench", data)


def test_copies_may_be_a_folder_of_files(data, monkeypatch):
    given = made("aime24")
    (data / "aime24").mkdir()
    write(data / "aime24" / "part-1.parquet", given[:20])
    write(data / "aime24" / "part-2.parquet", given[20:])
    with monkeypatch.context() as patch:  # a file system may list them in any order
        parts = [data / "aime24" / f"part-{i}.parquet" for i in (2, 1)]
        patch.setattr(Path, "iterdir", lambda folder: iter(parts))
        docs = load_problems(benchmarks()["aime24"], data).docs
    assert [doc["id"] for doc in docs] == [f"2024-I-{i}" for i in range(30)]
    write(data / "aime24.jsonl", given)
    assert "has aime24.jsonl and aime24; keep one" in refusal("aime24", data)
    (data / "aime24.jsonl").unlink()
    for path in (data / "aime24").iterdir():
        path.unlink()
    assert "is empty; give --data DIR" in refusal("aime24", data)


def test_what_is_no_copy_is_named(data):
    layout = "give --data DIR, with DIR/aime24{.parquet,.jsonl,.csv,.arrow} or a folder of such"
    assert layout in refusal("aime24", data)
    (data / "aime24.jsonl").write_text('{"Problem": "apples"\n')
    assert "aime24.jsonl line 1: is not JSON" in refusal("aime24", data)
    (data / "aime24.jsonl").unlink()
    (data / "aime24.parquet").write_text("apples")
    assert "aime24.parquet: cannot be read as .parquet" in refusal("aime24", data)
    write(data / "gpqa_diamond.csv", made("gpqa_diamond"))
    assert "is not https://openaipublic.blob" in refusal("gpqa_diamond", data)


def test_the_folder_of_copies_is_an_option(copies, monkeypatch):
    monkeypatch.setenv(rows.DATA, "")
    with pytest.raises(UserError, match="--data no/such: is no folder"):
        evaluate("no/model", "aime24", data="no/such")
    use_data(copies)
    assert len(load_tasks(["aime25"], Settings(samples=2))["aime25"].eval_docs) == 30
    use_data(None)
    assert rows.data_folder() is None


def hub_says(monkeypatch, error=None, token=None, silent=None, found=None):
    """Stand in for the hub; returns what it is asked."""
    asked = []

    def load(*args, **kwargs):
        asked.append((*args, *kwargs.values()))
        if error:
            raise error
        return found

    monkeypatch.setattr(rows.hub, "unreachable", lambda *args: silent)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", load)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    return asked


GATED = "Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub. You must be authenticated."


@pytest.mark.parametrize(
    ("name", "hub", "parts"),
    [
        (
            "gpqa_diamond",
            {"error": DatasetNotFoundError(GATED)},
            [
                *("is gated, and there is no token", "huggingface.co/datasets/Idavidrein/gpqa"),
                *("hf auth login", "HF_TOKEN", "--data DIR", "gpqa_diamond.csv: as DIR/gpqa_dia"),
            ],
        ),
        (
            "gpqa_diamond",
            {"error": DatasetNotFoundError(GATED), "token": "hf_x"},
            ["the token's user has no access", "accept its terms at https://"],
        ),
        (
            "hmmt_feb25",
            {"error": ConnectionError("no"), "silent": "the hub cannot be reached (no route)"},
            ["the hub cannot be reached (no route), and MathArena/hmmt_feb_2025", "--data DIR"],
        ),
        (
            "taco",
            {"error": OSError("disk"), "silent": None},
            ["BAAI/TACO@1257571d3ae2", "cannot be loaded (OSError: disk)", "--data DIR"],
        ),
    ],
)
def test_a_hub_that_gives_nothing_is_explained(monkeypatch, name, hub, parts):
    hub_says(monkeypatch, **hub)
    message = refusal(name, None)
    for part in parts:
        assert part in message


def test_the_hub_is_asked_for_what_the_table_says(monkeypatch, copies, tmp_path):
    asked = hub_says(monkeypatch, found=made("gsm8k"))
    assert len(load_problems(benchmarks()["gsm8k"]).docs) == 1319
    revision = "cc7b047b6e5bb11b4f1af84efc572db110a51b3c"
    assert asked == [("openai/gsm8k", "main", "test", revision)]
    asked = hub_says(monkeypatch, found=copies / "taco.jsonl")
    assert len(load_problems(benchmarks()["taco"]).docs) == 997
    revision = "1257571d3ae21509282a69a0e34d85cb6d85b594"
    assert asked == [("BAAI/TACO", "ALL/test-00000-of-00001.parquet", "dataset", revision)]
    asked = hub_says(monkeypatch, found=made("hmmt_nov25"))
    assert len(load_problems(benchmarks()["hmmt_nov25"]).docs) == 30
    assert asked == [("MathArena/hmmt_nov_2025", None, "train", None)]  # no revision was seen


ORDER = (
    "from eval.benchmarks.formats import order_of; print([order_of(f'rec{i}') for i in range(50)])"
)


def test_options_come_in_an_order_that_is_balanced_and_the_same_in_every_process(problems):
    places = Counter(order_of(f"rec{i}").index(0) for i in range(2000))
    chi_square = sum((places[k] - 500) ** 2 / 500 for k in range(4))
    assert chi_square < 11.34  # of three degrees of freedom, exceeded once in a hundred times
    assert len({order_of(f"rec{i}") for i in range(2000)}) == 24
    assert [order_of(f"rec{i}") for i in (0, 1)] == [(2, 3, 1, 0), (2, 0, 1, 3)]  # for ever
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # this process has another one
    elsewhere = subprocess.run(
        [sys.executable, "-c", ORDER], env=environment, capture_output=True, check=True, text=True
    )
    assert elsewhere.stdout.strip() == str([order_of(f"rec{i}") for i in range(50)])
    for i, doc in enumerate(problems("gpqa_diamond")):
        assert f"{doc['reference']}) apple {i}\n" in doc["prompt"] + "\n"
        assert f") pear {i}.1\n" in doc["prompt"]  # stripped
        assert doc["prompt"].startswith(f"What is in basket {i}?\n\nA) ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        *((text, "C") for text in ("C", "(C)", "C.", "C)", " $C$ ", r"\text{C}", r"\textbf{(C)}")),
        *((text, None) for text in ("", "c", "E", "CD", "C D", "C. apple", "answer: C", "(C")),
    ],
)
def test_a_letter_is_a_letter_and_nothing_more(text, found):
    assert letter(text) == found
    doc = {"id": "1", "scorer": "choice", "reference": "C"}
    score = scorer_of(benchmarks()["gpqa_diamond"])
    assert score(rf"A or \boxed{{{text}}}", doc) == Verdict(found == "C", found)
    assert score(text, doc) == Verdict(found == "C", found)


def test_an_answer_may_have_a_unit_and_a_tolerance(problems):
    score = scorer_of(benchmarks()["olympiadbench"])
    docs = problems("olympiadbench")
    assert docs[1]["prompt"].startswith("There are baskets.\nHow many")
    for text, right in [("90002", 1), (r"90002\ \text{km/h}", 1), ("90002 km/h", 1), ("9 km/h", 0)]:
        assert score(rf"\boxed{{{text}}}", docs[1]).right == bool(right), text
    assert [score(rf"\boxed{{{x}}}", docs[2]).right for x in (90003.4, 90003.6)] == [True, False]
    assert not score(r"\boxed{90002.4}", docs[1]).right


def test_answers_are_grouped_by_what_they_mean():
    group = scorer_of(benchmarks()["aime24"]).group
    assert group([r"\frac{1}{2}", None, "0.5", "2", "1/2", "2.0", None]) == [
        0,
        None,
        0,
        1,
        0,
        1,
        None,
    ]
    assert scorer_of(benchmarks()["gpqa_diamond"]).group(["C", "A", None, "C"]) == [0, 1, None, 0]
    assert scorer_of(benchmarks()["taco"]).group(["print()"]) is None


def test_a_completion_is_its_text_and_what_is_known_of_it():
    completion = Completion("4", tokens=3, truncated=True, verdict=Verdict(True, "4"))
    assert completion == "4"
    again = pickle.loads(pickle.dumps(completion))
    assert (again, again.tokens, again.truncated) == ("4", 3, True)
    assert again.verdict == Verdict(True, "4")
    doc = {"id": "1", "scorer": "math", "reference": "5"}
    metrics = process_results(doc, [[completion, Completion(r"\boxed{6}", 5, False)]])
    assert (metrics["avg@2"], metrics["length"], metrics["truncated"]) == (0.5, 4.0, 0.5)


class Parrot(LM):
    """Says what it is told, and how long that is."""

    def __init__(self, say):
        super().__init__()
        self.say = say

    def generate_until(self, requests, disable_tqdm=False):
        said = Counter()
        answers = []
        for request in requests:
            answers.append(self.say(request.doc, said[request.doc["id"]]))
            said[request.doc["id"]] += 1
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test_lm_eval_takes_the_means_of_all_metrics(copies, monkeypatch):
    """Of thirty problems ten are right in all four samples, ten in one, ten in none."""
    monkeypatch.setenv(rows.DATA, str(copies))

    def say(doc, sample):
        right = (4, 1, 0)[int(doc["id"].rpartition("-")[2]) % 3]
        answer = doc["reference"] if sample < right else str(sample)
        return Completion(rf"\boxed{{{answer}}}", tokens=10 * sample, truncated=sample == 3)

    loaded = {"tasks": load_tasks(["aime24"], Settings(samples=4))}
    results = evaluate_tasks(Parrot(say), loaded, bootstrap_iters=100)["results"]["aime24"]
    means = {"avg@4": 5 / 12, "pass@2": (1 + 0.5) / 3, "pass@4": 2 / 3, "length": 15.0}
    means |= {"truncated": 0.25, "no_answer": 0.0, "maj@4": 2 / 3, "maj_ties": 2 / 3}
    for metric, mean in means.items():
        assert results[f"{metric},none"] == pytest.approx(mean), metric
    assert 0.05 < results["avg@4_stderr,none"] < 0.1


NEW = """
include: {shared}/math.yaml
task: baskets
dataset_path: me/baskets
test_split: test
metadata:
  version: 1.0
  label: Baskets (3)
  revision: none seen
  fields: {{problem: question, answer: gold}}
  rows: 3
  licence: mine
  gated: false
"""


@pytest.fixture
def new(tmp_path):
    path = tmp_path / "baskets.yaml"
    path.write_text(NEW.format(shared=ROOT / "tasks" / "_shared"))
    return path


def test_a_new_benchmark_of_a_known_format_is_one_file(new, data):
    write(
        data / "baskets.jsonl", [{"question": f"Apples in {i}?", "gold": i + 7} for i in range(3)]
    )
    index = TaskManager(include_path=str(new.parent), include_defaults=False)
    (task,) = index.load(["baskets"])["tasks"].values()
    doc = task.eval_docs[2]
    assert task.doc_to_text(doc) == f"Apples in 2?\n{BOXED}"
    metrics = task.process_results(doc, [[r"\boxed{9}", r"\boxed{8}"]])
    assert metrics["avg@2"] == 0.5
    assert read_benchmark(new).samples == 32
    assert list(benchmarks_in(new.parent)) == ["baskets"]


@pytest.mark.parametrize(
    ("old", "replaced", "message"),
    [
        ("rows: 3", "rows: three", "metadata.rows must be int, got 'three'"),
        ("rows: 3", "rows: true", "metadata.rows must be int, got True"),
        ("rows: 3", "rows: 0", "metadata.rows must be at least 1, got 0"),
        ("rows: 3", "rows: 3\n  gatted: true", "metadata has gatted, which mean nothing here"),
        ("gated: false", "gated: maybe", "metadata.gated must be bool, got 'maybe'"),
        ("  licence: mine\n", "", "metadata.licence is missing"),
        ("  revision: none seen\n", "", "metadata.revision is missing"),
        ("answer: gold", "gold: gold", "metadata.fields of the format answer are answer, problem"),
        ("gated: false", "gated: false\n  window: [1, 2]", "metadata.window must be two days"),
        ("test_split: test\n", "", "test_split is missing"),
        ("math.yaml", "sampling.yaml", "dataset_kwargs is missing"),
        ("math.yaml", "maths.yaml", "is not the YAML of a benchmark"),
        ("metadata:", "metadata", "is not the YAML of a benchmark"),
        (
            "metadata:",
            "dataset_kwargs: {format: answer, scorer: luck, prompt: x}\nmetadata:",
            "dataset_kwargs.scorer 'luck' must be one of math, choice, code, pattern",
        ),
        (
            "metadata:",
            "dataset_kwargs: {format: prose, scorer: math, prompt: x}\nmetadata:",
            "dataset_kwargs.format 'prose' must be one of answer, choice, humaneval",
        ),
        (
            "metadata:",
            "dataset_kwargs: {format: answer, scorer: code, prompt: x}\nmetadata:",
            "code needs dataset_kwargs.seconds and memory_gib",
        ),
    ],
)
def test_a_table_that_means_nothing_is_refused(new, old, replaced, message):
    new.write_text(new.read_text().replace(old, replaced))
    with pytest.raises(UserError) as error:
        read_benchmark(new)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_braces_of_a_problem_are_its_own():
    text = render("{problem}\n{options}", problem=r"\frac{options}{2} {starter}", options="A) {x}")
    assert text == "\\frac{options}{2} {starter}\nA) {x}"


def test_the_embedded_task_is_scored_as_its_prompts_are():
    benchmark = benchmarks()["arithmetic"]
    assert benchmark.pattern == ANSWER_PATTERN
