"""Models and tokenizers by hub id, folder, checkpoint, GGUF file or ``embedded:NAME``.

Weights are read from safetensors or GGUF (or from our own checkpoints with ``weights_only``), all
of them and no others, and remote code runs only where the configuration says so.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

from opd import checkpoints
from opd.errors import UserError
from opd.models import adapters, gguf, hub
from opd.models.adapters import Dtype, LoRA
from opd.models.checks import check_passes
from opd.models.generation import saveable
from opd.sharding import unwrapped

disable_progress_bar()  # of loading weights: a model of ours or a shard a second needs none

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent.parent / "embedded"
EMBEDDED_MODELS = ("base", "teacher", "teacher-rl", "base-long", "teacher-long")
LFS_POINTER = b"version https://git-lfs"
# Constants that old versions of transformers saved, not all of which its classes know any more
FORMER_BUFFERS = (
    *(".attn.bias", ".attn.attention.bias", ".masked_bias", ".causal_mask"),
    *(".inv_freq", ".position_ids"),
)
WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.")
TRUST = (
    "read it, and allow it with --model.trust_remote_code true (fit) or --trust_remote_code true"
)


@contextmanager
def model_folder(source: str, *, weights: bool = False) -> Iterator[str]:
    """Resolve a model source to a folder that ``from_pretrained`` accepts.

    For a checkpoint or a GGUF file it is a temporary folder with the config and tokenizer, without
    weights; for a checkpoint of an adapter, the folder that peft would write.

    Args:
        source: Hub id, perhaps with @REVISION, folder, checkpoint of ours, GGUF file, or
            embedded:NAME.
        weights: Whether those of a hub model or an adapter are needed.

    Raises:
        UserError: The source looks like a path and is not there, or is a folder without a model.
    """
    if not source:
        raise UserError(
            "no model named: give a hub id, a folder, a checkpoint, a GGUF file or embedded:NAME"
        )
    path = Path(source).expanduser()
    if source.startswith("embedded:"):
        name = source.removeprefix("embedded:")
        if name not in EMBEDDED_MODELS:
            known = ", ".join(f"embedded:{known}" for known in EMBEDDED_MODELS)
            raise UserError(f"{source}: the embedded models are {known}")
        yield str(EMBEDDED / name)
    elif gguf.is_gguf(path):
        yield gguf.folder(source, path)
    elif checkpoints.is_checkpoint(path):
        with tempfile.TemporaryDirectory() as temporary:
            # its name is that of the module which transformers makes of the model's own code
            folder = Path(temporary) / "student"
            folder.mkdir()
            for name, content in checkpoints.read(path)[checkpoints.STUDENT_FILES].items():
                (folder / Path(name).name).write_bytes(content)
            if weights and adapters.is_adapter(folder):
                adapters.write_weights(path, folder)
            yield str(folder)
    elif path.is_dir():
        if not (path / "config.json").is_file() and (path / "checkpoints").is_dir():
            raise UserError(
                f"{source}: is a run folder; name a checkpoint in it, as "
                f"{path / 'checkpoints' / 'last.ckpt'}"
            )
        yield str(path)
    elif (bare := Path(source.rpartition("@")[0]).expanduser()) != Path() and bare.exists():
        raise UserError(f"{source}: {bare} is a folder or file here, which has no revisions")
    elif (
        source.startswith((".", "/", "~"))
        or source.partition("@")[0].count("/") > 1
        or source.endswith((".ckpt", gguf.SUFFIX))
    ):
        raise UserError(f"{source}: there is no such model folder, checkpoint or GGUF file")
    else:
        yield hub.fetch(source, weights=weights)


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        UserError: There is none at ``source``.
    """
    with model_folder(source) as folder, _explained(source, folder, "tokenizer"):
        if adapters.is_adapter(folder) and not any(Path(folder).glob("tokenizer*")):
            base = adapters.base_of(source, folder)
            return load_tokenizer(base, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if len(tokenizer) == len(tokenizer.get_added_vocab()):  # made from a model's config alone
            raise UserError(f"{source}: holds no tokenizer; save that of its family there too")
    return tokenizer


def load_model(
    source: str,
    *,
    dtype: Dtype = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    adapter: LoRA | None = None,
) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        source: Hub id, perhaps with @REVISION, folder, checkpoint of ours, GGUF file, or
            embedded:NAME; a folder or checkpoint may hold an adapter, which is merged.
        dtype: Dtype of the weights in memory.
        attn_implementation: sdpa, eager, flash_attention_2, ... None: the one that its config
            names, else sdpa. Models that have no sdpa get eager, with a warning.
        trust_remote_code: Let a model run its own code.
        weights: False builds the model on the meta device, for weights that another rank sends.
        adapter: Put one beside its layers, to be trained.

    Raises:
        UserError: There is no causal language model at ``source``, its weights are not exactly
            those that it needs, or its head cannot be separated from its body (see
            :func:`completion_logits`).
    """
    how: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "weights": weights,
    }
    with (
        model_folder(source, weights=weights) as folder,
        _explained(source, folder, "causal language model"),
    ):
        if adapters.is_adapter(folder):
            if adapter is not None and adapter.quantize is not None:
                raise UserError(
                    f"{source}: an adapter's base is merged with it, which model.adapter.quantize "
                    "cannot be; export it, and name the folder"
                )
            model = load_model(adapters.base_of(source, folder), **how)
            if weights:
                model = adapters.merged(model, source, folder)
        else:
            model = _load(source, folder, **how, more=adapter.loading() if adapter else {})
        if (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        model.generation_config = saveable(model.generation_config)
    if weights:
        check_passes(model, source)
    if adapter is not None:
        adapter.attach(model, source)
    return model


def load_head(
    source: str, *, dtype: Dtype = "float32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model of which only the head has weights; the others are on the meta device.

    Args:
        source: Hub id, perhaps with @REVISION, folder, or embedded:NAME.
        dtype: Dtype of the weights in memory.
        trust_remote_code: Let a model run its own code.

    Raises:
        UserError: There is no causal language model at ``source``, or it has no such weights in
            safetensors files.
    """
    model = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code, weights=False)
    head = model.get_output_embeddings()
    with model_folder(source, weights=True) as folder:
        for kind, parameter in list(head.named_parameters()):
            everything = model.named_parameters(remove_duplicate=False)
            names = [name for name, other in everything if other is parameter]
            weight = _one_of(names, folder)
            if weight is None or weight.shape != parameter.shape:
                raise UserError(f"{source}: has no {names[0]} in safetensors files; export it")
            own = nn.Parameter(weight.to(getattr(torch, dtype)), requires_grad=False)
            setattr(head, kind, own)
    return model


