"""Completions with right and wrong programs, in every kind of test."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opd.errors import UserError
from opd.rewards import CodeTests, CodeVerifier, Sandbox, extract_code
from opd.rewards.code import same_output


@pytest.fixture(scope="module")
def verifier() -> CodeVerifier:
    return CodeVerifier(Sandbox())


def fenced(code: str) -> str:
    return f"This is it.\n```python\n{code}\n```\n"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("", None),
        ("print(1)", None),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```py\nprint(1)\n```", "print(1)\n"),
        ("```Python3 title=x\nprint(1)\n```", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("``` python\r\nprint(1)\r\n```", "print(1)\r\n"),
        ("~~~\nprint(1)\n~~~", "print(1)\n"),
        ("```python\n1\n```\nor\n```python\n2\n```", "2\n"),
        ("```python\n1\n```\nIts output:\n```text\n2\n```", "1\n"),
        ("1. So:\n   ```python\n   print(1)\n   ```", "print(1)\n"),
        ("The code:```python\nprint(1)\n```", "print(1)\n"),
        ("Of text:\n```text\n1\n```", None),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''\n"),
        ("```python\n1\n```\nno, better:\n```python\n2", None),
        ("```python\n1", None),
        ("Use ```print(1)``` here", None),
        ("```python\n```", ""),
        ("<think>```python\n1\n```</think>\n```python\n2\n```", "2\n"),
    ],
)
def test_the_last_closed_block_is_the_code(completion, code):
    assert extract_code(completion) == code


def test_extraction_takes_no_time_for_any_text():
    assert extract_code("`" * 1_000_000) is None
    assert extract_code("```python\n" * 200_000) is None


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("1 2\n", "1 2", True),
        ("1 2  \n\n", "1 2\n", True),
        ("1\n2", "1 2", True),
        ("1 2", "1 3", False),
        ("1 2", "1 2 3", False),
        ("", "", True),
        ("", "1", False),
        ("YES", "yes", False),
        ("0.3333334", "0.3333333", True),
        ("0.3334", "0.3333", False),
        ("1000000.5", "1000000.0", True),
        ("100.1", "100.0", False),
        ("3.0", "3", True),
        ("3.0000001", "3", False),
        ("10000001", "10000000", False),
        ("1e1", "10", True),
        ("1_0", "10", False),
        ("nan", "1.0", False),
        ("inf", "1e999", False),
        ("-0", "0", True),
        ("12345678901234567890", "12345678901234567891", False),
    ],
)
def test_outputs_are_compared_by_words_and_numbers(actual, expected, same):
    assert same_output(actual, expected) is same


DOUBLE = CodeTests("stdin", cases=(("1\n", "2\n"), ("21\n", "42\n")), seconds=2)


@pytest.mark.parametrize(
    ("completion", "reason", "test"),
    [
        (fenced("print(2 * int(input()))"), "passed", None),
        (fenced("if __name__ == '__main__':\n    print(2 * int(input()))"), "passed", None),
        (fenced("print(2)"), "wrong answer", 1),
        (fenced("print(3)"), "wrong answer", 0),
        (fenced("print(2 * int(input())); raise SystemExit(1)"), "error", 0),
        (fenced("print(2 *"), "error", 0),
        (fenced("x = bytearray(10 << 30)"), "memory", 0),
        ("", "no code", None),
        ("print(2)", "no code", None),
        (fenced("print(2 * int(input()))")[:-5], "no code", None),
    ],
)
def test_of_kind_stdin(completion, reason, test, verifier):
    verdict = verifier(completion, DOUBLE)
    assert (verdict.reason, verdict.test) == (reason, test)
    assert verdict.passed is (reason == "passed")


SORTED_PAIR = """
import sys
given, correct, output = (open(path).read() for path in sys.argv[1:])
pair = sorted(map(int, output.split()))
assert correct
print(int(pair[0] + pair[1] == int(given)))
"""


@pytest.mark.parametrize(
    ("program", "checker", "reason"),
    [
        ("print(1, int(input()) - 1)", SORTED_PAIR, "passed"),
        ("print(int(input()) - 2, 2)", SORTED_PAIR, "passed"),
        ("print(1, 1)", SORTED_PAIR, "wrong answer"),
        ("print('1')", SORTED_PAIR, "wrong answer"),
        ("print(1)", "print(1)\nraise SystemExit(1)", "wrong answer"),
        ("print(1)", "print('1 1')", "wrong answer"),
        ("print(1)", "print(0.5)", "wrong answer"),
    ],
)
def test_a_checker_decides_where_several_outputs_are_right(program, checker, reason, verifier):
    tests = CodeTests("stdin", cases=(("5\n", "2 3\n"),), checker=checker)
    assert verifier.judge(program, tests).reason == reason


ADD = CodeTests(
    "call",
    cases=(([[1, 2]], 3), ([[]], 0), ([[0.1, 0.2]], 0.3)),
    entry_point="total",
    seconds=1,
)


@pytest.mark.parametrize(
    ("program", "reason", "test"),
    [
        ("def total(xs): return sum(xs)", "passed", None),
        ("class Solution:\n    def total(self, xs): return sum(xs)", "passed", None),
        ("total = sum", "passed", None),
        ("def total(xs): return xs[0] + xs[1]", "error", 1),
        ("def total(xs): return 3", "wrong answer", 1),
        ("def total(xs): return str(sum(xs))", "wrong answer", 0),
        ("def total(xs): return bytearray(10 << 30)", "memory", 0),
        ("x = bytearray(10 << 30)", "memory", None),
        ("def totals(xs): return sum(xs)", "error", None),
        ("raise ValueError('x')", "error", None),
        ("def total(xs:", "error", None),
    ],
)
def test_of_kind_call(program, reason, test, verifier):
    verdict = verifier.judge(program, ADD)
    assert (verdict.reason, verdict.test) == (reason, test), verdict


@pytest.mark.parametrize(
    ("program", "test"),
    [("def total(xs):\n    while not xs: pass\n    return sum(xs)", 1), ("while True: pass", None)],
)
def test_each_call_has_its_time(program, test, verifier):
    verdict = verifier.judge(program, replace(ADD, seconds=0.5))
    assert (verdict.reason, verdict.test) == ("time", test), verdict


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        ("(1, [2, (3,)])", [1, [2, [3]]], True),
        ("[1, 2]", [1, 2, 3], False),
        ("{1: 'a', 'b': None}", {"1": "a", "b": None}, True),
        ("{1: 'a', '1': 'a'}", {"1": "a"}, False),
        ("{1, 2}", [1, 2], False),
        ("'ab'", ["a", "b"], False),
        ("10**30", 10**30, True),
        ("-(10**30) - 1", -(10**30), False),
        ("1.0000001", 1.0, True),
        ("1.0000001", 1, False),
        ("1.0", 1, True),
        ("float('nan')", 1.0, False),
        ("float('inf')", 1.0, False),
        ("None", None, True),
        ("0", None, False),
        ("True", True, True),
        ("'\\ud800'", "\ud800", True),
        ("__import__('numpy').float64(0.5)", 0.5, True),
        ("__import__('numpy').int64(3)", 3, True),
        ("__import__('numpy').array([3])", 3, False),
        ("__import__('collections').Counter('aab')", {"a": 2, "b": 1}, True),
        ("iter([1])", [1], False),
        ("print", None, False),
    ],
)
def test_values_of_calls_are_compared_as_json_has_them(value, expected, same, verifier):
    tests = CodeTests("call", cases=(([], expected),), entry_point="f")
    verdict = verifier.judge(f"def f(): return {value}", tests)
    assert verdict.reason == ("passed" if same else "wrong answer"), verdict


def test_a_method_has_an_instance_of_its_own_in_each_case(verifier):
    program = """
