"""Low-rank adapters (LoRA, arXiv 2106.09685), by way of peft: how they are made, kept and merged.

A model that trains an adapter has ``W + alpha / rank * B A`` where it had W: A and B are trained,
all else is frozen. Its checkpoints hold A, B and the name of the base model alone; wherever a model
is named, such a checkpoint, or a folder as peft writes it, stands for the base with the adapter
merged into it.

Shapes: A [rank, in], B [out, rank], W [out, in].
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from opd import checkpoints
from opd.errors import UserError
from opd.sharding import plain_name, whole_layers
from opd.world import rank

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]
CONFIG = "adapter_config.json"  # names of peft
WEIGHTS = "adapter_model.safetensors"
NAME = "default"  # of the one adapter of a model
PREFIX = "base_model.model."  # of names in a file of weights
ALL_LINEAR = "all-linear"
REPACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' switch of a 4-bit layer


@dataclass(frozen=True)
class LoRA:
    """Train a low-rank adapter of the student, and not the student itself.

    In a configuration, or ``--model.adapter.rank 8`` on the command line::

        model:
          adapter: {rank: 16, alpha: 32}

    Args:
        rank: Of the change of each matrix.
        alpha: The change is alpha / rank times B A.
        targets: Ends of the names of the layers that get one, as [q_proj, v_proj]; all-linear: all
            linear layers but the output head.
        dropout: Of what A is given, in training.
        seed: Of A as it begins; B begins at 0.
        base_dtype: Dtype of the frozen weights; A and B are float32.
        quantize: nf4 keeps the frozen linear layers in 4 bits, and multiplies in base_dtype (QLoRA,
            arXiv 2305.14314); needs bitsandbytes. What the adapter is merged into later is the base
            as it comes. Not under FSDP.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | Sequence[str] = ALL_LINEAR
    dropout: float = 0.0
    seed: int = 0
    base_dtype: Dtype = "float32"
    quantize: Literal["nf4"] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"model.adapter: rank={self.rank} must be at least 1, alpha={self.alpha} above 0, "
                f"dropout={self.dropout} at least 0 and below 1"
            )

    def loading(self) -> dict[str, Any]:
        """Return what ``from_pretrained`` is to be told of the base.

        Raises:
            UserError: It is to be quantized, and bitsandbytes is not installed.
        """
        if self.quantize is None:
            return {}
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("model.adapter.quantize needs bitsandbytes: pip install 'opd[qlora]'")
        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.quantize,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=getattr(torch, self.base_dtype),
            )
        }

    def attach(self, model: PreTrainedModel, base: str) -> None:
        """Put adapters, alike on all ranks, beside a model's layers, and freeze all else.

        Args:
            model: The base model, perhaps on the meta device.
            base: Where it comes from.

        Raises:
            UserError: peft is not installed, or the model has no such layers.
        """
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        if isinstance(targets, str) and targets != ALL_LINEAR:
            targets = [targets]
        config = _peft().LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        try:
            with torch.random.fork_rng(devices=[]), torch.device(model.device), _quiet():
                torch.manual_seed(self.seed)
                model.add_adapter(config, NAME)
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"model.adapter.targets {self.targets}: {type(model).__name__} of {base} cannot "
                f"be adapted so ({reason})"
            ) from error
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        path, (name, _, revision) = Path(base).expanduser(), base.partition("@")
        config.base_model_name_or_path = str(path.resolve()) if path.exists() else name
        config.revision = None if path.exists() else revision or None


def keep_layout(model: nn.Module) -> None:
    """Let 4-bit layers keep their weights as they are on a CPU, too.

    bitsandbytes packs them anew for processors that multiply in bfloat16, in the first pass without
    gradient and for good: sampling and training would have other numbers, layers whose width is no
    multiple of the block size fail, and whoever dequantizes them finds something else.
    """
    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)


def config_of(model: PreTrainedModel) -> bytes | None:
    """Return the content of the file that says what a model's adapter is; None: it has none."""
    config = (getattr(model, "peft_config", None) or {}).get(NAME)
    if config is None:
        return None
    config = dataclasses.replace(config, inference_mode=True)  # as peft saves it
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / CONFIG).read_bytes()


