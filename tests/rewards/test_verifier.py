"""Programs that are the answers of prompts, as recipes of code have them."""

from __future__ import annotations

import json
import time

import pytest

from opd.answers import Verifier
from opd.errors import UserError
from opd.rewards import ProgramVerifier

SUM = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})
LINES = json.dumps({"inputs": [["1 2"], ["3 4"]], "outputs": [["3"], ["7"]]})
CALL = json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]})
BARE = json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]})
TEXT = json.dumps({"fn_name": "add", "inputs": ["1\n2", "3\n4"], "outputs": ["3", "7"]})
WORDS = json.dumps({"fn_name": "twice", "inputs": ["ab", "c d"], "outputs": ["abab", "c dc d"]})
READS = "print(sum(map(int, input().split())))"
ADDS = "def add(a, b):\n    return a + b"
ROOT = "print(int(sqrt(16)) - 4 + sum(map(int, input().split())))"


def fenced(code: str) -> str:
    return f"So:\n```python\n{code}\n```\n"


@pytest.fixture(scope="module")
def verifier() -> ProgramVerifier:
    return ProgramVerifier(allow_code_execution=True, seconds=5)


@pytest.mark.parametrize(
    ("program", "tests", "right"),
    [
        (READS, SUM, True),
        (READS, LINES, True),
        (READS + " # 3", SUM.replace("7", "8"), False),
        ("print(3)", SUM, False),
        (ROOT, SUM, True),  # what programs may take for granted is imported
        (ADDS, CALL, True),
        (ADDS, BARE, True),
        (ADDS, TEXT, True),
        (ADDS.replace("+", "*"), TEXT, False),
        ("def twice(text):\n    return 2 * text", WORDS, True),
        (READS, "", False),
        (READS, "{", False),
        (READS, '{"inputs": [], "outputs": []}', False),
    ],
)
def test_a_program_is_right_if_it_passes_all_tests(verifier, program, tests, right):
    assert verifier(fenced(program), tests) is right
    assert not verifier(program, tests)  # in no block


def test_several_are_judged_each_by_its_own_tests(verifier):
    assert isinstance(verifier, Verifier)
    completions = [fenced(READS), fenced(ADDS), "", fenced(READS)]
    assert verifier.verify(completions, [SUM, SUM, SUM, LINES]) == [True, False, False, True]
    assert verifier.verify(completions[:2], [CALL, CALL]) == [False, True]
    assert verifier.verify([], []) == []


def test_a_program_that_takes_too_long_is_wrong():
    verifier = ProgramVerifier(allow_code_execution=True, seconds=0.5)
    start = time.monotonic()
    assert not verifier(fenced("while True: pass"), SUM)
    assert time.monotonic() - start < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "runs programs that the student writes; allow it with --model.verifier.allow_code_"),
        ({"allow_code_execution": True, "seconds": 0}, "ProgramVerifier.seconds=0 must be above 0"),
        ({"allow_code_execution": True, "memory_gib": -1}, "ProgramVerifier.memory_gib=-1 must be"),
        ({"allow_code_execution": True, "workers": 0}, "ProgramVerifier.workers=0 must be above 0"),
    ],
)
def test_nothing_runs_that_was_not_allowed(options, message):
    with pytest.raises(UserError, match=message):
        ProgramVerifier(**options)


def test_answers_that_are_no_tests_are_told_before_the_run(verifier, caplog):
    verifier.check([SUM, CALL, LINES])
    assert not caplog.records
    bad = json.dumps({"fn_name": "add", "inputs": [1], "outputs": []})
    verifier.check([SUM, "{", bad, CALL])
    assert "2 of 4 prompts have tests that are none or cannot be read" in caplog.text
    with pytest.raises(UserError, match=r"no answer is \(tests that cannot be read: '42'\)"):
        verifier.check(["42", "x"])
