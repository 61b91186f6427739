"""A wheel holds all that the commands need, and works without a checkout."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = """
import importlib, sys
from pathlib import Path

checkout, installed, prompts = sys.argv[1:]
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(checkout)]
from opd.cli import COMMANDS, main

for name in ("opd", "callbacks", "tasks", "eval"):
    assert importlib.import_module(name).__file__.startswith(installed), name
for command in COMMANDS:
    try:
        main([command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0, command
fit = ["fit", "--config", "quickstart", "--config", "effopd/paper", "--trainer.max_steps", "1"]
fit += ["--data.train", prompts, "--data.validation_limit", "4", "--data.batch_size", "4"]
evaluate = ["evaluate", "--model", "embedded:base", "--tasks", "arithmetic", "--limit", "4"]
assert main([*fit, "--trainer.enable_progress_bar", "false"]) == 0
assert main(evaluate) == 0
assert main(["study", "--config", "study/quickstart", "--workers", "0"]) == 2
"""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True, timeout=60)


def test_a_wheel_works_without_a_checkout(tmp_path):
    pytest.importorskip("hatchling")
    wheels, installed, empty = (tmp_path / name for name in ("wheels", "installed", "empty"))
    offline = ["--no-deps", "--no-index"]
    pip("wheel", "--no-build-isolation", *offline, "--wheel-dir", str(wheels), str(ROOT))
    pip("install", *offline, "--target", str(installed), *map(str, wheels.glob("opd-*.whl")))
    assert (installed / "bin" / "opd").is_file()
    empty.mkdir()
    arguments = [str(ROOT), str(installed), str(ROOT / "tests" / "additions.jsonl")]
    ran = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, *arguments],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (run,) = empty.glob("runs/quickstart/*")
    assert (run / "summary.json").is_file()
    assert "workers" in ran.stderr.splitlines()[-1]
