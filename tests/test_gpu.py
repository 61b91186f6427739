"""What only a GPU can show: ``pytest -m gpu -s`` prints memory and seconds."""

import json

import pytest
import torch
from conftest import ROOT, byte_level_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd.cli import main

QWEN3_1_7B = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
QWEN3_1_7B |= {"num_attention_heads": 16, "vocab_size": 151_936}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
QWEN3_4B |= {"num_attention_heads": 32, "vocab_size": 151_936}


def save_random_qwen3(folder, shape):
    """Save a model of this shape with random weights, in bfloat16, and a byte-level tokenizer."""
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer([end]), eos_token=end, pad_token=end
    )
    config = Qwen3Config(
        **shape,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_training(tmp_path, strategy, student, teacher, *options):
    for name, shape in [("student", student), ("teacher", teacher)]:
        save_random_qwen3(tmp_path / name, shape)
    rows = [{"prompt": f"add {i} and {3 * i}: "} for i in range(64)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [ROOT / "configs" / "strategy" / f"{strategy}.yaml"]
    configs += [ROOT / "configs" / "effopd" / "label_free.yaml"]
    arguments = [a for config in configs for a in ("--config", str(config))]
    arguments += ["--model.student", str(tmp_path / "student")]
    arguments += ["--model.teacher", str(tmp_path / "teacher"), "--model.teacher_dtype", "bfloat16"]
    arguments += ["--model.max_new_tokens", "64", "--model.micro_batch_tokens", "2048"]
    arguments += ["--model.gradient_checkpointing", "true"]
    arguments += ["--data.train", str(tmp_path / "prompts.jsonl"), "--data.batch_size", "16"]
    arguments += ["--trainer.max_steps", "3", "--trainer.devices", "1"]
    arguments += ["--output", str(tmp_path / "run"), *options]
    assert main(["fit", *arguments]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [search["step"] for search in summary["extrapolation"]] == [1, 2]
    print(strategy, summary["cost"])


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_a_student_of_1_7b_learns_from_a_teacher_of_4b(tmp_path, strategy):
    check_training(tmp_path, strategy, QWEN3_1_7B, QWEN3_4B)


def test_the_gpu_test_runs_at_a_small_size(tmp_path):
    """So that it is not the test that breaks when a GPU is there at last."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 8, "vocab_size": 512}
    cpu = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    check_training(tmp_path, "fsdp2", small, small, *cpu)
