"""What a model's generation config says, and what it may not: only which tokens end a completion.

All other fields (temperature, repetition_penalty, suppress_tokens, ...) make ``generate`` sample
from another distribution than the one that is trained and compared, so nobody here obeys them. They
are kept for those who use the trained model elsewhere.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import UserError
from opd.sharding import unwrapped

log = logging.getLogger(__name__)

SAMPLING_ONLY = (
    *("temperature", "top_k", "top_p", "min_p", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff"),
)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All token ids that end a completion, from the generation config and the tokenizer.

    Ids that the tokenizer has no token for are passed over, with a warning.
    """
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    found = {i for i in [*ids, tokenizer.eos_token_id] if i is not None}
    tokens = set(tokenizer.get_vocab().values())
    if unknown := found - tokens:
        log.warning("%s: eos_token_id %s is no token", type(model).__name__, [*unknown])
    return tuple(sorted(found & tokens))


def check_eos_token_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse ids, given by the user, that cannot end a completion.

    Raises:
        UserError: One is no token, or is there twice.
    """
    tokens = set(tokenizer.get_vocab().values())
    for token_id in ids:
        if token_id not in tokens:
            raise UserError(
                f"model.eos_token_ids: {token_id} is no token of the tokenizer, which has "
                f"{len(tokens)} with ids up to {max(tokens)}"
            )
        if list(ids).count(token_id) > 1:
            raise UserError(f"model.eos_token_ids: {token_id} is there twice")


def ends_of_all(
    student: Iterable[int], teachers: Mapping[str, Iterable[int]], given: Sequence[int] | None
) -> tuple[int, ...]:
    """Choose which tokens end a completion: those that the user gives, or the ends of all models.

    An instruct teacher of a base student ends with a token that the student never says at first.
    If that token ends completions, the student is taught to say it; if it does not, completions
    run to their limit for ever. The student's own end must end them too: it says nothing sensible
    after it.

    Args:
        student: Ends of the student.
        teachers: Ends of each teacher, by name.
        given: What the user has chosen; None: nothing.

    Returns:
        Token ids, sorted.
    """
    own = set(student)
    ends = own.union(*teachers.values()) if given is None else set(given)
    for name, theirs in teachers.items():
        if given is None and set(theirs) != own:
            log.warning(
                "teacher %s ends with token %s, the student with %s: any of %s ends a completion. "
                "To choose, set --model.eos_token_ids",
                *(name, sorted(theirs), sorted(own), sorted(ends)),
            )
        elif theirs and ends.isdisjoint(theirs):
            log.warning(
                "teacher %s ends with token %s, completions with %s: it will find every end of a "
                "completion unlikely. Add its token to --model.eos_token_ids",
                *(name, sorted(theirs), sorted(ends)),
            )
    if not ends:
        log.warning(
            "no token ends a completion: all run to model.max_new_tokens. Set --model.eos_token_ids"
        )
    return tuple(sorted(ends))


@contextmanager
def generating_with(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Let ``generate`` fill unset fields from another generation config than the model's own."""
    inner: Any = unwrapped(model)
    own = inner.generation_config
    inner.generation_config = config
    try:
        yield
    finally:
        inner.generation_config = own


def plain_sampling(ends: Sequence[int]) -> GenerationConfig:
    """Return a generation config under which only what a call asks for changes the distribution."""
    return GenerationConfig(
        eos_token_id=list(ends) or None, do_sample=False, temperature=1.0, top_k=0, top_p=1.0
    )


def saveable(config: GenerationConfig) -> GenerationConfig:
    """Mend a generation config that transformers reads but refuses to write.

    Many published ones have a temperature without ``do_sample``, which used to mean sampling. With
    ``do_sample: false`` they are greedy, and what only sampling needs goes.
    """
    mended = copy.deepcopy(config)
    if _is_valid(mended):
        return mended
    if mended.do_sample is None:
        mended.do_sample = True
    elif not mended.do_sample:
        for name in SAMPLING_ONLY:
            setattr(mended, name, None)
    if _is_valid(mended):
        return mended
    log.warning("the model's generation config is invalid: only its special tokens are kept")
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
