"""The levels of confinement that there are on this machine, and what programs must not harm."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd.errors import UserError
from opd.rewards import CodeVerifier, Sandbox
from opd.rewards.sandbox import LEVELS

SECRET = "the-secret-8d1f"


@pytest.fixture(scope="session", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    try:
        return Sandbox(request.param)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def verifier(sandbox: Sandbox) -> CodeVerifier:
    return CodeVerifier(sandbox)


@dataclass(frozen=True)
class Host:
    """What is there to be harmed: files, a listening socket, a process, an environment."""

    folder: Path
    listener: socket.socket
    bystander: subprocess.Popen[bytes]
    marker: str

    def fill_in(self, program: str) -> str:
        """Write into a program where the things to harm are."""
        places = {
            "FOLDER": repr(str(self.folder)),
            "PORT": str(self.listener.getsockname()[1]),
            "PIDS": str([os.getpid(), self.bystander.pid]),
            "MARKER": repr(self.marker),
            "SECRET": repr(SECRET[:-1]) + "+'f'",
        }
        for name, value in places.items():
            program = program.replace(name, value)
        return program

    def assert_unharmed(self) -> None:
        names = {path.name for path in self.folder.iterdir()}
        assert names == {"secret", "temporary"}
        assert (self.folder / "secret").read_text() == SECRET
        assert list((self.folder / "temporary").iterdir()) == []  # working directories are gone
        assert self.bystander.poll() is None
        with pytest.raises(BlockingIOError):
            self.listener.accept()
        assert not _processes_with(self.marker)


def _processes_with(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # it has ended meanwhile
            pass
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that nothing but a sandbox keeps anybody out of."""
    with tempfile.TemporaryDirectory(prefix="opd-host-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture
def host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    secret = folder / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o666)
    (folder / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    monkeypatch.setenv("API_KEY", SECRET)
    monkeypatch.setenv("HOME", str(folder))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        command = [sys.executable, "-c", "import time; time.sleep(1000)"]
        bystander = subprocess.Popen(command, env={"API_KEY": SECRET})
        try:
            yield Host(folder, listener, bystander, f"marker-{uuid.uuid4()}")
        finally:
            bystander.kill()
            bystander.wait()