def check_adapter(
    path: str | Path | None, saved: Mapping[str, bytes], ours: Mapping[str, bytes]
) -> None:
    """Refuse to go on from an adapter that does something else with the same numbers.

    A base of another name may have moved, or be another: a line says so.

    Args:
        path: The checkpoint.
        saved: The student's files in it.
        ours: Those of this run.

    Raises:
        UserError: It has no adapter, or another alpha.
    """
    if CONFIG not in saved:
        raise UserError(f"--ckpt_path {path}: holds a whole student, and this run has an adapter")
    theirs, wanted = (json.loads(files[CONFIG]) for files in (saved, ours))
    if theirs["lora_alpha"] != wanted["lora_alpha"]:
        raise UserError(
            f"--ckpt_path {path}: its adapter has alpha {theirs['lora_alpha']}, and "
            f"model.adapter.alpha is {wanted['lora_alpha']}"
        )
    before, now = (config["base_model_name_or_path"] for config in (theirs, wanted))
    if before != now and rank() == 0:
        log.warning(
            "--ckpt_path %s: its adapter was trained beside %s, and goes on beside %s; are these "
            "the same weights? Others of the same shapes cannot be told apart",
            *(path, before, now),
        )


def effective_weight(layer: nn.Module) -> Tensor:
    """Return what a linear layer multiplies with, [out, in]: its weight, adapter included.

    It has the adapter's gradient; of dropout it knows nothing.
    """
    adapted: Any = layer
    weight: Tensor = adapted.weight  # with an adapter: that of the base
    if hasattr(layer, "get_delta_weight") and not adapted.disable_adapters:
        weight = weight + adapted.get_delta_weight(NAME)
    return weight


def whole_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights, whole, adapters merged, by the names that a plain model has.

    One layer after the other, which does not outlive the next; a collective if it is sharded.
    """
    adapted: dict[str, Any] = {
        plain_name(name): layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")
    }
    quantized = {
        plain_name(name): parameter
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "quant_state")
    }
    for layer in whole_layers(model):
        for name, weight in layer.items():
            path, _, kind = name.rpartition(".")
            if name in quantized:
                weight = _dequantized(quantized[name])
            base = path.removesuffix(".base_layer")
            if base == path:
                if not re.search(rf"\.lora_[AB]\.{NAME}\.", name):
                    yield name, weight
                continue
            if kind == "weight":
                a, b = (layer[f"{base}.lora_{factor}.{NAME}.weight"] for factor in "AB")
                change = adapted[base].scaling[NAME] * (b @ a)
                weight = weight + (change.T if adapted[base].fan_in_fan_out else change)
            yield f"{base}.{kind}", weight


def _dequantized(parameter: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(parameter.data, parameter.quant_state)
    return weight


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Run a model within as its base."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


# --- folders --------------------------------------------------------------------------------------


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (Path(folder) / CONFIG).is_file()


def base_of(source: str, folder: str | Path) -> str:
    """Return where the base model of an adapter comes from.

    Raises:
        UserError: Its configuration does not say.
    """
    try:
        config = json.loads((Path(folder) / CONFIG).read_bytes())
    except ValueError as error:
        raise UserError(f"{source}: {CONFIG} is no valid JSON: {error}") from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError(f"{source}: its {CONFIG} names no base_model_name_or_path")
    revision = config.get("revision")
    return f"{base}@{revision}" if revision and not Path(base).exists() else base


def write_weights(checkpoint: Path, folder: Path) -> None:
    """Write the weights of an adapter's checkpoint as peft does.

    Raises:
        UserError: They cannot be read.
    """
    found = checkpoints.read_tensors(checkpoint)
    names = {name: PREFIX + re.sub(rf"\.{NAME}(?=\.|$)", "", name) for name in found}
    tensors = {names[name]: tensor.contiguous() for name, tensor in found.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def merged(model: PreTrainedModel, source: str, folder: str | Path) -> PreTrainedModel:
    """Merge the adapter of a folder into its base model, which it changes and returns.

    Raises:
        UserError: It is no adapter that peft can merge, or not of this model.
    """
    peft, file = _peft(source), Path(folder) / WEIGHTS
    if not file.is_file():
        raise UserError(f"{source}: holds {CONFIG}, but no {WEIGHTS}")
    try:
        with safe_open(file, "pt") as tensors:
            held = set(tensors.keys())
        with _quiet():
            adapted = peft.PeftModel.from_pretrained(model, folder)
            wanted = set(peft.get_peft_model_state_dict(adapted))
            result: Any = adapted.merge_and_unload()
    except Exception as error:  # of peft, of safetensors, and of torch where shapes differ
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source}: this adapter cannot be merged into {model.name_or_path} ({reason})"
        ) from error
    if different := sorted(wanted ^ held):
        verb = "lacks" if different[0] in wanted else "holds beyond those of its base"
        raise UserError(f"{source}: the adapter {verb} {len(different)}, as {different[0]}")
    assert isinstance(result, PreTrainedModel)
    return result.requires_grad_(True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out warnings about what is checked here, or is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\..*")
        yield


def _peft(source: str = "model.adapter") -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{source}: needs peft: pip install 'opd[lora]'") from error
    return peft
