"""Models and tokenizers by hub id, folder, checkpoint or ``embedded:NAME``, and whether they fit.

Weights are read from safetensors (or from our own checkpoints with ``weights_only``), and remote
code runs only where the configuration says so.

Shapes: B sequences, T positions, N selected positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
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
from opd.sharding import forward_pass

log = logging.getLogger(__name__)
disable_progress_bar()  # of loading weights: a model of ours or a shard a second needs none

Dtype = Literal["float32", "bfloat16", "float16"]
EMBEDDED = Path(__file__).parent / "embedded"
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
        _check_projection(model, source)
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


def context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model was made for; None if it does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Entries of the output head, padding included; also of one that is sharded."""
    return int(model.get_output_embeddings().out_features)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All token ids that end a completion, from the generation config and the tokenizer."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}))


# --- forward passes -------------------------------------------------------------------------------


def _hidden_states(model: PreTrainedModel, ids: Tensor, mask: Tensor, select: Tensor) -> Tensor:
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    body = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    )
    hidden: Tensor = body.last_hidden_state[select]
    return hidden


def _project(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        logits = F.linear(hidden.float(), head.weight.float(), bias)
    config = model.config.get_text_config()
    if softcap := getattr(config, "final_logit_softcapping", None):
        logits = softcap * torch.tanh(logits / softcap)
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    return logits


@forward_pass
def completion_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, select: Tensor) -> Tensor:
    """Run a causal language model and return float32 logits of the positions asked for.

    The product with the head is done in float32 under any precision plugin: rounding logits to
    bfloat16 before the softmax costs several per cent of the gradient.

    Args:
        model: Causal language model.
        ids: Token ids, [B, T].
        mask: True at tokens, False at padding on either side, [B, T].
        select: Positions to keep, bool [B, T], N of them True.

    Returns:
        Logits, float32, [N, V].
    """
    return _project(model, _hidden_states(model, ids, mask, select))


@forward_pass
def hidden_states(model: PreTrainedModel, ids: Tensor, mask: Tensor, select: Tensor) -> Tensor:
    """Run the body only; returns last hidden states, [N, H], ready for :func:`project`."""
    return _hidden_states(model, ids, mask, select)


@forward_pass
def project(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Project hidden states, [N, H], onto float32 logits, [N, V], as :func:`completion_logits`."""
    return _project(model, hidden)


@torch.no_grad()
def _check_projection(model: PreTrainedModel, source: str) -> None:
    """Make sure that body and head, called one after the other, give the model's own logits."""
    training = model.training
    model.eval()
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    everything = torch.ones_like(ids, dtype=torch.bool)
    ours = completion_logits(model, ids, everything, everything)
    own = model(input_ids=ids, attention_mask=everything).logits[0].float()
    model.train(training)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(ours, own, rtol=tolerance, atol=tolerance * float(own.abs().max())):
        raise UserError(
            f"{source}: {type(model).__name__} changes its logits after the output head in a way "
            "that is not supported"
        )


# --- do student and teacher fit? ------------------------------------------------------------------


def check_tokenizers(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str
) -> None:
    """Refuse a teacher that gives token ids another meaning.

    Raises:
        UserError: The vocabularies differ; the message names a token.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = sorted(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t))
        token = differing[0]
        raise UserError(
            f"teacher {name}: its tokenizer differs from the student's in {len(differing)} tokens, "
            f"for example {token!r} is {ours.get(token)} for the student and {theirs.get(token)} "
            "for the teacher; choose a teacher of the student's family"
        )
    if student.chat_template != teacher.chat_template:
        log.warning(
            "teacher %s has another chat template than the student; prompts are rendered with the "
            "student's. If the teacher was tuned on its own, set --model.tokenizer to the teacher",
            name,
        )


def check_models(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: tuple[int, ...],
    name: str,
) -> None:
    """Refuse or warn about a pair of models that cannot be compared token by token.

    Vocabularies may be padded to different sizes, as long as both cover the tokenizer.

    Raises:
        UserError: A vocabulary is smaller than the tokenizer.
    """
    for role, model in [("student", student), ("teacher " + name, teacher)]:
        size = vocabulary_size(model)
        if size < len(tokenizer):
            raise UserError(
                f"{role}: its vocabulary has {size} entries, but the tokenizer has "
                f"{len(tokenizer)} tokens; choose student and teacher of one family"
            )
    theirs = teacher.generation_config.eos_token_id
    teacher_ids = set(theirs if isinstance(theirs, list) else [theirs]) - {None}
    if teacher_ids and not teacher_ids & set(eos_ids):
        log.warning(
            "teacher %s ends with token %s, the student with %s: the teacher will find every end "
            "of a completion unlikely. Set --model.eos_token_ids to the token that both use",
            name,
            sorted(teacher_ids),
            list(eos_ids),
        )


def check_context(model: PreTrainedModel, role: str, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse completions that do not fit.

    Raises:
        UserError: ``prompt_tokens`` + ``new_tokens`` exceed the model's context.
    """
    context = context_length(model)
    if context is not None and prompt_tokens + new_tokens > context:
        raise UserError(
            f"model.max_new_tokens={new_tokens} and prompts of up to {prompt_tokens} tokens do not "
            f"fit the {role}'s context of {context} tokens; lower max_new_tokens to "
            f"{max(context - prompt_tokens, 0)} or data.max_prompt_tokens"
        )
