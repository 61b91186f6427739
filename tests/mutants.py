"""Changes of meaning that tests must notice.

    python tests/mutants.py [--only TEXT] [--jobs N]

Each mutant is made to a copy of the checkout, one at a time, and the tests named beside it are run:
they must fail. A mutant that survives is a promise that nothing checks; its name is printed, and
the exit code is 1. So it is where a text does not occur exactly once any more: adapt the mutant.

To add one, append a line to MUTANTS of tests/mutant_list.py: file, exact text, replacement, tests.
``why`` excuses one that no test can notice.
"""

import argparse
import importlib
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
WARM = ["lightning.pytorch.cli", "lm_eval.evaluator", "lm_eval.models.huggingface", "datasets"]
WARM += ["matplotlib.pyplot", "transformers", "tensorboard", "math_verify"]
TIMEOUT = 300  # seconds after which tests count as failed: a change may make a loop endless


def copy_checkout(folder: Path) -> None:
    """Copy what git knows or would know."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: str, timeout: float = TIMEOUT) -> tuple[int, str]:
    """Run tests in a copy; returns pytest's exit code and output."""
    log = folder / "pytest.log"
    child = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, tests, log))
    child.start()
    child.join(timeout)
    if child.exitcode is None:
        assert child.pid is not None
        os.killpg(child.pid, signal.SIGKILL)  # with the ranks that its tests have forked
        return 1, "timeout"
    return child.exitcode, log.read_text(encoding="utf-8")


def _pytest(folder: Path, tests: str, log: Path) -> None:
    """What the child does; all that it imports of ours comes from the copy."""
    os.setsid()
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    ours = (ROOT, ROOT / "tests")
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() not in ours)]
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    slow_too = ["-m", "not gpu and not vllm"]
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *slow_too, *shlex.split(tests)]))


def warm_up() -> None:
    """Import what takes long and is not ours, once: each child is a fork of this process."""
    for name in WARM:
        importlib.import_module(name)
    ours = {"opd", "callbacks", "eval", "tasks", "conftest"} & sys.modules.keys()
    assert not ours, ours


def problem_of(mutant: Mutant) -> str | None:
    """What is wrong with a mutant itself."""
    path = ROOT / mutant.file
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (count := source.count(mutant.text)) != 1:
        return f"its text occurs {count} times"
    try:
        compile(source.replace(mutant.text, mutant.replacement), mutant.file, "exec")
    except SyntaxError as error:
        return f"is no Python ({error})"
    return None


def survives(mutant: Mutant, scratch: Path) -> bool:
    """Make the change in this process's copy, run its tests, and take the change back."""
    folder = scratch / str(os.getpid())
    if not folder.is_dir():
        copy_checkout(folder)
    path = folder / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(mutant.text, mutant.replacement), encoding="utf-8")
    try:
        code, output = run_tests(folder, mutant.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    if code not in (0, 1, 2):
        raise RuntimeError(f"{mutant.name}: pytest {mutant.tests} ended with {code}\n{output}")
    print(f"{'noticed ' if code else 'SURVIVES'} {mutant.name}", flush=True)
    return code == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="mutants with this text in their name or tests")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    options = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if options.only in m.name or options.only in m.tests]
    broken = [f"{m.name}: {problem}" for m in chosen if (problem := problem_of(m))]
    if broken or not chosen:
        print("\n".join(broken) or "no such mutant")
        return 1
    tried, excused = [m for m in chosen if not m.why], [m for m in chosen if m.why]
    start = time.perf_counter()
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True  # a changed file may have the size and second of another
    warm_up()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        copy_checkout(scratch / "unchanged")
        every = " ".join(sorted({mutant.tests for mutant in tried}))
        code, output = run_tests(scratch / "unchanged", every, timeout=10 * TIMEOUT)
        if code:
            print(f"the tests fail without any change:\n{output}")
            return 1
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(options.jobs, fork) as pool:
            judged = list(pool.map(survives, tried, [scratch] * len(tried)))
    alive = [m for m, survived in zip(tried, judged, strict=True) if survived]
    for mutant in excused:
        print(f"excused  {mutant.name}: {mutant.why}")
    for mutant in alive:
        print(f"SURVIVES {mutant.name} [{mutant.tests}]")
    seconds = time.perf_counter() - start
    noticed = f"{len(tried) - len(alive)} of {len(tried)} noticed, {len(excused)} excused"
    print(f"{noticed}, {seconds:.0f} s")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
