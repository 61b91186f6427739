r"""Calculate with LaTeX expressions in a process of its own, which is killed if it takes too long.

sympy calculates 10^(10^10) in one call that no signal handler interrupts, and math_verify's own
time limit is a signal, which only the main thread can have. So the process has an alarm that the
kernel sees to: it ends after some seconds of processor time, however busy the machine is. It starts
with the first question, answers one line of JSON with another, and ends with the one that asks.

math_verify's parser reads the LaTeX; the comparison is exact (`same`), as math_verify's is not.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

START_SECONDS = 120.0  # importing sympy, on a busy machine
PATIENCE = 20  # times the limit of processor time that passes on a clock: others compute, too
MEMORY = 4 << 30  # bytes; a power can fill a machine faster than the time runs out
POINTS = (  # at which expressions with variables are compared; each variable has its own order
    "7/3", "-11/7", "2/13", "19/5", "-1/3", "29/11", "-31/9", "41/17"
)  # fmt: skip
ENOUGH = 4  # points at which both expressions have a value


def equivalent(
    answer: str, reference: str, seconds: float, tolerance: float | None = None
) -> tuple[bool, float] | None:
    """Say if two LaTeX expressions are equal, and what processor time that took; None if too long.

    Args:
        answer: An expression, equation or inequality.
        reference: The other.
        seconds: Processor time that it may take.
        tolerance: Largest absolute difference of two numbers; None if they are to be equal.
    """
    return _WORKER.ask([answer, reference, seconds, tolerance], seconds)


class _Worker:
    """The process, started when it is needed and again when it had to be killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a forked process must not share its parent's

    def ask(self, question: list[object], seconds: float) -> tuple[bool, float] | None:
        with self._lock:
            process = self._running()
            reply = b""
            with contextlib.suppress(OSError):  # it has died: of memory, perhaps
                assert process.stdin is not None
                process.stdin.write(json.dumps(question).encode() + b"\n")
                reply = _read_line(process, PATIENCE * seconds)
            if not reply:
                self.stop()
                return None
            verdict, spent = json.loads(reply)
            return bool(verdict), float(spent)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],  # -P: no module of the folder that it runs in
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
            if not _read_line(self._process, START_SECONDS):
                self.stop()
                raise RuntimeError("the process that checks mathematics does not start")
        return self._process

    def stop(self) -> None:
        """Kill it, if this process has started it."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        self._process = None


_WORKER = _Worker()
atexit.register(_WORKER.stop)


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Read a line; nothing if it does not come in time, or the process is gone."""
    assert process.stdout is not None
    deadline, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            return b""
        part = process.stdout.read(4096)
        if not part:
            return b""
        line += part
    return line


# in the process; sympy's objects are Any, as sympy ships no types


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Any:
    import sympy
    from latex2sympy2_extended import latex2sympy

    read = latex2sympy(text, is_real=True, convert_degrees=False, normalization_config=None)
    return read.subs(sympy.Symbol("i", real=True), sympy.I)


def same(answer: str, reference: str, tolerance: float | None) -> bool:
    """Whether two expressions are equal at every point, or two relations hold at the same ones."""
    import sympy

    a, b = _parse(answer), _parse(reference)
    if isinstance(a, sympy.Rel) and isinstance(b, sympy.Rel):
        return _same_relation(a, b)
    if isinstance(a, sympy.Set) and isinstance(b, sympy.Set):
        return a == b or bool(a.symmetric_difference(b).is_empty)
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False
    if tolerance is not None and not (a.free_symbols or b.free_symbols):
        return bool(abs((a - b).doit().evalf(30)) <= sympy.Rational(str(tolerance)))
    return _vanishes(a - b)


def _same_relation(a: Any, b: Any) -> bool:
    """Whether `a` is `b`, multiplied by a constant or with its sides exchanged."""
    import sympy

    if isinstance(a, sympy.Gt | sympy.Ge):
        a = a.reversed
    if isinstance(b, sympy.Gt | sympy.Ge):
        b = b.reversed
    if type(a) is not type(b) or a.free_symbols != b.free_symbols or not a.free_symbols:
        return False
    left, right = a.lhs - a.rhs, b.lhs - b.rhs
    for point in _points(a.free_symbols):
        at, other = _value(left.subs(point)), _value(right.subs(point))
        if at is not None and other is not None and at and other:
            ratio = left.subs(point) / right.subs(point)
            inequality = isinstance(a, sympy.Lt | sympy.Le)
            if inequality and not _value(ratio).is_positive:
                return False
            return _vanishes(left - ratio * right)
    return False


def _points(symbols: Any) -> list[dict[Any, Any]]:
    import sympy

    ordered = sorted(symbols, key=str)
    values = [sympy.Rational(value) for value in POINTS]
    return [
        {symbol: values[(i + 3 * j) % len(values)] + j for j, symbol in enumerate(ordered)}
        for i in range(len(values))
    ]


def _vanishes(difference: Any) -> bool:
    """Whether an expression is 0, at all points where it has a value."""
    import sympy

    difference = difference.doit()
    if not difference.free_symbols:
        value = _value(difference)
        return value is not None and value == 0
    values = [_value(difference.subs(point)) for point in _points(difference.free_symbols)]
    known = [value for value in values if value is not None]
    if any(value != 0 for value in known):
        return False
    return len(known) >= ENOUGH or bool(sympy.simplify(difference) == 0)


def _value(constant: Any) -> Any:
    """Return a constant, as 0 if no digit of it differs from 0; None without a finite value."""
    import sympy

    constant = constant.doit()
    if constant.is_Rational:
        return constant
    parts = constant.evalf(15, maxn=200).as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in parts):
        return None
    # sympy marks by a precision of 1 that all digits have cancelled
    real, imaginary = (
        sympy.S.Zero if part.is_Float and part._prec == 1 else part for part in parts
    )
    return real + sympy.I * imaginary


def main() -> None:
    """Answer lines [answer, reference, seconds, tolerance] with lines [verdict, seconds spent]."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; the one that asks decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process; no Python has to run for it
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no reply
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    same(r"\sqrt{2x}", r"\frac{1}{x}", None)  # loads the rest
    print("true", file=replies, flush=True)
    for line in sys.stdin:
        answer, reference, seconds, tolerance = json.loads(line)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = same(answer, reference, tolerance)
        except Exception:  # whatever text provokes in sympy: it is no answer
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([verdict, time.process_time() - start]), file=replies, flush=True)


if __name__ == "__main__":
    main()
