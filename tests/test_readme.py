"""Every command of the README runs, and its YAML is accepted."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, launch_environment

from eval.memory import table
from opd.cli import COMMANDS, main
from opd.models import LoRA, load_model

README = (ROOT / "README.md").read_text()
BLOCKS = dict(enumerate(re.findall(r"```(?:bash|yaml)\n(.*?)```", README, re.DOTALL)))


def commands() -> list[list[str]]:
    lines = [line for block in BLOCKS.values() for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("opd ")]


def test_every_command_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {command[0] for command in commands()} == set(COMMANDS) - {"study", "serve"}
    small = ["--data.validation_limit", "8", "--data.batch_size", "4"]
    for command in commands():
        if command[0] == "bench":  # below
            continue
        extra = small if command[0] in ("fit", "validate", "test", "predict") else []
        assert main([*command, *extra]) == 0, command
    assert (tmp_path / "runs" / "report.html").stat().st_size < 1_000_000
    assert (tmp_path / "runs" / "exported" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_bench_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = [command for command in commands() if command[0] == "bench"]
    assert main(command) == 0
    assert (tmp_path / "runs" / "bench" / "bench.md").is_file()


def test_the_adapter_of_the_example_is_one(tmp_path):
    (example,) = [block for block in BLOCKS.values() if "adapter:" in block]
    adapter = yaml.safe_load(example)["model"]["adapter"]
    model = load_model("embedded:base", dtype=adapter["base_dtype"], adapter=LoRA(**adapter))
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_the_example_configuration_is_accepted(tmp_path, capsys):
    """Its keys are valid: with models and prompts that exist here it runs."""
    (example,) = [block for block in BLOCKS.values() if block.startswith("# mine.yaml")]
    config = yaml.safe_load(example)
    config["model"].update(student="embedded:base", teacher="embedded:teacher", max_new_tokens=8)
    config["data"].update(train="embedded:train", validation="embedded:test", batch_size=2)
    config["trainer"].update(max_steps=1, precision="32-true")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    preset = str(ROOT / "configs" / "effopd" / "label_free.yaml")
    options = ["--output", str(tmp_path / "run"), "--data.validation_limit", "4"]
    assert main(["fit", "--config", str(tmp_path / "mine.yaml"), "--config", preset, *options]) == 0


def test_the_python_of_the_readme_runs(tmp_path):
    """In a process of its own: it writes where it is, and loads what a user would load."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=launch_environment(), check=True, timeout=120)
    assert load_model(str(tmp_path / "distilled")).num_parameters() > 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "effopd").glob("*.yaml")))
def test_every_preset_runs_on_the_quickstart(fit, path):
    folder = fit("run", "--config", str(path), steps=3)
    searches = json.loads((folder / "summary.json").read_text())["extrapolation"]
    assert searches[0]["step"] == 1
    assert searches[1]["step"] in (2, 3)  # auto waits, if it has found nothing


def test_the_memory_table_is_what_its_program_prints():
    assert table() in README


def test_every_strategy_is_described():
    for path in (ROOT / "configs" / "strategy").glob("*.yaml"):
        assert f"| `{path.name}` |" in README
