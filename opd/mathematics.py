"""math_verify in a process of its own, which is killed if it takes too long.

sympy calculates 10^(10^10) in one call that no signal interrupts, and math_verify's own time limit
is a signal, which only the main thread can have. The process starts with the first question,
answers one line of JSON with another, and ends with the process that asks.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time

START_SECONDS = 120.0  # importing sympy, on a busy machine
MEMORY = 4 << 30  # bytes; a power can fill a machine faster than the time runs out


def equivalent(answer: str, reference: str, seconds: float) -> bool | None:
    """Whether two LaTeX expressions are equivalent; None if that cannot be said in time."""
    return _WORKER.ask(answer, reference, seconds)


class _Worker:
    """The process, started when it is needed and again when it had to be killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a forked process must not share its parent's

    def ask(self, answer: str, reference: str, seconds: float) -> bool | None:
        with self._lock:
            process = self._running()
            question = json.dumps([answer, reference]).encode() + b"\n"
            reply = b""
            with contextlib.suppress(OSError):  # it has died: of memory, perhaps
                assert process.stdin is not None
                process.stdin.write(question)
                reply = _read_line(process, seconds)
            if not reply:
                self.stop()
                return None
            return bool(json.loads(reply))

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


def main() -> None:
    """Answer questions until there are none: lines [answer, reference], replies true or false."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; the one that asks decides
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no reply
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import parse, verify

    verify(parse("$1$"), parse(r"$\frac{1}{1}$"))  # loads the rest
    print("true", file=replies, flush=True)
    for line in sys.stdin:
        answer, reference = json.loads(line)
        try:
            same = bool(verify(parse(f"${reference}$"), parse(f"${answer}$")))
        except Exception:  # whatever text provokes in sympy: it is no answer
            same = False
        print(json.dumps(same), file=replies, flush=True)


if __name__ == "__main__":
    main()
