"""Rollouts with the student itself, through ``generate`` of transformers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opd.errors import UserError
from opd.models import generating_with
from opd.prompts import PromptBatch
from opd.randomness import uniform
from opd.rollouts.engine import RolloutEngine
from opd.rollouts.rollouts import Rollouts, Sampler
from opd.sharding import forward_pass, gathered
from opd.weights import Weights


class _Sampling(LogitsProcessor):
    """Samples inside greedy decoding: the winner of the returned scores is the sample.

    A draw is the inverse of the cumulated distribution at a uniform number of the completion's own.
    """

    def __init__(self, sampler: Sampler, seeds: Tensor, progress_seconds: float):
        self.sampler = sampler
        self.seeds = seeds
        self.progress_seconds = progress_seconds
        self.warpers = LogitsProcessorList()
        if sampler.top_k > 0:
            self.warpers.append(TopKLogitsWarper(sampler.top_k))
        if sampler.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampler.top_p))
        self.logprobs: list[Tensor] = []  # [B] per token
        self.next_report = time.monotonic() + progress_seconds

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if self.sampler.vocabulary is not None:
            scores[:, self.sampler.vocabulary :] = -torch.inf  # a copy: generate's are float32 too
        if self.sampler.temperature > 0:
            scores = scores / self.sampler.temperature
            scores = self.warpers(cast(LongTensor, input_ids), cast(FloatTensor, scores))
        logprobs = torch.log_softmax(scores, dim=-1)
        if self.sampler.temperature > 0:
            chosen = draw(logprobs, uniform(self.seeds, len(self.logprobs)))
        else:
            chosen = logprobs.argmax(dim=-1)
        self.logprobs.append(logprobs.gather(1, chosen[:, None]).squeeze(1))
        self._report(len(input_ids))
        winner = torch.full_like(scores, -torch.inf)
        return winner.scatter_(1, chosen[:, None], 0.0)

    def _report(self, completions: int) -> None:
        if time.monotonic() > self.next_report:
            from lightning.pytorch.utilities import rank_zero_info  # `opd evaluate` does without

            self.next_report = time.monotonic() + self.progress_seconds
            done, limit = len(self.logprobs), self.sampler.max_new_tokens
            rank_zero_info(f"rollout: token {done} of at most {limit}, {completions} completions")


def draw(logprobs: Tensor, numbers: Tensor) -> Tensor:
    """Draw tokens by the inverse of the cumulated distribution.

    Args:
        logprobs: Of each token, [B, V].
        numbers: Uniform in [0, 1), float64, [B].

    Returns:
        Token ids [B]: never one of probability 0; the last one where they are not numbers, so that
        what they do to the loss is found, and named, by the step.
    """
    cumulated = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    wanted = numbers[:, None] * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, wanted, right=True).squeeze(1)
    return found.clamp(max=logprobs.shape[1] - 1)


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
        training = model.training
        model.eval()
        size = self.batch_size or max(len(prompts), 1)
        cuts = [slice(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
        try:
            # Every token has a shape of its own: layers that are compiled run as they are
            # Nor does a field of the model's own generation config leak in
            with (
                gathered(model),
                generating_with(model, GenerationConfig()),
                torch.compiler.set_stance("force_eager"),
            ):
                parts = [
                    self._sample(
                        model, prompts.select(range(cut.start, cut.stop)), sampler, seeds[cut]
                    )
                    for cut in cuts
                ]
        finally:
            model.train(training)
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Rollouts.empty(prompts)
        return Rollouts.concatenate(parts, sampler.pad_token_id)

    def _sample(
        self, model: PreTrainedModel, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]
    ) -> Rollouts:
        device = prompts.ids.device
        sampling = _Sampling(sampler, torch.tensor(seeds, device=device), self.progress_seconds)
        sequences = _generate(
            model,
            prompts.ids,
            attention_mask=prompts.mask.long(),
            generation_config=GenerationConfig(
                max_new_tokens=sampler.max_new_tokens,
                do_sample=False,
                eos_token_id=list(sampler.eos_token_ids) or None,
                pad_token_id=sampler.pad_token_id,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([sampling]),
            synced_gpus=False,  # the model is gathered: ranks need not make their steps together
        )
        completion_ids = sequences[:, prompts.ids.shape[1] :]
        lengths, finished = completion_lengths(completion_ids, sampler.eos_token_ids)
        rollouts = Rollouts(
            prompts, completion_ids, lengths, finished, torch.stack(sampling.logprobs, dim=1)
        )
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
