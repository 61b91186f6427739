"""What a program gets and what is told of it, at every level of confinement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import opd.rewards.sandbox
from opd.errors import UserError
from opd.rewards import Limits, Sandbox


def test_a_program_reads_its_input_and_files_and_prints(sandbox):
    program = """
import sys
print(sys.argv[1:], input(), open('input.txt').read())
print('ä', file=sys.stderr)
sys.exit(3)
"""
    outcome = sandbox.run(
        program, stdin="first\nsecond", files={"input.txt": "ü"}, arguments=["a", "b"]
    )
    assert outcome.stdout == "['a', 'b'] first ü\n"
    assert outcome.stderr == "ä\n"
    assert (outcome.status, outcome.returncode) == ("error", 3)
    assert 0 < outcome.seconds < 10


def test_numpy_threads_and_processes_of_its_own_are_there(sandbox):
    program = """
import asyncio, os, subprocess, sys, tempfile, threading
import numpy
thread = threading.Thread(target=print, args=(numpy.arange(3).sum(),))
thread.start(); thread.join()
with tempfile.TemporaryFile() as file: file.write(b'x' * 10000)
async def one(): return 1
print(asyncio.run(one()), flush=True)
subprocess.run([sys.executable, '-c', 'print(2)'], check=True)
"""
    outcome = sandbox.run(program)
    assert outcome.stdout == "3\n1\n2\n", outcome.stderr


def test_input_and_output_may_be_megabytes(sandbox):
    text = "0123456789" * 300_000
    assert sandbox.run("import sys; print(sys.stdin.read())", stdin=text).stdout == text + "\n"


def test_the_same_program_has_the_same_order_of_sets(sandbox):
    program = "print(list({'one', 'two', 'three', 'four', 'five'}))"
    assert len({sandbox.run(program).stdout for _ in range(4)}) == 1


def test_bytes_that_are_no_text_are_replaced(sandbox):
    outcome = sandbox.run(r"import sys; sys.stdout.buffer.write(b'a\xff')")
    assert outcome.stdout == "a\ufffd"


def test_a_program_killed_by_a_signal_tells_which(sandbox):
    outcome = sandbox.run("import signal; signal.raise_signal(signal.SIGSEGV)")
    assert (outcome.status, outcome.returncode) == ("error", -signal.SIGSEGV)


def test_many_threads_may_run_programs_at_a_time(sandbox):
    with ThreadPoolExecutor(6) as threads:
        outcomes = list(threads.map(lambda n: sandbox.run(f"print({n})"), range(18)))
    assert [outcome.stdout for outcome in outcomes] == [f"{n}\n" for n in range(18)]


def test_nothing_is_left_open(sandbox):
    sandbox.run("pass")
    before = set(os.listdir("/proc/self/fd"))
    sandbox.run("pass")
    sandbox.run("while True: print(1)", limits=Limits(wall=1, output_bytes=1000))
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_program_that_writes_too_much_is_ended(sandbox):
    limits = Limits(wall=20, cpu=20, output_bytes=1 << 20)
    outcome = sandbox.run("while True: print('x' * 1000)", limits=limits)
    assert outcome.status == "output"
    assert outcome.seconds < 10


def test_a_program_that_is_stopped_ends_at_once(sandbox):
    started = time.monotonic()
    running = sandbox.start("import time; time.sleep(1000)")
    outcome = running.stop()
    assert outcome.status == "error"
    assert time.monotonic() - started < 2


def test_programs_end_with_the_process_that_runs_them(sandbox, tmp_path):
    child = f"""
import sys
from opd.rewards import Sandbox
running = Sandbox({sandbox.level!r}).start(
    "import time; print(1, flush=True); time.sleep(1000)", arguments=["{tmp_path.name}-marker"])
running._process.stdout.read(1)
print("ready", flush=True)
running.wait()
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    process.stdout.close()
    marker, last_moment = f"{tmp_path.name}-marker", time.monotonic() + 5
    while _runs(marker) and time.monotonic() < last_moment:
        time.sleep(0.01)
    assert not _runs(marker)


def _runs(marker: str) -> bool:
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return any("program.py" in line and marker in line for line in listing.splitlines())


def test_a_program_that_cannot_be_started_is_no_wrong_program(sandbox, monkeypatch):
    job = sandbox._job

    def without_python(*arguments):
        return job(*arguments) | {"executable": "/nowhere/python"}

    monkeypatch.setattr(sandbox, "_job", without_python)
    with pytest.raises(UserError, match="a program could not be started: FileNotFoundError"):
        sandbox.run("pass")


def test_files_larger_than_what_it_may_write_are_there(sandbox):
    limits = Limits(file_bytes=1 << 20)
    outcome = sandbox.run(
        "print(len(open('input.txt').read()))", files={"input.txt": "x" * (3 << 20)}, limits=limits
    )
    assert outcome.stdout == f"{3 << 20}\n"


def test_the_confinement_is_said_in_a_sentence(sandbox):
    said = sandbox.confinement
    assert said.startswith("programs are confined by ")
    assert "not kept out" in said
    assert "\n" not in said


def test_a_level_that_does_not_work_says_why(monkeypatch):
    monkeypatch.setattr(opd.rewards.sandbox.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="bubblewrap: bwrap is not installed"):
        Sandbox("bubblewrap")
    assert Sandbox().level != "bubblewrap"


@pytest.mark.parametrize("name", ["wall", "cpu", "memory", "processes", "file_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_a_limit_is_a_number_above_zero(name, value):
    with pytest.raises(UserError, match=f"limit {name} is"):
        Limits(**{name: value})


def test_a_folder_of_any_depth_is_removed():
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("a disk takes long for this")
    folder = shared / f"opd-test-{os.getpid()}"
    start = os.getcwd()
    folder.mkdir()
    os.chdir(folder)
    for _ in range(2000):
        Path("file").touch()
        os.mkdir("deeper")
        os.chdir("deeper")
    os.chmod(".", 0)
    os.chdir(start)
    opd.rewards.sandbox._remove(str(folder))
    assert not list(shared.glob(f"{folder.name}*"))


def test_all_files_of_a_program_have_one_limit(sandbox):
    if sandbox.level == "limits":
        pytest.skip("each file has one there, as the confinement says")
    program = """
import errno
try:
    for number in range(20):
        for folder in ('.', '/tmp', '/dev/shm'):
            with open(f'{folder}/{number}', 'wb') as file: file.write(bytes(1 << 20))
except OSError as error:
    print(errno.errorcode[error.errno], number < 10)
"""
    assert sandbox.run(program, limits=Limits(file_bytes=8 << 20)).stdout == "ENOSPC True\n"
