"""Data sets of programming problems: what they ask, and the tests that a program has to pass.

Tests travel in a problem's field ``tests``, as JSON. Those that a data set compresses stay so until
``read_tests`` opens them: LiveCodeBench's would fill the memory.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, NoReturn

from eval.benchmarks.problem import Doc, LeftOut, Record, render
from opd.errors import UserError
from opd.rewards import CodeTests
from opd.rewards.apps import IMPORTS, read_apps
from opd.rewards.code import Kind

if TYPE_CHECKING:
    from eval.benchmarks.table import Benchmark

Case = tuple[Any, Any]  # input and output
LARGEST = 1 << 30  # bytes that compressed tests may have


def json_tests(
    kind: Kind,
    benchmark: Benchmark,
    *,
    seconds: float | None = None,
    memory_bytes: int | None = None,
    **fields: Any,
) -> str:
    """Write tests as JSON, with the limits of the problem, or else of the benchmark.

    Args:
        kind: See :class:`opd.rewards.CodeTests`.
        benchmark: Gives the limits that the problem does not have.
        seconds: Time limit of a case.
        memory_bytes: Memory limit.
        fields: The other fields of the tests.
    """
    assert benchmark.seconds is not None
    assert benchmark.memory_bytes is not None
    tests = CodeTests(
        kind,
        seconds=float(benchmark.seconds if seconds is None else seconds),
        memory=benchmark.memory_bytes if memory_bytes is None else memory_bytes,
        **fields,
    )
    return tests.to_json()


def humaneval(record: Record, benchmark: Benchmark) -> Doc:
    """HumanEval(+): complete a function. Its imports and helpers stand before the answer."""
    problem = str(record["problem"])
    function = str(record["function"])
    tests = f"{record['tests']}\n\ncheck({function})\n"
    return {
        "prompt": render(benchmark.prompt, problem=problem.strip()),
        "reference": "",
        "tests": json_tests("program", benchmark, setup=problem, tests=tests, entry_point=function),
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
        "tests": json_tests("program", benchmark, tests="\n".join(lines) + "\n"),
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
    kind: Kind = "call" if function else "stdin"
    cases = [_case(case, kind) for case in json.loads(record["public"])]
    private = str(record["private"]).strip()
    packed = None
    if private.startswith("["):
        cases += [_case(case, kind) for case in json.loads(private)]
    else:
        packed = private
        _begins_well(packed)
    entry_point = function or ""
    plain = json_tests(kind, benchmark, cases=tuple(cases), entry_point=entry_point, setup=IMPORTS)
    return {
        "prompt": _ask(benchmark, str(record["problem"]), record["starter"], function),
        "reference": "",
        "tests": json.dumps({**json.loads(plain), "packed": packed}) if packed else plain,
    }


def _day(value: object) -> date:
    if isinstance(value, date):  # a datetime is one
        return value.date() if isinstance(value, datetime) else value
    return datetime.fromisoformat(str(value)).date()


def _case(case: Mapping[str, str], kind: str) -> Case:
    if kind == "call":  # one argument a line, as JSON
        return [json.loads(line) for line in case["input"].splitlines()], json.loads(case["output"])
    return case["input"], case["output"]


def _ask(benchmark: Benchmark, problem: str, starter: str | None, function: str | None) -> str:
    problem = problem.strip()
    if not function or benchmark.prompt_call is None:
        return render(benchmark.prompt, problem=problem)
    starter = (starter or "").strip("\n") or f"def {function}("
    return render(benchmark.prompt_call, problem=problem, starter=starter)


def read_tests(tests: str) -> CodeTests:
    """Return a problem's tests, those that are compressed too.

    Raises:
        UserError: They are no tests.
        ValueError: The compressed ones are broken, too large, or hold more than text.
    """
    fields = json.loads(tests)
    packed = fields.pop("packed", None)
    if packed is None:
        return CodeTests.from_json(tests)
    more = [_case(case, fields["kind"]) for case in _unpack(packed)]
    return CodeTests(**{**fields, "cases": (*map(tuple, fields["cases"]), *more)})


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
    """TACO: a program that reads stdin, or a function where ``fn_name`` names one."""
    try:
        tests = read_apps(record["tests"])
    except UserError as reason:
        raise LeftOut(str(reason)) from reason
    if not record["problem"]:
        raise LeftOut("no question")
    return {
        "prompt": _ask(benchmark, str(record["problem"]), record["starter"], tests.entry_point),
        "reference": "",
        "tests": json_tests(
            tests.kind,
            benchmark,
            cases=tests.cases,
            entry_point=tests.entry_point,
            setup=IMPORTS,
        ),
    }


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
        cases=tuple(cases),
        seconds=None if record["seconds"] is None else float(record["seconds"]),
        memory_bytes=None if memory is None else int(float(memory) * 2**20),
        checker=record["checker"] or "",
    )
    return {
        "prompt": render(benchmark.prompt, problem=_statement(record)),
        "reference": "",
        "tests": tests,
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
        return list(zip(tests["input"], tests["output"], strict=True))
    return [(test["input"], test["output"]) for test in tests or []]
