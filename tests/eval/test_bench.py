"""opd bench: what it works out from what processes report, what it refuses, and a run of ours."""

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eval.bench import command
from eval.bench.clock import Stopwatch, fixed_batch
from eval.bench.workloads import END, WORKLOADS, Workload, prepare
from opd.cli import main
from opd.errors import UserError
from opd.models import load_tokenizer

TINY = Workload("tiny", 4, 8, 2, vocabulary=40, warmup=1)


@pytest.fixture
def tiny_workload(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "small", TINY)


def test_ratios_are_taken_pair_by_pair():
    ours = [{"cpu_seconds": 1.0, "wall_seconds": 2.0, "memory_bytes": 30}] * 2
    theirs = [
        {"cpu_seconds": 3.0, "wall_seconds": 5.0, "memory_bytes": 60},
        {"cpu_seconds": 2.0, "wall_seconds": 2.0, "memory_bytes": 15},
    ]
    found = command.ratios({"ours": ours, "trl": theirs})
    assert found == {"speed": [3.0, 2.0], "wall": [2.5, 1.0], "memory": [0.5, 2.0]}
    assert command.spread([3.0, 1.0, 2.5]) == "2.50 (1.00 to 3.00)"


def test_a_made_pair_ends_as_often_as_it_is_to(tmp_path):
    prepare(replace(TINY, vocabulary=300, mean_tokens=8), tmp_path, None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = torch.randint(2, 300, (200, 12), generator=torch.Generator().manual_seed(1))
    share = model(ids).logits[:, 6:].softmax(-1)[..., END]
    assert float(share.mean()) == pytest.approx(1 / 8, rel=0.3)


def test_memory_is_what_came_after_the_start(tmp_path):
    stopwatch = Stopwatch()
    before = torch.ones(2**25)
    stopwatch.start()
    for _ in range(3):
        held = torch.ones(2**24) + before[: 2**24]  # 64 MiB twice
        stopwatch.lap()
    del held
    stopwatch.report(tmp_path / "found.json", warmup=1, tokens=7)
    found = json.loads((tmp_path / "found.json").read_text())
    assert 100 * 2**20 < found["memory_bytes"] < 220 * 2**20
    assert found["tokens"] == 7
    assert 0 < found["cpu_seconds"] < 5


def test_loss_and_gradient_of_the_fixed_batch_are_those_of_the_definition(tmp_path):
    prepare(TINY, tmp_path, None)
    command._run("ours", sys.executable, TINY, tmp_path, tmp_path / "x.safetensors", 1, check=True)
    found = load_file(tmp_path / "x.safetensors")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(tmp_path / role) for role in ("student", "teacher")
    )
    tokenizer = load_tokenizer(str(tmp_path / "student"))
    prompts, completions = fixed_batch(tmp_path, tokenizer, 4, 8, 40)
    loss, count = 0.0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        where = slice(len(prompt) - 1, -1)
        log_p, log_q = (m(ids).logits[0, where].log_softmax(-1) for m in (student, teacher))
        loss = loss + (log_p.exp() * (log_p - log_q.detach())).sum()
        count += len(completion)
    (loss / count).backward()
    assert float(found["loss"]) == pytest.approx(float(loss / count), rel=1e-5)
    for name, parameter in student.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-6), name


def test_sides_that_differ_are_told(tmp_path, monkeypatch):
    gradients = {"ours": torch.tensor([1.0, 2.0]), "trl": torch.tensor([1.0, 2.1])}

    def run(side, python, workload, place, output, threads, check):
        save_file({"head": gradients[side], "loss": torch.tensor(0.5)}, output)

    monkeypatch.setattr(command, "_run", run)
    with pytest.raises(UserError, match=r"head: the sides differ by 4\.8e-02"):
        command._agree(TINY, tmp_path, {"ours": "", "trl": ""}, 1)
    gradients["ours"] = gradients["trl"]
    command._agree(TINY, tmp_path, {"ours": "", "trl": ""}, 1)


@pytest.mark.slow
def test_ours_alone_is_told_by_phase_with_a_trace(tiny_workload, tmp_path, capsys):
    options = ["--peer", "none", "--workloads", "small", "--repeats", "1"]
    assert main(["bench", *options, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())["runs"]["small"]["ours"][0]
    assert found["tokens"] == pytest.approx(4 * 8, rel=0.3)
    assert set(found["phases"]) == {"rollout_seconds", "teacher_seconds", "train_seconds"}
    assert sum(found["phases"].values()) < found["wall_seconds"]
    table = (tmp_path / "bench.md").read_text()
    assert "| tiny | rollout |" in table
    assert table in capsys.readouterr().out
    assert json.loads((tmp_path / "trace_small.json").read_text())["traceEvents"]
    assert main(["bench", *options, "--output", str(tmp_path)]) == 2
    assert "bench.json exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workloads", "huge"], "--workloads huge: is none; known are small"),
        (["--workloads", ","], "--workloads names none"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--peer", "none", "--workloads", "model"], "name the folder of a model with --model"),
        pytest.param(
            *(["--peer_python", "/missing/python"], "trl cannot be run"), marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_measured_is_named(options, message, tiny_workload, tmp_path, capsys):
    place = ["--output", str(tmp_path / "out"), "--peer_python", sys.executable, "--peer", "trl"]
    assert main(["bench", "--workloads", "small", *place, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="trl is installed")
def test_without_trl_it_says_what_to_install(tmp_path, capsys):
    assert main(["bench", "--output", str(tmp_path / "out")]) == 2
    assert "pip install trl" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_both_sides_agree_and_are_timed(tiny_workload, tmp_path):
    place = ["--output", str(tmp_path), "--repeats", "1"]
    assert main(["bench", "--workloads", "small", *place]) == 0
    assert len(json.loads((tmp_path / "bench.json").read_text())["ratios"]["small"]["speed"]) == 1
