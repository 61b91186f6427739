"""Do student and teacher fit together, and do we run them as their authors meant?"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import UserError
from opd.models.passes import completion_logits

log = logging.getLogger(__name__)


def context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model was made for; None if it does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Entries of the output head, padding included; also of one that is sharded."""
    return int(model.get_output_embeddings().out_features)


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


def check_models(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> None:
    """Refuse a pair of models that cannot be compared token by token.

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


def check_context(context: int | None, role: str, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse completions that do not fit into a context of so many positions.

    Raises:
        UserError: ``prompt_tokens`` + ``new_tokens`` exceed it.
    """
    if context is not None and prompt_tokens + new_tokens > context:
        left = context - prompt_tokens
        remedy = f"lower max_new_tokens to {left} or " if left > 0 else "lower "
        raise UserError(
            f"model.max_new_tokens={new_tokens} and prompts of up to {prompt_tokens} tokens do not "
            f"fit the {role}'s context of {context} tokens; {remedy}data.max_prompt_tokens"
        )


def check_precision(precision: str) -> None:
    """Refuse float16, whose scaled gradients would be clipped as they are.

    Raises:
        UserError: ``precision``, as the Trainer names it, is one of float16.
    """
    if precision in ("16-mixed", "16-true"):
        raise UserError(f"trainer.precision {precision} is not supported; use bf16-mixed")


def check_master_weights(model: PreTrainedModel) -> None:
    """Refuse to train weights that small steps do not change.

    Raises:
        UserError: They are not float32.
    """
    other = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32}
    if torch.float64 in other:
        raise UserError(
            "the student's weights are float64, and what they are compared with is float32; train "
            "with --trainer.precision 32-true"
        )
    if other:
        raise UserError(
            f"the student's weights are {other.pop()}: steps of the usual size round to nothing. "
            "Train with --trainer.precision bf16-mixed, which keeps float32 master weights"
        )


@torch.no_grad()
def check_passes(model: PreTrainedModel, source: str) -> None:
    """Make sure that a model can be run the way that we do, on text alone and padded on the left.

    Raises:
        UserError: It does not run, or gives no numbers; body and head, called one after the other,
            do not give its own logits; or a token's logits depend on those that follow it, or on
            padding.
    """
    ids = torch.tensor([[1, 2, 3], [1, 2, 0], [0, 1, 2]], device=model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 0] = False
    name = type(model).__name__
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    try:
        if attention not in (None, "sdpa", "eager"):  # others may need a GPU, and this is a CPU
            model.config._attn_implementation = "eager"
        ours = completion_logits(model, ids, mask, mask).split([3, 3, 2])
        own = model(input_ids=ids[:2], attention_mask=mask[:2].long()).logits.float()
    except Exception as error:  # whatever a model needs besides text
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source}: {name} does not run on text alone ({type(error).__name__}: {reason}); name "
            "a causal language model of text"
        ) from error
    finally:
        if model.config._attn_implementation != attention:
            model.config._attn_implementation = attention
        model.train(training)
    if not own.isfinite().all():
        raise UserError(
            f"{source}: {name} gives logits that are NaN or infinite: its weights are damaged, or "
            "the training that they come from has diverged"
        )
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1

    def differ(left: Tensor, right: Tensor) -> bool:
        atol = tolerance * float(own.abs().max())
        return not torch.allclose(left, right, rtol=tolerance, atol=atol)

    for wrong, what in [
        (differ(own[0, :2], own[1, :2]), "looks at tokens that follow: it is an encoder"),
        (
            differ(torch.stack(ours[:2]), own),
            "changes its logits after the output head in a way that is not supported",
        ),
        (differ(ours[2], own[0, :2]), "does not leave out padding on the left of a prompt"),
    ]:
        if wrong:
            raise UserError(f"{source}: {name} {what}; name another causal language model")
