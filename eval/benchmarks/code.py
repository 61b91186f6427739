"""Data sets of programming problems: what they ask, and the tests that a program has to pass.

Tests travel in a problem's field ``tests``, as JSON. Those that a data set compresses stay so until
``plain_tests`` opens them: LiveCodeBench's would fill the memory.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Iterable, Mapping
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, NoReturn

from eval.benchmarks.problem import Doc, LeftOut, Record, render

if TYPE_CHECKING:
    from eval.benchmarks.table import Benchmark

Case = list[str]  # input and output
LARGEST = 1 << 30  # bytes that compressed tests may have

# What LiveCodeBench has imported before a program starts (its testing_util.py); models rely on it.
_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json"),
)
IMPORTS = "\n".join(
    [
        *(f"from {module} import *" for module in (*_MODULES, "builtins", "typing")),
        *(f"import {module}" for module in _MODULES),
        "sys.setrecursionlimit(50000)",
        "",
    ]
)
_FUTURE = re.compile(r"^from __future__ import .*$\n?", re.MULTILINE)
_FENCE = re.compile(r"([ \t]*)(`{3,})([^`]*)")


def json_tests(
    kind: str,
    benchmark: Benchmark,
    *,
    cases: Iterable[Case] = (),
    function: str | None = None,
    program: str | None = None,
    seconds: float | None = None,
    memory_bytes: int | None = None,
    checker: str | None = None,
) -> str:
    """Write tests as JSON.

    Args:
        kind: ``stdin`` (a case is what the program reads and prints), ``call`` (it is the JSON of
            the list of the function's arguments, and that of its value), or ``program``.
        benchmark: Gives the limits that the problem does not have.
        cases: Inputs and outputs.
        function: What is called; of the class ``Solution`` where the program has one.
        program: Of the kind ``program``: what is run after the answer, and must not raise.
        seconds: Time limit of a case.
        memory_bytes: Memory limit.
        checker: A Python program that judges an output where several are right.
    """
    fields = {
        "kind": kind,
        "cases": list(cases),
        "function": function,
        "program": program,
        "seconds": float(benchmark.seconds or 0) if seconds is None else seconds,
        "memory_bytes": benchmark.memory_bytes if memory_bytes is None else memory_bytes,
        "checker": checker,
    }
    return json.dumps(fields)


def humaneval(record: Record, benchmark: Benchmark) -> Doc:
    """HumanEval(+): complete a function. Its imports and helpers stand before the answer."""
    problem = str(record["problem"])
    program = f"{record['tests']}\n\ncheck({record['function']})\n"
    return {
        "prompt": render(benchmark.prompt, problem=problem.strip()),
        "reference": "",
        "tests": json_tests("program", benchmark, program=program),
        "prefix": problem,
    }


def mbpp(record: Record, benchmark: Benchmark) -> Doc:
    """MBPP(+): write a function; the few asserts of ``test_list`` are shown."""
    lines = [*_texts(record["imports"] or []), str(record["tests"])]
    return {
        "prompt": render(
            benchmark.prompt,
            problem=str(record["problem"]).strip(),
            examples="\n".join(_texts(record["examples"])),
        ),
        "reference": "",
        "tests": json_tests("program", benchmark, program="\n".join(lines) + "\n"),
        "prefix": "",
    }


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):  # of a text, letter by letter, there would be a list too
        raise TypeError("no list of texts")
    return value


def livecodebench(record: Record, benchmark: Benchmark) -> Doc:
    """LiveCodeBench: a program that reads stdin, or a method of the starter code.

    Public and private tests count. The private ones are JSON, or the base64 of the zlib of the
    pickle of JSON.
    """
    if benchmark.window is not None:
        first, last = benchmark.window
        if not first <= _day(record["date"]) <= last:
            raise LeftOut(f"contests outside of {first}..{last}")
    function = json.loads(record["facts"]).get("func_name")
    kind = "call" if function else "stdin"
    cases = [_case(case, kind) for case in json.loads(record["public"])]
    private = str(record["private"]).strip()
    packed = None
    if private.startswith("["):
        cases += [_case(case, kind) for case in json.loads(private)]
    else:
        packed = private
        _begins_well(packed)
    tests = json.loads(json_tests(kind, benchmark, cases=cases, function=function))
    return {
        "prompt": _ask(benchmark, str(record["problem"]), record["starter"], function),
        "reference": "",
        "tests": json.dumps({**tests, "packed": packed} if packed else tests),
        "prefix": IMPORTS,
    }


def _day(value: object) -> date:
    if isinstance(value, date):  # a datetime is one
        return value.date() if isinstance(value, datetime) else value
    return datetime.fromisoformat(str(value)).date()


def _case(case: Mapping[str, str], kind: str) -> Case:
    if kind == "call":  # one argument a line, as JSON
        return [f"[{', '.join(case['input'].splitlines())}]", case["output"]]
    return [case["input"], case["output"]]


def _ask(benchmark: Benchmark, problem: str, starter: str | None, function: str | None) -> str:
    problem = problem.strip()
    if not function or benchmark.prompt_call is None:
        return render(benchmark.prompt, problem=problem)
    starter = (starter or "").strip("\n") or f"def {function}("
    return render(benchmark.prompt_call, problem=problem, starter=starter)


def plain_tests(tests: str) -> str:
    """Return tests with nothing compressed in them: what ``json_tests`` writes.

    Raises:
        ValueError: The compressed ones are broken, too large, or hold more than text.
    """
    fields = json.loads(tests)
    packed = fields.pop("packed", None)
    if packed is None:
        return tests
    cases = [_case(case, fields["kind"]) for case in _unpack(packed)]
    return json.dumps({**fields, "cases": fields["cases"] + cases})


class _Plain(pickle.Unpickler):
    """Reads plain values: a pickle that asks for a class or a function could run anything."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"compressed tests ask for {module}.{name}")


def _unpack(packed: str) -> list[dict[str, str]]:
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(base64.b64decode(packed, validate=True), LARGEST)
        if not stream.eof:
            raise ValueError(f"compressed tests are cut short, or have more than {LARGEST} bytes")
        cases: list[dict[str, str]] = json.loads(_Plain(io.BytesIO(data)).load())
    except (zlib.error, pickle.UnpicklingError, EOFError, TypeError) as error:
        raise ValueError(f"compressed tests cannot be read ({error})") from error
    return cases


def _begins_well(packed: str) -> None:
    """Look at the beginning of compressed tests, so that a wrong field is found when it is read."""
    try:
        start = zlib.decompressobj().decompress(base64.b64decode(packed[:4000]), 8)
    except zlib.error as error:
        raise ValueError("private tests are neither JSON nor compressed") from error
    if not start.startswith(pickle.PROTO):
        raise ValueError("private tests hold no pickle")


def taco(record: Record, benchmark: Benchmark) -> Doc:
    """TACO: a program that reads stdin, or a function where ``fn_name`` names one.

    A value that a function must return stands in a list of its own in most rows, and not in
    others: where all outputs of a problem are lists of one, that one is meant.
    """
    try:
        tests = json.loads(record["tests"] or "{}")
        pairs = list(zip(tests.get("inputs", []), tests.get("outputs", []), strict=True))
    except (ValueError, AttributeError, TypeError) as error:
        raise LeftOut("tests that cannot be read") from error
    if not pairs:
        raise LeftOut("no tests")
    if not record["problem"]:
        raise LeftOut("no question")
    function = tests.get("fn_name") or None
    if function:
        single = all(isinstance(output, list) and len(output) == 1 for _, output in pairs)
        cases = [
            [
                json.dumps(arguments if isinstance(arguments, list) else [arguments]),
                json.dumps(output[0] if single else output),
            ]
            for arguments, output in pairs
        ]
    else:
        cases = [[_lines(given), _lines(printed)] for given, printed in pairs]
    kind = "call" if function else "stdin"
    return {
        "prompt": _ask(benchmark, str(record["problem"]), record["starter"], function),
        "reference": "",
        "tests": json_tests(kind, benchmark, cases=cases, function=function),
        "prefix": IMPORTS,
    }


def _lines(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "\n".join(map(str, text))


def codeforces(record: Record, benchmark: Benchmark) -> Doc:
    """Codeforces, as Open-R1 has it: a program that reads stdin, and at times a checker.

    Limits are the problem's own, in seconds and in megabytes of 2^20 bytes.
    """
    if record["interaction"]:
        raise LeftOut("interactive")
    if (record["mode"] or "stdio") != "stdio":
        raise LeftOut("read and write files")
    cases = _pairs(record["tests"])
    if not record["complete"] or not cases:
        raise LeftOut("official tests incomplete")
    if not record["problem"]:
        raise LeftOut("no description")
    memory = record["memory"]
    tests = json_tests(
        "stdin",
        benchmark,
        cases=cases,
        seconds=None if record["seconds"] is None else float(record["seconds"]),
        memory_bytes=None if memory is None else int(float(memory) * 2**20),
        checker=record["checker"] or None,
    )
    return {
        "prompt": render(benchmark.prompt, problem=_statement(record)),
        "reference": "",
        "tests": tests,
        "prefix": "",
    }


def _statement(record: Record) -> str:
    """Lay a problem out as its page does; the editorial is no part of a record."""
    limits = [
        f"Time limit: {record['seconds']:g} seconds" if record["seconds"] else "",
        f"Memory limit: {record['memory']:g} megabytes" if record["memory"] else "",
    ]
    examples = [
        f"Input:\n{given.strip()}\n\nOutput:\n{printed.strip()}"
        for given, printed in _pairs(record["examples"])
    ]
    parts = [
        ("", str(record["title"])),
        ("", "\n".join(filter(None, limits))),
        ("", record["problem"]),
        ("Input", record["input"]),
        ("Output", record["output"]),
        ("Examples", "\n\n".join(examples)),
        ("Note", record["note"]),
    ]
    return "\n\n".join(
        f"#### {heading}\n{text.strip()}" if heading else text.strip()
        for heading, text in parts
        if text
    )


def _pairs(tests: Any) -> list[Case]:
    """Return inputs and outputs of a list of pairs, or of a pair of lists, as some readers make."""
    if isinstance(tests, Mapping):
        return [list(pair) for pair in zip(tests["input"], tests["output"], strict=True)]
    return [[test["input"], test["output"]] for test in tests or []]


def extract_code(completion: str) -> str | None:
    """Return what stands in the last fenced block that is closed; None without one."""
    found, block, opened = None, list[str](), None
    for line in completion.split("\n"):
        fence = _FENCE.fullmatch(line)
        if opened is None:
            opened, block = fence, []
        elif fence is None or len(fence[2]) < len(opened[2]):
            block.append(line.removeprefix(opened[1]))
        elif fence[3].strip():  # one begins, and the one before was never closed
            opened, block = fence, []
        else:
            found, opened = "\n".join(block), None
    return found


def with_prefix(prefix: str, code: str) -> str:
    """Put imports before a program, and what must come first of it before them."""
    first = "".join(line.rstrip("\n") + "\n" for line in _FUTURE.findall(code))
    return first + prefix + _FUTURE.sub("", code)
