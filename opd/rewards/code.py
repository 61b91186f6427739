"""Is a completion's program right? It runs in a sandbox, and what decides is not where it runs.

The program's process never holds what it is compared with. Standard output is compared here; of
calls and of test programs the expected values are in a second sandbox, from which the first is
asked (`calls.py`). So a program that exits early, prints what a judge might look for, or overwrites
builtins has done so in its own house.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import marshal
import math
import re
import socket
import textwrap
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from opd.errors import UserError
from opd.rewards.sandbox import Limits, Outcome, Sandbox

Kind = Literal["stdin", "call", "program"]
Reason = Literal["passed", "no code", "wrong answer", "time", "memory", "output", "error"]

CHECKER_SECONDS = 30.0  # whatever the program may take; also of processes that only compare
LONGEST_DETAIL = 500  # characters

_FENCE = re.compile(r"^([^`~\n]*)(`{3,}|~{3,})([^`\n]*)$", re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)
_LANGUAGES = ("python", "python3", "py", "py3")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?", re.ASCII)


def extract_code(completion: str) -> str | None:
    """Return the last fenced block of Python, or of no language; None without one.

    Words may stand before the fence that opens a block, as in ``The code:```python``. A block that
    is not closed is one of a completion that was cut off: it does not count, and the blocks before
    it were not the answer either, so that there is none.
    """
    code: str | None = None
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(completion):
        before, ticks, after = fence[1].strip(), fence[2], fence[3].split()
        if opened is None:
            opened = fence
        elif not before and ticks.startswith(opened[2]) and not (after and after[0][0].isalnum()):
            language = opened[3].split()
            if not language or language[0].lower() in _LANGUAGES:
                code = completion[opened.end() + 1 : fence.start()]
                if opened[1] and not opened[1].strip():
                    code = textwrap.dedent(code)  # of a list's item
            opened = None
    return code if opened is None else None


@dataclass(frozen=True)
class CodeTests:
    """How a program is tested. Strings of JSON (`to_json`) are its form in rows of data.

    Args:
        kind: ``stdin``: a program that reads input and prints output. ``call``: a function that
            is called. ``program``: functions that a test program calls, as HumanEval's and
            MBPP's do.
        cases: Of stdin, pairs (input, expected output). Of call, pairs (list of arguments,
            expected value) of JSON's values. Of program, none.
        entry_point: Of call, the name of the function, or ``Class.method``, where each case has a
            new instance; a plain name that is a method of the class ``Solution`` will do. Of
            program, the function under test; needed if it is called like something built in.
        setup: Trusted code that is executed before the completion's code and, apart from it,
            before the tests: HumanEval's prompt, imports.
        tests: Of program, the test program. It passes if it comes to its end, or exits with 0.
        checker: Of stdin, a program that decides where several outputs are right, as
            ``generated_checker`` of open-r1/codeforces: it is called as ``checker.py input.txt
            correct_output.txt solution_output.txt`` and prints 1 or 0.
        seconds: Of processor time, for each case of stdin and call, and for a test program in all.
            Of the clock it may be twice as long, so that a busy machine does not decide.
        memory: Bytes of address space.

    Raises:
        UserError: The kind is unknown, or lacks what it needs.
    """

    kind: Kind
    cases: tuple[tuple[Any, Any], ...] = ()
    entry_point: str = ""
    setup: str = ""
    tests: str = ""
    checker: str = ""
    seconds: float = 10.0
    memory: int = 2 << 30

    def __post_init__(self) -> None:
        needed = {"stdin": "cases", "call": "cases", "program": "tests"}
        if self.kind not in needed:
            raise UserError(f"tests: kind is {self.kind!r}, and must be one of {list(needed)}")
        if not getattr(self, needed[self.kind]):
            raise UserError(f"tests of kind {self.kind} need {needed[self.kind]}")
        if self.kind == "call" and not self.entry_point:
            raise UserError("tests of kind call need entry_point, the function that is called")
        if self.checker and self.kind != "stdin":
            raise UserError(f"tests of kind {self.kind} have no checker; those of kind stdin may")
        if not (0 < self.seconds < math.inf and self.memory > 0):
            raise UserError("tests: seconds and memory must be above 0")
        for number, case in enumerate(self.cases):
            first = case[0] if len(case) == 2 else None
            if not isinstance(first, str if self.kind == "stdin" else list):
                wanted = "(text, text)" if self.kind == "stdin" else "(list of arguments, value)"
                raise UserError(f"tests of kind {self.kind}: case {number} is not {wanted}")

    def to_json(self) -> str:
        """Return all of it as one string."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CodeTests:
        """Return what `to_json` was called on; raises UserError for any other string."""
        try:
            values = json.loads(text)
            cases = tuple(tuple(case) for case in values.pop("cases", ()))
            return cls(cases=cases, **values)
        except UserError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"these are no tests of code ({error}): {text[:80]!r}") from error


@dataclass(frozen=True)
class Verdict:
    """Why a completion passes or does not.

    ``test`` is the number of the case that it fails, from 0; None where the reason is of no single
    case. ``detail`` is for people, and of no fixed form.
    """

    reason: Reason
    test: int | None = None
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether all tests pass."""
        return self.reason == "passed"


class CodeVerifier:
    """Decides whether a completion's program passes all its tests; for several threads at a time.

    Args:
        sandbox: Where the programs run.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def __call__(self, completion: str, tests: CodeTests) -> Verdict:
        """Judge the code of a completion; it stops at the first test that fails."""
        code = extract_code(completion)
        return Verdict("no code") if code is None else self.judge(code, tests)

    def judge(self, code: str, tests: CodeTests) -> Verdict:
        """Judge a program."""
        if tests.kind == "stdin":
            return self._judge_stdin(code, tests)
        return self._judge_calls(code, tests)

    def _judge_stdin(self, code: str, tests: CodeTests) -> Verdict:
        program = _with_setup(tests.setup, code)
        limits = _limits(tests, tests.seconds)
        for number, (given, expected) in enumerate(tests.cases):
            outcome = self.sandbox.run(program, stdin=given, limits=limits)
            if outcome.status != "ok":
                return _failed(outcome, number)
            if tests.checker:
                right = self._checker_accepts(tests, given, expected, outcome.stdout)
            else:
                right = same_output(outcome.stdout, expected)
            if not right:
                return Verdict("wrong answer", number, outcome.stdout[:LONGEST_DETAIL])
        return Verdict("passed")

    def _checker_accepts(self, tests: CodeTests, given: str, expected: str, output: str) -> bool:
        files = {"input.txt": given, "correct_output.txt": expected, "solution_output.txt": output}
        outcome = self.sandbox.run(
            tests.checker,
            files=files,
            arguments=tuple(files),
            limits=_limits(tests, CHECKER_SECONDS),
        )
        return outcome.status == "ok" and outcome.stdout.strip() == "1"

    def _judge_calls(self, code: str, tests: CodeTests) -> Verdict:
        """Run the program in one sandbox and the tests in another, joined by a socket."""
        seconds = tests.seconds * max(1, len(tests.cases))
        job: dict[str, Any] = {"entry_point": tests.entry_point}
        if tests.kind == "call":
            job |= {"cases": tests.cases, "seconds": 2 * tests.seconds}
        else:
            job |= {"setup": tests.setup, "tests": tests.tests}
        ours, theirs = socket.socketpair()
        with ours, theirs:
            limits = _limits(tests, seconds)
            judge = self.sandbox.start(_calls(), stdin=json.dumps(job), limits=limits, channel=ours)
            try:
                program = self.sandbox.start(
                    _calls(),
                    stdin=json.dumps({"setup": tests.setup, "program": code}),
                    limits=limits,
                    channel=theirs,
                )
            except BaseException:
                judge.stop()
                raise
        judged = judge.wait()
        ended = program.stop()
        if judged.status != "ok":
            return _failed(judged, None)
        if not judged.stdout:
            return Verdict("error", None, "the tests end their process")
        verdict = json.loads(judged.stdout)
        if verdict["reason"] == "lost":
            return self._lost(ended, verdict)
        return Verdict(verdict["reason"], verdict["test"], verdict["detail"][:LONGEST_DETAIL])

    def _lost(self, ended: Outcome, verdict: dict[str, Any]) -> Verdict:
        """Return the verdict of a program that ended before its tests did."""
        reason: Reason = ended.status if ended.status in ("time", "memory") else "error"
        detail = f"{verdict['detail']} (return code {ended.returncode})"
        return Verdict(reason, verdict["test"], detail)


def _with_setup(setup: str, code: str) -> str:
    """Put trusted code before a program, and what must come first of it before both."""
    if not setup:
        return code
    first = "".join(f"{line}\n" for line in _FUTURE.findall(code))
    return f"{first}{setup}\n{_FUTURE.sub('', code)}"


def same_output(actual: str, expected: str) -> bool:
    """Whether an output is the expected one.

    White space at the ends of lines, and empty lines at the end, do not count. If the lines differ
    still, the words must be the same ones, however they are spread over lines; a number may be
    written in another way, and may differ by 1e-6 (relative, or absolute below 1) where the
    expected one has a fraction or an exponent.
    """
    if _lines(actual) == _lines(expected):
        return True
    words, wanted = actual.split(), expected.split()
    return len(words) == len(wanted) and all(map(_same_word, words, wanted))


def _lines(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip().split("\n")


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    if not (_NUMBER.fullmatch(word) and _NUMBER.fullmatch(wanted)):
        return False
    if wanted.lstrip("+-").isdigit():
        return Decimal(word) == Decimal(wanted)
    left, right = float(word), float(wanted)
    return left == right or abs(left - right) <= 1e-6 * max(1.0, abs(right))


def _limits(tests: CodeTests, seconds: float) -> Limits:
    return Limits(wall=2 * seconds, cpu=seconds, memory=tests.memory)


def _failed(outcome: Outcome, number: int | None) -> Verdict:
    assert outcome.status != "ok"
    detail = outcome.stderr.rstrip()[-LONGEST_DETAIL:]
    return Verdict(outcome.status, number, detail)


@functools.cache
def _calls() -> bytes:
    """Return `calls.py` compiled, once for all programs."""
    source = Path(__file__).with_name("calls.py")
    code = compile(source.read_text(encoding="utf-8"), source.name, "exec")
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)