class Stack:
    def __init__(self): self.items = []
    def push(self, item):
        self.items.append(item)
        return self.items
"""
    tests = CodeTests("call", cases=(([1], [1]), ([2], [2])), entry_point="Stack.push")
    assert verifier.judge(program, tests).passed


PROGRAM = """
import collections, dataclasses, math, operator
from typing import NamedTuple
def add(a, b=0, *, more=0): return a + b + more
def sort(xs): xs.sort()
def deepen(d): d['x'][0].add(3); d['y'] = d['x']; return d['x']
def count(n):
    for i in range(n): yield i
def endless(): yield from iter(int, 1)
def apply(f, x): return f(x)
def compose(f, g): return lambda x: f(g(x))
def refuse(x): raise ValueError('no', x)
class Own(Exception): pass
def refuse_in_its_own_way(): raise Own('own')
def kinds(): return (None, True, 1 << 100, 1.5, 2j, 'é', b'x', [1], (1, (2,)), {1}, frozenset({2}),
    {(1, 2): [3]}, range(3), float('inf'), collections.deque([1]), bytearray(b'y'))
class Pair(NamedTuple):
    a: int
    b: int
def pair(): return Pair(1, 2)
class Point:
    def __init__(self, x): self.x = x
    def moved(self, by): return Point(self.x + by)
    def __len__(self): return self.x
