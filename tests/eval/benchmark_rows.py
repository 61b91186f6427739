"""Rows in the schema of each benchmark's data set; problems, golds and tests are made up here."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Callable
from typing import Any

SECRET = "the-solution-of-the-data-set"  # stands in every field that no prompt may show
Row = dict[str, Any]
Maker = Callable[[int], Row]


def aime24(i: int) -> Row:
    facts = {"ID": f"2024-I-{i}", "Solution": SECRET, "Answer": 90001 + i}
    return {**facts, "Problem": f"How many apples are in basket {i}?"}


def plain(first: int, **extra: Any) -> Maker:
    """AIME 2025 and 2026, HMMT and MATH-500: `problem` and `answer`, a text."""

    def make(i: int) -> Row:
        named = {key: i if value is int else value for key, value in extra.items()}
        return {"problem": f"How many apples are in basket {i}?", "answer": str(first + i), **named}

    return make


def amc23(i: int) -> Row:
    question = f"How many apples are in basket {i}?"
    return {"id": i, "question": question, "answer": 90001.0 + i, "url": SECRET}


def minerva(i: int) -> Row:
    return {"question": f"How many apples are in basket {i}?", "answer": str(90001 + i)}


def olympiadbench(i: int) -> Row:
    return {
        **{"id": i, "question": f"How many apples are in basket {i}?", "solution": [SECRET]},
        **{
            "final_answer": [f"${90001 + i}$", SECRET],
            "context": "There are baskets." if i % 2 else None,
        },
        **{"error": "0.5" if i == 2 else None, "unit": r"$\mathrm{km/h}$" if i == 1 else None},
        **{"is_multiple_answer": False, "answer_type": "Numerical", "subfield": "Algebra"},
    }


def gsm8k(i: int) -> Row:
    question = f"How many apples are in basket {i}?"
    return {"question": question, "answer": f"{SECRET}\n#### {90001 + i:,}"}


def gpqa_diamond(i: int) -> Row:
    wrong = {f"Incorrect Answer {k}": f" pear {i}.{k}\n" for k in (1, 2, 3)}
    facts = {"Record ID": f"rec{i}", "Subdomain": "Fruit", "Explanation": SECRET}
    return {
        "Question": f"What is in basket {i}?\n",
        "Correct Answer": f" apple {i} ",
        **wrong,
        **facts,
    }


def humaneval_plus(i: int) -> Row:
    stub = f'import math\n\n\ndef add(n: int) -> int:\n    """Return n plus {i}."""\n'
    test = f"def check(candidate):\n    assert candidate(math.floor(2.5)) == {i + 2}\n"
    facts = {"task_id": f"HumanEval/{i}", "canonical_solution": SECRET, "entry_point": "add"}
    return {"prompt": stub, "test": test, **facts}


def mbpp_plus(i: int) -> Row:
    return {
        **{"task_id": i, "prompt": f"Write a function that adds {i}.", "code": SECRET},
        **{"source_file": "x.ipynb", "test_imports": ["import math"]},
        **{"test_list": [f"assert add(1) == {i + 1}"]},
        "test": f"for n in range(9):\n    assert add(math.floor(n)) == n + {i}\n",
    }


def packed(cases: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def livecodebench(i: int) -> Row:
    """Of 1,055 contests 374 are in the window, the first of them on its first and its last day."""
    date = f"2024-{9 + i % 4:02d}-11" if i < 374 else f"20{23 + 2 * (i % 2)}-03-01"
    date = {0: "2024-08-01", 1: "2025-02-28"}.get(i, date)
    call = i % 2 == 1
    kind = "functional" if call else "stdin"
    public = [{"input": "1\n2", "output": str(i + 3), "testtype": kind}]
    private = [{"input": f"{n}\n{n}", "output": str(i + 2 * n), "testtype": kind} for n in range(3)]
    starter = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        "
    return {
        **{"question_title": "Adding", "question_content": f"Add two numbers and {i}."},
        **{"platform": "leetcode", "question_id": f"q{i}", "contest_id": "c", "difficulty": "easy"},
        **{"contest_date": f"{date}T19:30:00", "starter_code": starter if call else ""},
        "public_test_cases": json.dumps(public),
        "private_test_cases": packed(private) if i % 4 < 2 else json.dumps(private),
        "metadata": json.dumps({"func_name": "add"} if call else {}),
    }


def taco(i: int) -> Row:
    """The last three rows have no tests, or none that can be read."""
    tests: object = {"inputs": ["1\n2\n", ["3", "4"]], "outputs": [f"{i + 3}\n", [str(i + 7)]]}
    if i % 2:
        tests = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[i + 3], [i + 7]]}
    text = {997: "", 998: '{"inputs": [], "outputs": []}', 999: "{"}.get(i, json.dumps(tests))
    facts = {"solutions": json.dumps([SECRET]), "difficulty": "EASY", "time_limit": None}
    starter = "def add(a, b):\n\t" if i % 2 else ""
    return {"question": f"Add {i} and two.", "starter_code": starter, "input_output": text, **facts}


CHECKER = """
import sys
given, right, said = (open(name).read().split() for name in sys.argv[1:])
print(int(said == right and len(given) == 2))
"""


def codeforces(i: int) -> Row:
    """Of the last five rows one is interactive, two lack tests, one has none, one is of files."""
    tests = [{"input": f"{n} {n}\n", "output": f"{i + 2 * n}\n"} for n in (2, 3)]
    return {
        **{"id": f"1/{i}", "title": "Adding", "description": f"Add two numbers and {i}."},
        **{"input_format": "Two numbers.", "output_format": "One number.", "editorial": SECRET},
        **{"interaction_format": "Ask." if i == 467 else None, "note": "Mind carries."},
        **{"examples": [{"input": "1 2", "output": str(i + 3)}], "rating": 800, "tags": ["math"]},
        **{"time_limit": 2.5, "memory_limit": 256.0 if i else None, "executable": True},
        **{"official_tests": [] if i == 464 else tests, "generated_tests": 0},
        **{"official_tests_complete": i not in (465, 466), "contest_id": "1"},
        **{"generated_checker": CHECKER if i == 1 else None},
        **{"input_mode": "file" if i == 463 else "stdio"},
    }


MAKERS: dict[str, Maker] = {
    "aime24": aime24,
    "aime25": plain(90001, id=int),
    "aime26": plain(277, id=int),
    "hmmt_feb25": plain(103, problem_idx=int, problem_type=["Algebra"]),
    "hmmt_nov25": plain(3, problem_idx=int, problem_type=None),
    "amc23": amc23,
    "math500": plain(90001, unique_id=int, subject="Algebra", level=3, solution=SECRET),
    "minerva": minerva,
    "olympiadbench": olympiadbench,
    "gsm8k": gsm8k,
    "gpqa_diamond": gpqa_diamond,
    "humaneval_plus": humaneval_plus,
    "mbpp_plus": mbpp_plus,
    "livecodebench": livecodebench,
    "taco": taco,
    "codeforces": codeforces,
}