def _one_of(names: Sequence[str], folder: str) -> Tensor | None:
    """Read the tensor that has one of these names, perhaps without its first parts."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                if any(name == key or name.endswith(f".{key}") for name in names):
                    tensor: Tensor = file.get_tensor(key)
                    return tensor
    return None


def _load(
    source: str,
    folder: str,
    *,
    dtype: Dtype,
    attn_implementation: str | None,
    trust_remote_code: bool,
    weights: bool,
    more: dict[str, Any],
) -> PreTrainedModel:
    """Load a model that is no adapter; ``more`` is for ``from_pretrained``, of folders only."""
    path = Path(source).expanduser()
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _check_kind(source, config)
    _set_switches(config)
    options |= _attention(source, config, attn_implementation, options)
    if weights and gguf.is_gguf(path) and not more:
        with gguf.reading(source, path) as how:
            packed = _read(source, folder, config, options, how)
        model = gguf.ordinary(packed, config, options)
    elif weights and not checkpoints.is_checkpoint(path):
        model = _read(source, folder, config, options, {"use_safetensors": True, **more})
        adapters.keep_layout(model)
    elif more:
        raise UserError(f"{source}: model.adapter.quantize needs a hub id or a folder")
    else:
        with no_init_weights(), nullcontext() if weights else torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
        model.tie_weights()  # which the context above has left out
        if weights:
            checkpoints.read_student(path, model.state_dict())
    if "attn_implementation" not in options and model.config._attn_implementation == "eager":
        log.warning("%s: %s has no sdpa attention: it gets eager", source, type(model).__name__)
    assert isinstance(model, PreTrainedModel)
    return model


def _check_kind(source: str, config: PretrainedConfig) -> None:
    """Refuse what is not a language model that reads text from left to right."""
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or not (own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        saved_as = ", ".join(config.architectures or [type(config).__name__])
        raise UserError(
            f"{source}: {config.model_type} ({saved_as}) is no causal language model of text; name "
            "one, such as the text model of its family"
        )


def _set_switches(config: PretrainedConfig) -> None:
    """Passes return hidden states or logits and nothing else, whatever the model was saved with.

    Router logits, for one, are for a loss that we do not have, and cost memory in each pass.
    """
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in [
            ("output_router_logits", False),
            ("output_hidden_states", False),
            ("return_dict", True),
        ]:
            if getattr(part, name, value) != value:
                setattr(part, name, value)


def _attention(
    source: str, config: PretrainedConfig, wanted: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Choose an attention implementation: further options of loading, none for sdpa.

    Raises:
        UserError: The one wanted cannot be used.
    """
    stored = config._attn_implementation
    config._attn_implementation = None  # sdpa, or eager for models that have none
    chosen = wanted or stored
    if chosen in (None, "sdpa"):
        return {}
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, **options, attn_implementation=chosen)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        config._attn_implementation = None
        if wanted is None:
            log.warning("%s: was trained with %s, not to be had (%s)", source, stored, reason)
            return {}
        raise UserError(
            f"{source}: attn_implementation {wanted} cannot be used here ({reason}); install what "
            "it needs, or leave attn_implementation out"
        ) from error
    return {"attn_implementation": chosen}