def norm(point): return abs(point.x)
def decimals():
    import datetime, decimal, fractions
    return (decimal.Decimal('1.50'), fractions.Fraction(1, 3), datetime.date(2024, 2, 29))
def scaled(array):
    array *= 2
    return array.sum(), array > 2
def sum(a, b): return a * b
"""


@pytest.mark.parametrize(
    "tests",
    [
        "assert add(1) == 1 and add(1, 2) == 3 and add(1, b=2, more=3) == 6",
        "xs = [3, 1, 2]; same = xs\nassert sort(xs) is None\nassert same == [1, 2, 3]",
        "s = {1}; d = {'x': [s]}; r = deepen(d)\nassert s == {1, 3} and r is d['x'] is d['y']",
        "assert list(count(3)) == [0, 1, 2]\nn = count(2); assert next(n) == 0 and next(n) == 1",
        "import itertools; assert list(itertools.islice(endless(), 3)) == [0, 0, 0]",
        "assert apply(lambda x: x + [4], [3]) == [3, 4] and apply(len, 'ab') == 2",
        "calls = []\nassert apply(calls.append, 3) is None and calls == [3]",
        "fs = [sorted]; assert apply(fs[0], [2, 1]) == [1, 2] and fs == [sorted]",
        "assert apply(list, iter([1, 2])) == [1, 2] and apply(next, iter([1, 2])) == 1",
        "assert compose(lambda x: x + 1, abs)(-3) == 4",
        "try: refuse(3)\nexcept ValueError as e: assert e.args == ('no', 3)\nelse: assert False",
        "try: refuse_in_its_own_way()\nexcept Exception as e: assert 'own' in str(e)",
        "def f(x): raise KeyError(x)\ntry: apply(f,1)\nexcept KeyError as e: assert e.args == (1,)",
        "assert kinds()[:13] == (None, True, 1 << 100, 1.5, 2j, 'é', b'x', [1], (1, (2,)), {1},"
        " frozenset({2}), {(1, 2): [3]}, range(3)) and list(kinds()[14]) == [1]",
        "assert [type(v).__name__ for v in kinds()] == 'NoneType bool int float complex str bytes "
        "list tuple set frozenset dict range float deque bytearray'.split()",
        "assert pair() == (1, 2)",
        "assert apply(type, 3) is int and apply(type, None) is type(None)",
        "p = Point(3).moved(2)\nassert p.x == 5 and norm(Point(-2)) == 2 and len(p) == 5",
        "p = Point(3); p.x = 4; assert norm(p) == 4 and p != Point(4)",
        "import decimal, fractions, datetime\nassert decimals() == (decimal.Decimal('1.5'), "
        "fractions.Fraction(1, 3), datetime.date(2024, 2, 29))",
        "import numpy as np\na = np.arange(3.0); total, large = scaled(a)\n"
        "assert a.tolist() == [0, 2, 4] and total == 6.0 and type(total) is np.float64\n"
        "assert large.dtype == bool and large.tolist() == [False, False, True]",
        "assert sum([1, 2]) == 3 and abs(-1) == 1",
        "import unittest\nclass Test(unittest.TestCase):\n"
        "    def test(self): self.assertEqual(add(1, 2), 3)\nunittest.main(__name__)",
        "print('x' * 1000000); assert add(1, 2) == 3",
    ],
)
def test_tests_see_what_they_would_see_in_one_process(tests, verifier):
    verdict = verifier.judge(PROGRAM, CodeTests("program", tests=tests))
    assert verdict.passed, verdict


def test_an_entry_point_may_be_called_like_something_built_in(verifier):
    tests = CodeTests("program", tests="assert sum(3, 4) == 12", entry_point="sum")
    assert verifier.judge(PROGRAM, tests).passed


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("assert add(1) == 2, 'one'", "wrong answer"),
        ("assert add(1) == 2 or missing(3)", "error"),
        ("import sys\nif add(1) == 1: sys.exit(1)", "error"),
        ("assert add(None) == 1", "error"),
        ("assert apply(lambda x: 1 / x, 0)", "error"),
        ("assert refuse(3)", "error"),
        ("import os; os._exit(0)", "error"),
        ("add(1", "error"),
        ("assert pair() is pair()", "wrong answer"),
        (
            "import unittest\nclass Test(unittest.TestCase):\n"
            "    def test(self): self.assertEqual(add(1, 2), 4)\nunittest.main(__name__)",
            "error",
        ),
    ],
)
def test_tests_fail_as_they_would_in_one_process(tests, reason, verifier):
    verdict = verifier.judge(PROGRAM, CodeTests("program", tests=tests, seconds=1))
    assert verdict.reason == reason, verdict


def test_a_test_program_has_its_time(verifier):
    tests = CodeTests("program", tests="while add(1): pass", seconds=0.5)
    assert verifier.judge(PROGRAM, tests).reason == "time"


def test_the_setup_is_there_for_the_program_and_for_the_tests(verifier):
    setup = """
