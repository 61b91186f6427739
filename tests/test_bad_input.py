"""Whatever a stranger types wrongly ends with exit code 2 and one line, before anything is done.

The cases stand in ``bad_input.txt``: a command, and below it, indented, what its line must say. DIR
is a folder with the files that are made here. All in one process, which is warm after the first.
"""

import json
import shlex
from pathlib import Path

import pytest
from conftest import QUICKSTART, QUIET, ROOT, SHRUNK

from opd.cli import main
from opd.models.load import EMBEDDED

LINES = (ROOT / "tests" / "bad_input.txt").read_text("utf-8").splitlines()
CASES = list(zip(LINES[::2], map(str.strip, LINES[1::2]), strict=True))
SMALL = ["--config", QUICKSTART, *QUIET, "--data.validation_limit", "4"]
FIT = [*SMALL, *SHRUNK, "--trainer.max_steps", "2", "--model.max_new_tokens", "4"]
USUAL = {"fit": FIT, **dict.fromkeys(("validate", "test", "predict"), SMALL)}
IMAGE = {"type": "image_url", "image_url": "x"}
FILES = {
    "rows.jsonl": '{"prompt": "1+1="}\n',
    "rows.csv": "prompt\n1+1=\n",
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "1+1="}\n{"prompt": oops}\n',
    "list.jsonl": "[1]\n",
    "blank.jsonl": '{"prompt": ""}\n',
    "binary.jsonl": b"\xff\x00\xfe" * 9,
    "surrogate.jsonl": '{"prompt": "\\ud800"}\n',
    "bigint.jsonl": '{"prompt": "1", "answer": ' + "9" * 5000 + "}\n",
    "noprompt.jsonl": '{"question": "1"}\n',
    "badanswer.jsonl": '{"prompt": "1", "answer": [1]}\n',
    "badrole.jsonl": '{"messages": [{"role": 3, "content": "1"}]}\n',
    "image.jsonl": json.dumps({"messages": [{"role": "user", "content": [IMAGE]}]}) + "\n",
    "nochat.jsonl": '{"messages": []}\n',
    "badteacher.jsonl": '{"prompt": "1+1=", "teacher": "nobody"}\n',
    "longprompt.jsonl": '{"prompt": "' + "1" * 3000 + '"}\n',
    "broken.parquet": "PAR1",
    "cut.ckpt": "PK\x03\x04cut",
    "cut.gguf": b"GGUF\x03\x00\x00\x00",
    "text.gguf": '{"prompt": "1+1="}\n',
    "twice.yaml": "model: {}\ntrainer: {}\nmodel: {}\n",
    "broken.yaml": "model: [\n",
    "list.yaml": "- 1\n",
    "suite_key.yaml": "tasks: [arithmetic]\nsample: 3\n",
    "suite_value.yaml": "tasks: [arithmetic]\nsamples: many\n",
    "suite_tasks.yaml": "tasks: [1]\n",
    "empty.yaml": "# nothing\n",
    "null_study.yaml": "recipe: quickstart\noutput: study\nmethods: null\n",
    "run/checkpoints/README": "",
    "model/config.json": (EMBEDDED / "base" / "config.json").read_bytes(),
    "damaged/summary.json": "{",
    "damaged/metrics.csv": "step\n",
    "results/results.json": '{"results": {"a": {"b,none": 0.5}}}',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("bad_input")
    for name, content in FILES.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (place / "empty").mkdir()
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_there_are_enough_of_them():
    assert len({command for command, _ in CASES}) == len(CASES) >= 150


@pytest.mark.parametrize(("command", "said"), CASES, ids=[command for command, _ in CASES])
def test_bad_input_ends_in_one_line(command, said, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OPD_OUTPUT", raising=False)
    for name in ("OPD_BENCHMARK_DATA", "OPD_TASKS"):  # which --data and --include_path set
        monkeypatch.setenv(name, "")
    before = contents(folder)
    name, *arguments = shlex.split(command.replace("DIR", str(folder)))
    output = ["--output", str(tmp_path / "run")] if name in USUAL else []
    assert main([name, *USUAL.get(name, []), *output, *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("opd")]
    assert said in line.replace(str(folder), "DIR").replace(f"{ROOT}/tests/", "")
    assert not any(line.startswith("Traceback") for line in lines)
    assert not list(tmp_path.rglob("*.ckpt"))  # no step was taken
    assert contents(folder) == before