def _read(
    source: str,
    folder: str,
    config: PretrainedConfig,
    options: dict[str, Any],
    how: dict[str, Any],
) -> PreTrainedModel:
    """Read a model's weights: all that it needs and no others.

    Raises:
        UserError: Some are missing, unexpected, or of another shape.
    """
    reports = logging.getLogger("transformers.modeling_utils")
    reports.addFilter(_nothing)  # no table of what is raised below in a line
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below
            **how,
            **options,
        )
    finally:
        reports.removeFilter(_nothing)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.endswith(FORMER_BUFFERS))
    mismatched = sorted(info["mismatched_keys"])
    name = type(model).__name__
    if missing or unexpected:
        lists = [("lack", missing), ("hold beyond those of the model", unexpected)]
        what = " and ".join(f"{verb} {len(k)}, as {k[0]}" for verb, k in lists if k)
        raise UserError(
            f"{source}: its weights are not those of {name}: they {what}"
            f"{_advice(missing, unexpected, config)}"
        )
    if mismatched:
        key, found, wanted = mismatched[0]
        raise UserError(
            f"{source}: {key} has shape {list(found)}, {name} needs {list(wanted)}: the config is "
            "not that of the weights"
        )
    assert isinstance(model, PreTrainedModel)
    _check_tied(source, model, config, options)
    return model


def _check_tied(
    source: str, model: PreTrainedModel, config: PretrainedConfig, options: dict[str, Any]
) -> None:
    """Refuse two matrices where the config says one: its checkpoint would be read as one."""
    if _has_one_matrix(model):
        return
    with torch.device("meta"):
        as_configured: Any = AutoModelForCausalLM.from_config(config, **options)
    if _has_one_matrix(as_configured):
        raise UserError(
            f"{source}: its config says that output head and embedding are one, and its weights "
            "hold two that differ; set tie_word_embeddings to false in its config.json"
        )


def _has_one_matrix(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _advice(missing: list[str], unexpected: list[str], config: PretrainedConfig) -> str:
    for prefix in WRAPPERS:
        if any(key.startswith(prefix) or f".{prefix}" in key for key in unexpected):
            return f"; take {prefix!r} out of their names: they were saved from a wrapped model"
    saved_as = [name for name in config.architectures or [] if "CausalLM" not in name]
    return f" (saved as {saved_as[0]})" if saved_as else "; save the whole model anew"


@contextmanager
def _explained(source: str, folder: str, what: str) -> Iterator[None]:
    """Turn what transformers raises over a model's files into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a broken file provokes, in three libraries
        reason = _flaw(Path(folder), what) or " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            reason = f"it needs code of its own: {TRUST}"
        raise UserError(f"{source}: no {what} could be loaded from it ({reason})") from error


def _flaw(folder: Path, what: str) -> str | None:
    """Say what is wrong with a model's files; None if it cannot be seen from outside."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{path.name} is a pointer of Git LFS, not the file: run `git lfs pull`"
    names = {path.name for path in files}
    tokenizer_alone = what == "tokenizer" and any(name.startswith("tokenizer") for name in names)
    if "config.json" not in names and not tokenizer_alone:
        packed = [path for path in files if gguf.is_gguf(path)]
        named = f", only {packed[0].name}: name that file" if packed else ""
        return f"there is no config.json{named}"
    for name in (name for name in sorted(names) if name.endswith(".json")):
        try:
            json.loads((folder / name).read_bytes())
        except ValueError as error:
            return f"{name} is no valid JSON: {error}"
    if what == "tokenizer":
        return None
    config = json.loads((folder / "config.json").read_bytes())
    if not isinstance(config, dict) or not config.get("model_type"):
        return "config.json names no model_type"
    weights = [path for path in files if path.suffix == ".safetensors"]
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as error:  # SafetensorError is one, and so is what an empty file raises
            return f"{path.name} is cut short or damaged ({error}): copy it again"
    if not weights:
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        return "there are no weights in safetensors" + (
            f", only pickled ones ({pickled[0]}), which can run code: convert them"
            if pickled
            else ""
        )
    return None


def student_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Return what turns weights into a model again, as file name and content.

    Config, generation config, tokenizer files, the code of a model that has its own, and in the
    config the attention implementation, if it is not the usual one. Of a model that trains an
    adapter it is the adapter's config alone: all else is its base model's.
    """
    adapter = adapters.config_of(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if adapter is None:
            model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in _own_code(model) if adapter is None else ():
            (folder / path.name).write_bytes(path.read_bytes())
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    if adapter is not None:
        return {**files, adapters.CONFIG: adapter}
    attention = model.config._attn_implementation
    if attention not in (None, "sdpa"):
        config = {**json.loads(files["config.json"]), "attn_implementation": attention}
        files["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return files


def _own_code(model: PreTrainedModel) -> Collection[Path]:
    """List the files of a model's own code; a sharded model's class is made from the one wanted."""
    for kind in type(unwrapped(model)).__mro__:
        if vars(kind).get("_auto_class"):
            file = sys.modules[kind.__module__].__file__
            assert file is not None
            return [Path(file), *map(Path, get_relative_import_files(file))]
    return []