import math
def poly(xs, x):
    return sum(c * math.pow(x, i) for i, c in enumerate(xs))
def root(xs):
    '''The prompt's unfinished function.'''
"""
    tests = CodeTests("program", setup=setup, tests="assert abs(poly([1, 2], root([1, 2]))) < 1e-9")
    tests = CodeTests(**{**vars(tests), "entry_point": "root"})
    right = "def root(xs):\n    assert poly([1], 5) == 1\n    return -xs[0] / xs[1]"
    assert verifier.judge(right, tests).passed
    assert verifier.judge("pass", tests).reason == "error"  # it returns None
    cheat = f"{right.replace('-xs', 'xs')}\ndef poly(xs, x): return 0 * x + (len(xs) == 1)"
    assert verifier.judge(cheat, tests).reason == "wrong answer"


def test_tests_travel_as_json():
    for tests in (DOUBLE, ADD, CodeTests("program", setup="x = 1", tests="assert f()", memory=1)):
        again = CodeTests.from_json(tests.to_json())
        assert again == tests
        hash(CodeTests("stdin", cases=(("1", "2"),)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "shell"}, "kind is 'shell'"),
        ({"kind": "stdin"}, "kind stdin need cases"),
        ({"kind": "program"}, "kind program need tests"),
        ({"kind": "call", "cases": (([], 1),)}, "need entry_point"),
        ({"kind": "stdin", "cases": (("1", "2"), ("1",))}, "case 1 is not"),
        ({"kind": "stdin", "cases": (([1], "2"),)}, "case 0 is not"),
        ({"kind": "call", "cases": ((1, 2),), "entry_point": "f"}, "case 0 is not"),
        ({"kind": "program", "tests": "x", "checker": "y"}, "have no checker"),
        ({"kind": "program", "tests": "x", "seconds": 0}, "above 0"),
    ],
)
def test_tests_that_cannot_be_are_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        CodeTests(**arguments)


@pytest.mark.parametrize("text", ["", "x", "1", "[]", "{}", '{"kind": "stdin", "colour": 1}'])
def test_a_string_that_holds_no_tests_is_refused(text):
    with pytest.raises(UserError, match="no tests of code"):
        CodeTests.from_json(text)


def test_what_the_setup_has_imported_is_not_what_is_asked_for(verifier):
    """As LiveCodeBench's imports do: operator has an add too."""
    tests = CodeTests("call", (([1, 2], 4),), entry_point="add", setup="from operator import *")
    method = "class Solution:\n    def add(self, a, b):\n        return a + b + 1\n"
    function = "def add(a, b):\n    return a + b + 1\n"
    assert verifier.judge(method, tests).passed
    assert verifier.judge(function, tests).passed
    assert verifier.judge("x = 1\n", tests).reason == "error"


def test_what_must_stand_first_in_a_program_does(verifier):
    tests = CodeTests("stdin", (("", "3\n"),), setup="import math")
    assert verifier.judge(
        "from __future__ import annotations\nprint(math.floor(3.5))", tests
    ).passed
