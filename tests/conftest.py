"""What several tests share: tiny real models with real tokenizers, and runs of the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401 - now: its log must not go to one test's stderr
import pytest
import torch
from forked import run_ranks
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from opd.cli import main

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of all processes that tests start
pytest_plugins = ["confinement"]
ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
# Of embedded:train the first rows: to read all 16,384 takes as long as a run of a few steps.
SHRUNK = ["--data.train", str(ROOT / "tests" / "additions.jsonl"), "--data.batch_size", "8"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
CPU = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
FSDP2 = ["--config", str(ROOT / "configs" / "strategy" / "fsdp2.yaml"), *CPU]
FSDP1 = ["--config", str(ROOT / "configs" / "strategy" / "fsdp1.yaml"), *CPU]
DDP = ["--config", str(ROOT / "configs" / "strategy" / "ddp.yaml"), *CPU]
STRATEGIES = {"ddp": DDP, "fsdp1": FSDP1, "fsdp2": FSDP2}
AUTO = ["--config", str(ROOT / "configs" / "effopd" / "auto.yaml")]
LINE_SEARCH = ["--config", str(ROOT / "configs" / "effopd" / "line_search.yaml")]
TEXTS = ["what is 12 plus 30? the answer is 42", "add 7 and 8: 15", "question: 9+9 = 18"]
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def slow_but(quick: Any, *others: Any) -> list:
    """Parameters of which the default suite takes one, and ``-m slow`` the others."""
    rest = [name for name in others if name != quick]
    return [quick, *(pytest.param(name, marks=pytest.mark.slow) for name in rest)]


def memory_profile() -> torch.profiler.profile:
    activity = torch.profiler.ProfilerActivity.CPU
    return torch.profiler.profile(activities=[activity], profile_memory=True)


def peak_bytes(profile: torch.profiler.profile) -> int:
    """The most that was held at once of what was allocated under the profiler."""
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes that a function holds at most of what it allocates."""
    with memory_profile() as profile:
        function()
    return peak_bytes(profile)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def byte_level_tokenizer(specials: list[str]) -> Tokenizer:
    """Train a small byte-level BPE tokenizer, the kind that Llama 3 and GPT-2 use."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def save_llama(folder: Path, seed: int, **shape: int) -> None:
    """Save a Llama whose tokenizer adds a BOS to plain text and whose template writes its own."""
    tokenizer = byte_level_tokenizer(["<s>", "</s>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=LLAMA_TEMPLATE,
    )
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, **shape}
    config = LlamaConfig(
        vocab_size=len(wrapped),
        **sizes,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=[1],
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


def save_gpt2(folder: Path, seed: int, **shape: int) -> None:
    """Save a GPT-2: learned positions, dropout, padding token = EOS, no chat template."""
    tokenizer = byte_level_tokenizer(["<|endoftext|>"])
    end = "<|endoftext|>"
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end
    )
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(wrapped),
        n_layer=2,
        **{"n_embd": 32, "n_head": 4, **shape},
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with llama-student, llama-teacher, gpt2-student and gpt2-teacher."""
    folder = tmp_path_factory.mktemp("tiny")
    for seed, role in enumerate(["student", "teacher"]):
        save_llama(folder / f"llama-{role}", seed)
        save_gpt2(folder / f"gpt2-{role}", seed)
    return folder


def run_fit(folder: Path, *arguments: str, steps: int) -> Path:
    """Run ``opd fit`` on a shrunk quickstart in this process; returns the run folder."""
    options = ["--data.validation_limit", "16", "--output", str(folder)]
    options += ["--trainer.max_steps", str(steps)]
    assert main(["fit", "--config", QUICKSTART, *SHRUNK, *QUIET, *options, *arguments]) == 0
    return folder


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Path]:
    """Run ``opd fit`` on a shrunk quickstart in a folder of the test's own."""

    def run(name: str, *arguments: str, steps: int = 2) -> Path:
        return run_fit(tmp_path / name, *arguments, steps=steps)

    return run


@pytest.fixture
def fit_recipe(fit: Callable[..., Path]) -> Callable[..., Path]:
    """Run a recipe, whose own number of steps comes after that of ``fit``."""

    def run(name: str, *options: str, steps: int = 2) -> Path:
        return fit(name, *options, "--trainer.max_steps", str(steps))

    return run


