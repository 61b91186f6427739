"""Programs that nobody has read, run where they can harm nothing.

A program of a model is a Python process of its own, with limits on everything that it could use up
and with as much confinement as the kernel allows here. `launcher.py` does the confining, in a small
process: this one is large, has threads and perhaps a GPU, and must not fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import marshal
import math
import os
import platform
import secrets
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opd.errors import UserError

Level = Literal["bubblewrap", "namespaces", "limits"]
Status = Literal["ok", "error", "time", "memory", "output"]
LEVELS: tuple[Level, ...] = ("bubblewrap", "namespaces", "limits")

FOLDER = "/program"  # the working directory inside of namespaces; no path of anybody else
# The launcher's folder is its second argument: as a module it is compiled once, not each time.
LAUNCH = "import sys; sys.path.append(sys.argv[2]); import launcher; launcher.main()"
STARTED = b"+"  # the launcher's first byte, once the program runs
NOT_STARTED = "a program could not be started"
GRACE = 30.0  # seconds after which a launcher that does not answer is killed
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store")
SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same program, the same order of its sets
    "OMP_NUM_THREADS": "1",  # numpy's threads count as processes, and each reserves memory
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        wall: Seconds from start to end.
        cpu: Seconds of computing, of each of its processes; rounded up to whole seconds.
        memory: Bytes of address space, of each of its processes.
        processes: Processes and threads at a time.
        file_bytes: Bytes of all its files (of each of its files, at level limits).
        output_bytes: Bytes of standard output and standard error together.
    """

    wall: float = 10.0
    cpu: float = 10.0
    memory: int = 2 << 30
    processes: int = 32
    file_bytes: int = 64 << 20
    output_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not value > 0 or math.isinf(value):
                raise UserError(f"limit {name} is {value}, and must be a number above 0")


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    ``returncode`` is negative for a signal, as in subprocess. ``stdout`` and ``stderr`` hold what
    was read before the end, with U+FFFD for bytes that are no UTF-8. ``seconds`` are of the wall
    clock. The status memory is a reading of how it died, for people: it may be called error.
    """

    status: Status
    returncode: int
    stdout: str
    stderr: str
    seconds: float


class Sandbox:
    """Runs Python programs in confinement; may be used by several threads at a time.

    Args:
        level: How: auto takes the first that works here of bubblewrap (the program bwrap),
            namespaces (the same by ourselves; Linux 5.12, as root or with user namespaces), and
            limits (resource limits, a filter of system calls, and Landlock where there is one;
            programs have no multiprocessing there, and removing what a program has left on the
            disk is not within its time).
        limits: What a program may use, unless a run says otherwise.

    Raises:
        UserError: The level does not work here; the message says why.
    """

    def __init__(
        self, level: Literal["auto"] | Level = "auto", limits: Limits | None = None
    ) -> None:
        if sys.platform != "linux":
            raise UserError(f"programs can be run on Linux only; this is {sys.platform}")
        self.limits = limits or Limits()
        self._readable = _readable_paths()
        self._landlock = _landlock_abi()
        problems = []
        for candidate in LEVELS if level == "auto" else (level,):
            self.level: Level = candidate
            self._passes = False  # to read what only root may read, where Python is such
            problem = self._probe()
            confined = candidate != "limits" or self._landlock
            if problem and os.geteuid() == 0 and confined:
                self._passes = True
                problem = self._probe()
            if problem is None:
                return
            problems.append(f"{candidate}: {problem}")
        raise UserError(f"programs cannot be run here in confinement: {'; '.join(problems)}")

    @property
    def confinement(self) -> str:
        """One sentence: which confinement holds, and what it does not keep out."""
        filtered = platform.machine() in ("x86_64", "aarch64")
        calls = "" if filtered else f"; no filter of system calls for {platform.machine()}"
        if self.level != "limits":
            how = "bubblewrap" if self.level == "bubblewrap" else "Linux namespaces"
            return (
                f"programs are confined by {how}: no network, no files but Python's and the "
                "system's, no other processes; not kept out: faults of the kernel, and memory up "
                f"to the limit times the number of processes{calls}"
            )
        files = (
            "Landlock for files"
            if self._landlock
            else "NO protection of files and memory that this user can read"
        )
        user = "another user" if os.geteuid() == 0 else "this user"
        if self._passes:
            user += " (whom Landlock alone keeps from the files of others)"
        return (
            f"programs are confined by limits only, as {user}, with {files}; not kept out: names "
            "and sizes of the host's files and processes, the disk (the number of files has no "
            f"limit), faults of the kernel{calls}"
        )

    def run(
        self,
        program: str | bytes,
        *,
        stdin: str = "",
        files: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> Outcome:
        """Run a program to its end, or to that of its limits.

        Args:
            program: Python source, or the bytes of a compiled file; in its working directory there
                is nothing but this and ``files``.
            stdin: Its standard input.
            files: Name to content, for its working directory.
            arguments: Its ``sys.argv[1:]``.
            limits: Instead of the sandbox's.

        Raises:
            UserError: The program could not be started: that is no fault of the program.
        """
        return self.start(
            program, stdin=stdin, files=files, arguments=arguments, limits=limits
        ).wait()

    def start(
        self,
        program: str | bytes,
        *,
        stdin: str = "",
        files: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        limits: Limits | None = None,
        channel: socket.socket | None = None,
    ) -> Running:
        """Start a program as `run` does, and return at once.

        ``channel`` becomes its file descriptor 3. Somebody must call the result's ``wait`` or
        ``stop``; one that prints without being waited for stops when the pipe is full.
        """
        limits = limits or self.limits
        try:
            folder = tempfile.mkdtemp(prefix="opd-program-") if self.level == "limits" else None
            return Running(self, program, stdin, files or {}, arguments, limits, channel, folder)
        except OSError as error:
            raise UserError(f"{NOT_STARTED}: {error}") from error

    def _probe(self) -> str | None:
        """Why this level does not work here, with numpy if we have it; None if it does."""
        if self.level == "bubblewrap" and shutil.which("bwrap") is None:
            return "bwrap is not installed"
        program = "import numpy\n" if importlib.util.find_spec("numpy") else ""
        try:
            outcome = self.run(f"{program}print('ready')", limits=Limits(wall=60.0, cpu=60.0))
        except UserError as error:
            return str(error).removeprefix(f"{NOT_STARTED}: ")
        if outcome.stdout == "ready\n":
            return None
        return outcome.stderr.strip() or f"it ends with {outcome.returncode}"

    def _job(
        self,
        program: str | bytes,
        stdin: str,
        files: Mapping[str, str],
        arguments: Sequence[str],
        limits: Limits,
        channel: int | None,
        folder: str | None,
    ) -> dict[str, Any]:
        """Return what the launcher is told; plain data for marshal."""
        inside = FOLDER if self.level != "limits" else folder
        assert inside is not None
        name = "program.py" if isinstance(program, str) else "program.pyc"
        contents = {key: _bytes(text) for key, text in {name: program, **files}.items()}
        return {
            "started": STARTED,
            "namespaces": self.level == "namespaces",
            "private": self.level != "limits",
            "landlock": self._landlock if self.level == "limits" else 0,
            "passes": self._passes,
            "uid": _unused_uid() if os.geteuid() == 0 else None,
            "readable": self._readable,
            "folder": inside,
            "files": contents,
            "input": _bytes(stdin),
            "channel": channel,
            "wall": limits.wall,
            "file_bytes": limits.file_bytes
            + sum(len(content) + 4096 for content in contents.values()),
            "rlimits": _rlimits(limits, shared=self.level == "limits"),
            "executable": os.path.realpath(sys.executable),
            # By its own name: thus it finds its environment. -s, -P, -B: no modules of the user
            # or of the working directory, and nothing is written.
            "arguments": [sys.executable, "-s", "-P", "-B", name, *arguments],
            "environment": ENVIRONMENT
            | {"HOME": inside, "TMPDIR": inside if self.level == "limits" else "/tmp"},
        }

    def _command(self, control: int, size: int) -> list[str]:
        """Return the command of the launcher, which reads its job from the descriptor.

        ``size`` is that of its file systems in memory, in bytes.
        """
        folder, end = str(Path(__file__).parent), ["-I", "-S", "-c", LAUNCH, str(control)]
        if self.level != "bubblewrap":
            return [sys.executable, *end, folder]
        command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session"]
        command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
        if os.geteuid() != 0:
            command += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
        command += ["--dev", "/dev", "--ro-bind", folder, "/launcher"]
        for path in ("/tmp", "/dev/shm", FOLDER):
            command += ["--size", str(size), "--perms", "1777", "--tmpfs", path]
        for path in self._readable:
            if os.path.islink(path) and os.path.dirname(path) == "/":
                command += ["--symlink", os.readlink(path), path]
            else:
                for parent in reversed(Path(path).parents[:-1]):  # else they are the owner's only
                    if parent != Path("/tmp"):
                        command += ["--perms", "0755", "--dir", str(parent)]
                command += ["--ro-bind", path, path]
        executable = os.path.realpath(sys.executable)
        return [*command, "--remount-ro", "/", "--", executable, *end, "/launcher"]


class Running:
    """A program that runs; made by `Sandbox.start`."""

    def __init__(
        self,
        sandbox: Sandbox,
        program: str | bytes,
        stdin: str,
        files: Mapping[str, str],
        arguments: Sequence[str],
        limits: Limits,
        channel: socket.socket | None,
        folder: str | None,
    ) -> None:
        self._limits, self._folder = limits, folder
        self._outcome: Outcome | None = None
        number = None if channel is None else channel.fileno()
        job = sandbox._job(program, stdin, files, arguments, limits, number, folder)
        if folder is not None and job["uid"] is not None:
            os.chown(folder, job["uid"], job["uid"])
        self._control, other = socket.socketpair()
        try:
            with other:
                self._process = subprocess.Popen(
                    sandbox._command(other.fileno(), job["file_bytes"]),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    env=ENVIRONMENT,
                    cwd="/",
                    start_new_session=True,  # Ctrl-C is for the one that asks
                    pass_fds=(other.fileno(), *(() if number is None else (number,))),
                )
        except OSError:
            self._control.close()
            if folder is not None:
                _remove(folder)
            raise
        self._started = time.monotonic()
        content = marshal.dumps(job)
        with contextlib.suppress(OSError):  # it has died; wait tells
            self._control.sendall(struct.pack("Q", len(content)) + content)

    def stop(self) -> Outcome:
        """End it now, with all that it started."""
        self._stop()
        return self.wait()

    def wait(self) -> Outcome:
        """Wait for its end; it is over, and nothing of it is left."""
        if self._outcome is None:
            try:
                self._outcome = self._wait()
            finally:
                self._release()
        return self._outcome

    def _stop(self) -> None:
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def _wait(self) -> Outcome:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        output: dict[int, bytearray] = {}
        report, too_much = bytearray(), False
        last_moment = self._started + self._limits.wall + GRACE
        with selectors.DefaultSelector() as selector:
            for stream in (self._process.stdout, self._process.stderr):
                output[stream.fileno()] = bytearray()
                selector.register(stream.fileno(), selectors.EVENT_READ)
            selector.register(self._control.fileno(), selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(last_moment - time.monotonic())
                if not ready:  # the launcher itself hangs
                    self._process.kill()
                    last_moment += GRACE
                for key, _ in ready:
                    part = _read(key.fd)
                    if not part:
                        selector.unregister(key.fd)
                    elif key.fd not in output:
                        report += part
                    elif not too_much:
                        output[key.fd] += part
                        too_much = sum(map(len, output.values())) > self._limits.output_bytes
                        if too_much:
                            self._stop()
        self._process.wait()
        stdout, stderr = (bytes(text).decode(errors="replace") for text in output.values())
        seconds = time.monotonic() - self._started
        started, content = report.startswith(STARTED), bytes(report.removeprefix(STARTED))
        if not started:
            failed = marshal.loads(content)["failed"] if content else stderr.strip()
            raise UserError(f"{NOT_STARTED}: {failed or f'no answer in {seconds:.0f} s'}")
        if not content:  # a program that has ended its own watch
            return Outcome("error", self._process.returncode, stdout, stderr, seconds)
        result = marshal.loads(content)
        status = "output" if too_much else self._status(result, stderr)
        return Outcome(status, result["returncode"], stdout, stderr, result["seconds"])

    def _status(self, result: dict[str, Any], stderr: str) -> Status:
        code = result["returncode"]
        killed = code == -9 and result["ended"] == "exit"  # by the kernel
        used_up = killed and result["cpu"] > math.ceil(self._limits.cpu) - 0.5
        if result["ended"] == "time" or used_up:
            return "time"
        if code == 0:
            return "ok"
        last_line = stderr.rstrip().rpartition("\n")[2]
        return "memory" if killed or "MemoryError" in last_line.split(":")[0] else "error"

    def _release(self) -> None:
        """Let go of what it held, also after an exception in the middle of waiting."""
        self._control.close()  # the launcher ends the program, and itself
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        if self._folder is not None:
            _remove(self._folder)


def _remove(folder: str) -> None:
    """Remove a folder, however deep its folders are and whatever rights they have lost.

    A folder within is moved out first, so that nothing here is as deep as they are.
    """
    pending, moved = [folder], 0
    while pending:
        path = pending.pop()
        os.chmod(path, 0o700)
        with os.scandir(path) as entries:
            for entry in list(entries):
                if entry.is_dir(follow_symlinks=False):
                    moved += 1
                    os.chmod(entry.path, 0o700)
                    os.rename(entry.path, f"{folder}-{moved}")
                    pending.append(f"{folder}-{moved}")
                else:
                    os.unlink(entry.path)
        os.rmdir(path)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except ConnectionResetError:  # of the socket, when a launcher was killed
        return b""


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


def _readable_paths() -> list[str]:
    """Return what programs may read: the system's libraries, Python's, and those of its packages.

    Of Python's prefixes only the folders that it needs: a prefix may be somebody's home.
    """
    prefixes = dict.fromkeys([sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix])
    parts = ("bin", "lib", "lib64", "share", "pyvenv.cfg")
    paths = [*SYSTEM, *SETTINGS, *(f"{prefix}/{part}" for prefix in prefixes for part in parts)]
    paths += [os.path.realpath(path) for path in paths if not path.startswith("/etc")]
    chosen: list[str] = []
    for path in dict.fromkeys(map(os.path.normpath, paths)):
        within = any(Path(path).is_relative_to(other) for other in chosen)
        if os.path.exists(path) and not within:
            chosen.append(path)
    return chosen


def _landlock_abi() -> int:
    """Return the version of Landlock in this kernel; 0 if there is none."""
    version: int = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)
    return max(0, version)


def _unused_uid() -> int:
    """Return the number of a user that nobody is, for one program: its limits are its own."""
    with open("/proc/self/uid_map") as table:
        mapped = [(int(first), int(count)) for first, _, count in map(str.split, table)]
    for base, count in ((0x70000000, 1 << 24), (20000, 40000)):
        if any(first <= base and base + count <= first + size for first, size in mapped):
            return base + secrets.randbelow(count)
    return 65534  # nobody


def _rlimits(limits: Limits, *, shared: bool) -> dict[str, int]:
    """Return the limits of the kernel by name; ``shared``: processes of this user count too."""
    processes = limits.processes
    if os.geteuid() != 0 and (shared or _kernel() < (5, 14)):
        processes += _threads_of_user()
    return {
        "RLIMIT_AS": limits.memory,
        "RLIMIT_CPU": math.ceil(limits.cpu),
        "RLIMIT_NPROC": processes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": 256,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }


def _kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()))


def _threads_of_user() -> int:
    """Count the threads of this user, which the kernel counts against the limit of processes."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.stat(f"/proc/{name}").st_uid == os.geteuid():
                    count += len(os.listdir(f"/proc/{name}/task"))
    return count
