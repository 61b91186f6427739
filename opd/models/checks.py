"""Do student and teacher fit together, and do we run them as their authors meant?"""

from __future__ import annotations

import logging

import torch
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


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All token ids that end a completion, from the generation config and the tokenizer."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}))


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


def check_context(context: int | None, role: str, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse completions that do not fit into a context of so many positions.

    Raises:
        UserError: ``prompt_tokens`` + ``new_tokens`` exceed it.
    """
    if context is not None and prompt_tokens + new_tokens > context:
        raise UserError(
            f"model.max_new_tokens={new_tokens} and prompts of up to {prompt_tokens} tokens do not "
            f"fit the {role}'s context of {context} tokens; lower max_new_tokens to "
            f"{max(context - prompt_tokens, 0)} or data.max_prompt_tokens"
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
    low = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32}
    if low:
        raise UserError(
            f"the student's weights are {low.pop()}: steps of the usual size round to nothing. "
            "Train with --trainer.precision bf16-mixed, which keeps float32 master weights"
        )


@torch.no_grad()
def check_projection(model: PreTrainedModel, source: str) -> None:
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