@pytest.fixture(scope="session")
def vanilla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, with a checkpoint and samples of each. Copy it before you change it."""
    every = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]
    every += ["--samples.every_n_steps", "1"]
    return run_fit(tmp_path_factory.mktemp("vanilla") / "run", *every, steps=3)


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, with a search of EffOPD after each. Copy it before you change it."""
    search = "--trainer.callbacks+=callbacks.EffOPD"
    return run_fit(tmp_path_factory.mktemp("effopd") / "searched", search, steps=2)


def copy_of(run: Path, folder: Path) -> Path:
    return shutil.copytree(run, folder / "run", symlinks=True)


def launch(
    processes: int, folder: Path, *arguments: str, steps: int = 2, command: str = "fit"
) -> Path:
    """Run ``opd fit`` on a shrunk quickstart on several ranks; returns the run folder."""
    command_line = opd_arguments(folder, *arguments, steps=steps, command=command)
    codes, printed = run_ranks(processes, command_line, folder.parent)
    assert not any(codes), printed[-6000:]
    return folder


def torchrun(processes: int, folder: Path, *arguments: str, steps: int) -> Path:
    """Do the same in processes that torchrun starts; returns the run folder."""
    run = subprocess.run(
        torchrun_command(processes, folder, *arguments, steps=steps),
        capture_output=True,
        text=True,
        env=launch_environment(),
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return folder


def fail(
    processes: int, folder: Path, *arguments: str, steps: int, largest_file: int = -1
) -> tuple[list[int], str]:
    """Run ``opd fit`` on several ranks; they must fail, and without a traceback of ours.

    Returns:
        The ranks' exit codes, and what they have printed.

    Args:
        processes: Number of ranks.
        folder: Run folder.
        arguments: Further options.
        steps: Optimizer steps.
        largest_file: Bytes that a file may have, as on a disk that runs full; -1: any.
    """
    command_line = opd_arguments(folder, *arguments, steps=steps)
    codes, printed = run_ranks(processes, command_line, folder.parent, largest_file)
    assert all(codes)
    assert "opd/" not in printed, printed  # no file of ours in a traceback
    return codes, printed


def opd_arguments(folder: Path, *arguments: str, steps: int, command: str = "fit") -> list[str]:
    """Arguments of ``opd`` for a shrunk quickstart."""
    shrunk = [*SHRUNK, "--data.validation_limit", "8"]
    options = ["--output", str(folder), "--trainer.max_steps", str(steps)]
    return [command, "--config", QUICKSTART, *shrunk, *arguments, *QUIET, *options]


def torchrun_command(processes: int, folder: Path, *arguments: str, steps: int) -> list[str]:
    """The command that :func:`torchrun` runs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command_line = opd_arguments(folder, *arguments, steps=steps)
    return [sys.executable, *launcher, "-m", "opd.cli", *command_line]


def launch_environment() -> dict[str, str]:
    """Modules of tests/ can be named in YAML."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "tests")}


def load_any(folder: Path, name: str = "last.ckpt") -> dict:
    """Load a checkpoint file or folder, whole; of a folder, the weights."""
    path = folder / "checkpoints" / name
    if path.is_file():
        return load(folder, name)
    state: dict = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(state, FileSystemReader(path), planner=planner, no_dist=True)
    return {**torch.load(path / "meta.pt", weights_only=True), **state}


def load(folder: Path, name: str = "last.ckpt") -> dict:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def student_of(checkpoint: dict) -> dict:
    """The student's weights, without EffOPD's anchor."""
    state = checkpoint["state_dict"]
    return {name: tensor for name, tensor in state.items() if name.startswith("student.")}


def assert_same(left: object, right: object, where: str = "") -> None:
    """Compare nested containers of tensors bit for bit."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    else:
        assert left == right, where


def assert_same_rollouts(ours, expected, gap=1e-4):
    assert ours.prompts.ids.tolist() == expected.prompts.ids.tolist()
    assert ours.lengths.tolist() == expected.lengths.tolist()
    assert ours.finished.tolist() == expected.finished.tolist()
    assert ours.completion_ids.tolist() == expected.completion_ids.tolist()
    assert ours.engine_logprobs.dtype == torch.float32
    torch.testing.assert_close(ours.engine_logprobs, expected.engine_logprobs, rtol=0, atol=gap)
