"""Models and tokenizers by hub id, folder, checkpoint or ``embedded:NAME``.

Weights are read from safetensors (or from our own checkpoints with ``weights_only``), and remote
code runs only where the configuration says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

from opd import checkpoints
from opd.errors import UserError
from opd.models.checks import check_projection

disable_progress_bar()  # of loading weights: a model of ours or a shard a second needs none

Dtype = Literal["float32", "bfloat16", "float16"]
EMBEDDED = Path(__file__).parent.parent / "embedded"
EMBEDDED_MODELS = ("base", "teacher")


@contextmanager
def model_folder(source: str) -> Iterator[str]:
    """Resolve a model source to what ``from_pretrained`` accepts: a folder or a hub id.

    For a checkpoint it is a temporary folder with the config and tokenizer, without weights.

    Raises:
        UserError: The source looks like a path and is not there, or is a folder without a model.
    """
    path = Path(source).expanduser()
    if not source:
        raise UserError("no model named: give a hub id, a folder, a checkpoint or embedded:NAME")
    if source.startswith("embedded:"):
        name = source.removeprefix("embedded:")
        if name not in EMBEDDED_MODELS:
            known = ", ".join(f"embedded:{known}" for known in EMBEDDED_MODELS)
            raise UserError(f"{source}: the embedded models are {known}")
        yield str(EMBEDDED / name)
    elif checkpoints.is_checkpoint(path):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in checkpoints.read(path)[checkpoints.STUDENT_FILES].items():
                (Path(folder) / Path(name).name).write_bytes(content)
            yield folder
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{source}: this folder holds no model (no config.json)")
        yield str(path)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(".ckpt"):
        raise UserError(f"{source}: there is no such model folder or checkpoint")
    else:
        yield source


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        UserError: There is none at ``source``.
    """
    with model_folder(source) as folder, _explained(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_model(
    source: str,
    *,
    dtype: Dtype = "float32",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    weights: bool = True,
) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        source: Hub id, folder, checkpoint of ours, or embedded:NAME.
        dtype: Dtype of the weights in memory.
        attn_implementation: Passed to transformers: sdpa, eager, flash_attention_2, ...
        trust_remote_code: Let a hub model run its own code.
        weights: False builds the model on the meta device, for weights that another rank sends.

    Raises:
        UserError: There is no causal language model at ``source``, or its head cannot be separated
            from its body (see :func:`completion_logits`).
    """
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
    }
    path = Path(source).expanduser()
    with model_folder(source) as folder, _explained(source, "causal language model"):
        if weights and not checkpoints.is_checkpoint(path):
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            with no_init_weights(), nullcontext() if weights else torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, **options)
            if (generation := _generation_config(folder)) is not None:
                model.generation_config = generation
            if weights:
                checkpoints.read_student(path, model.state_dict())
    assert isinstance(model, PreTrainedModel)
    if weights:
        check_projection(model, source)
    return model


def _generation_config(folder: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # a model need not have one
        return None


@contextmanager
def _explained(source: str, what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        here = "" if Path(source).expanduser().exists() else "is no folder or file here, and "
        raise UserError(f"{source}: {here}no {what} could be loaded from it ({reason})") from error


def student_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Return what turns weights into a model again: config, generation config, tokenizer files."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
