"""Rollouts with the student itself, through ``generate`` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import UserError
from opd.models import generating_with, in_eval_mode
from opd.prompts import PromptBatch
from opd.rollouts import layers
from opd.rollouts.decoding import Decoding
from opd.rollouts.engine import RolloutEngine
from opd.rollouts.rollouts import Rollouts, Sampler
from opd.sharding import forward_pass, gathered
from opd.weights import Weights


class TransformersEngine(RolloutEngine):
    """Rollouts with the student itself, through ``generate`` of transformers.

    Args:
        batch_size: Completions generated at a time; None: all at once.
        progress_seconds: Long rollouts log their progress so often.

    Raises:
        UserError: The batch size is not above 0.
    """

    def __init__(self, batch_size: int | None = None, progress_seconds: float = 30.0) -> None:
        if batch_size is not None and batch_size < 1:
            raise UserError(f"TransformersEngine.batch_size={batch_size} must be at least 1")
        self.batch_size = batch_size
        self.progress_seconds = progress_seconds
        self._student: PreTrainedModel | None = None

    def start(
        self, student: PreTrainedModel, weights: Weights, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Sample with the student itself, whatever its weights are."""
        self._student = student

    def stop(self) -> None:
        """Let go of the student."""
        self._student = None

    @torch.no_grad()
    def __call__(self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]) -> Rollouts:
        """Sample one completion per prompt."""
        model = self._student
        assert model is not None, "start the engine first"
        size = self.batch_size or max(len(prompts), 1)
        cuts = [slice(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
        # Every token has a shape of its own: layers that are compiled run as they are
        # Nor does a field of the model's own generation config leak in
        with (
            in_eval_mode(model),
            gathered(model),
            generating_with(model, GenerationConfig()),
            torch.compiler.set_stance("force_eager"),
            layers.decoding(model, min(size, len(prompts)), sampler.max_new_tokens),
        ):
            parts = [
                self._sample(model, prompts.select(range(cut.start, cut.stop)), sampler, seeds[cut])
                for cut in cuts
            ]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Rollouts.empty(prompts)
        return Rollouts.concatenate(parts, sampler.pad_token_id)

    def _sample(
        self, model: PreTrainedModel, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]
    ) -> Rollouts:
        different, prompt_of = prompts.unique()
        decoding = Decoding(
            prompt_of,
            torch.tensor(seeds, device=prompts.ids.device),
            sampler,
            self.progress_seconds,
        )
        _generate(
            model,
            different.ids,
            attention_mask=different.mask.long(),
            generation_config=GenerationConfig(
                max_new_tokens=sampler.max_new_tokens,
                do_sample=False,
                eos_token_id=list(sampler.eos_token_ids) or None,
                pad_token_id=sampler.pad_token_id,
                use_cache=True,
            ),
            custom_generate=decoding,
        )
        lengths, finished = completion_lengths(decoding.ids, sampler.eos_token_ids)
        rollouts = Rollouts(prompts, decoding.ids, lengths, finished, decoding.logprobs)
        rollouts.engine_logprobs = rollouts.engine_logprobs.masked_fill(~rollouts.mask, 0.0)
        return rollouts


@forward_pass
def _generate(model: PreTrainedModel, /, ids: Tensor, **options: Any) -> Tensor:
    generate: Any = model.generate  # untyped in transformers
    sequences: Tensor = generate(ids, **options)
    return sequences


def completion_lengths(completion_ids: Tensor, eos_ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Find where each completion ends: at its first EOS, which may also be the padding token.

    Args:
        completion_ids: Token ids, [B, C].
        eos_ids: Token ids that end a completion.

    Returns:
        Lengths with the EOS included [B], and whether there was an EOS [B].
    """
    is_eos = torch.isin(completion_ids, torch.tensor(eos_ids, device=completion_ids.device))
    finished = is_eos.any(dim=1)
    first = is_eos.int().argmax(dim=1) + 1
    return torch.where(finished, first, completion_ids.shape[1]), finished
