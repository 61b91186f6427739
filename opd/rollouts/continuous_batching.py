"""Rollouts with the student itself, through the continuous batching of transformers.

:class:`TransformersEngine` decodes a batch until its longest completion has ended. Here the next
completion begins as soon as one ends, so the batch stays full until none is left to begin. Keys and
values lie in the pages of one cache, which completions hand on to each other. The cache is made for
one call: nothing that old weights have computed is ever read by new ones.

transformers keeps the requests, their pages and their passes; what is drawn is ours, so a
completion is the same under both engines. The loop runs here, not in the thread that transformers
has for servers: what goes wrong is raised.

Shapes: B completions, R of them that get a token in a pass, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager

from opd.errors import UserError
from opd.prompts import PromptBatch
from opd.randomness import own_randomness, uniform
from opd.rollouts import layers
from opd.rollouts.engine import RolloutEngine
from opd.rollouts.rollouts import Rollouts, Sampler
from opd.rollouts.sampling import sample
from opd.sharding import forward_pass, gathered, unwrapped
from opd.weights import Weights

PAGE = 32  # tokens
PASS = 512  # tokens that a pass reads at most, if no more are decoded: longer prompts take several
PAGED = {"full_attention", "sliding_attention"}  # kinds of layers whose state is keys and values
OLDEST = "5.19"  # transformers: before, a cache has pages of another kind
ALTERNATIVE = "Use opd.rollouts.TransformersEngine"


class ContinuousBatching(RolloutEngine):
    """Rollouts with the student itself, through the continuous batching of transformers.

    Args:
        batch_size: Completions decoded at a time; when one ends, the next begins.
        cache_tokens: Tokens of prompts and completions that the cache holds; None: as many as
            ``batch_size`` of the longest can have. With fewer, a completion for which there is no
            room left is put back, and what there is of it is read again later.
        progress_seconds: Long rollouts log their progress so often.

    Raises:
        UserError: An option is not above 0.
    """

    def __init__(
        self,
        batch_size: int = 64,
        cache_tokens: int | None = None,
        progress_seconds: float = 30.0,
    ) -> None:
        for name, value in [("batch_size", batch_size), ("cache_tokens", cache_tokens)]:
            if value is not None and value < 1:
                raise UserError(f"ContinuousBatching.{name}={value} must be at least 1")
        self.batch_size = batch_size
        self.cache_tokens = cache_tokens
        self.progress_seconds = progress_seconds
        self._student: PreTrainedModel | None = None

    def start(
        self, student: PreTrainedModel, weights: Weights, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Sample with the student itself, whatever its weights are.

        Raises:
            UserError: Its layers cannot read from pages.
        """
        check_pages(student)
        self._student = student

    def stop(self) -> None:
        """Let go of the student."""
        self._student = None

    @torch.no_grad()
    def __call__(self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]) -> Rollouts:
        """Sample one completion per prompt.

        Raises:
            UserError: The cache is too small for one completion, or too large for the memory.
        """
        model = self._student
        assert model is not None, "start the engine first"
        training = model.training
        rows = min(self.batch_size, len(prompts))
        try:
            # Every pass has a shape of its own: layers that are compiled run as they are
            with (
                gathered(model),
                torch.compiler.set_stance("force_eager"),
                layers.decoding(model, rows, sampler.max_new_tokens),
            ):
                if not rows:
                    return Rollouts.empty(prompts)
                config = self._config(prompts, sampler)
                return _decode(model, prompts, sampler, seeds, config, self.progress_seconds)
        finally:
            model.train(training)

    def _config(self, prompts: PromptBatch, sampler: Sampler) -> ContinuousBatchingConfig:
        """Size the cache."""
        longest = max(len(prompt.token_ids) for prompt in prompts.prompts) + sampler.max_new_tokens
        pages = math.ceil(longest / PAGE)
        blocks = pages * min(self.batch_size, len(prompts))
        if self.cache_tokens is not None:
            blocks = min(blocks, self.cache_tokens // PAGE)
        if blocks < pages:
            raise UserError(
                f"ContinuousBatching.cache_tokens={self.cache_tokens} must be at least "
                f"{pages * PAGE}: a prompt and its completion have up to {longest} tokens, in "
                f"pages of {PAGE}"
            )
        return ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=blocks,
            max_batch_tokens=max(PASS, self.batch_size),
            max_requests_per_batch=self.batch_size,
            return_logprobs=True,
            seed=0,  # of nothing: all that is random is drawn by us
            use_async_batching=False,  # what is drawn last is known when the next is drawn
            use_cuda_graph=False,
            auto_switch_to_flash=False,
            disable_nccl_graph_mixing=False,  # it would set an environment variable
        )


def check_pages(model: PreTrainedModel) -> None:
    """Refuse a model whose layers cannot read keys and values from pages.

    Raises:
        UserError: Says why.
    """
    inner: Any = unwrapped(model)
    name = f"ContinuousBatching: {type(inner).__name__}"
    if Version(transformers.__version__) < Version(OLDEST):
        raise UserError(
            f"ContinuousBatching needs transformers {OLDEST}, not {transformers.__version__}. "
            f"{ALTERNATIVE}"
        )
    kinds = set(getattr(inner.config.get_text_config(), "layer_types", None) or ()) - PAGED
    if kinds or inner._is_stateful:
        what = ", ".join(sorted(kinds)) or "a state"
        raise UserError(f"{name} has layers with {what}, which no page holds. {ALTERNATIVE}")
    attention = inner.config._attn_implementation
    if attention != "sdpa" or not inner._supports_attention_backend:
        raise UserError(
            f"{name} with {attention} attention reads no pages: only the sdpa attention that most "
            f"models of transformers share does. {ALTERNATIVE}"
        )


@forward_pass
def _decode(
    model: PreTrainedModel,
    /,
    prompts: PromptBatch,
    sampler: Sampler,
    seeds: Sequence[int],
    config: ContinuousBatchingConfig,
    progress_seconds: float,
) -> Rollouts:
    """Run requests until all have ended; leaves the model in eval mode."""
    with own_randomness(prompts.ids.device, "continuous batching"):  # transformers sets a seed
        manager: Any = ContinuousBatchingManager(cast(Any, model), GenerationConfig(), config)
        try:
            processor = manager._create_batch_processor()
        except MemoryError as error:
            raise UserError(
                f"ContinuousBatching: a cache of {(config.num_blocks or 0) * PAGE} tokens does not "
                f"fit: set the engine's cache_tokens or batch_size lower ({error})"
            ) from error
    batch, ended = processor.inputs_and_outputs, manager.output_router.output_queue
    processor.model_runner._sample = _Draws(batch, prompts, sampler, seeds)
    for row, prompt in enumerate(prompts.prompts):
        manager.add_request(
            list(prompt.token_ids),
            request_id=str(row),
            max_new_tokens=sampler.max_new_tokens,
            eos_token_id=list(sampler.eos_token_ids),
        )
    next_report = time.monotonic() + progress_seconds
    while processor.prepare_next_batch():
        processor._generation_step(model)
        processor.update_batch()
        if time.monotonic() > next_report:
            from lightning.pytorch.utilities import rank_zero_info  # `opd evaluate` does without

            next_report = time.monotonic() + progress_seconds
            rank_zero_info(f"rollout: {ended.qsize()} of {len(prompts)} completions have ended")
    outputs = sorted((ended.get() for _ in prompts.prompts), key=lambda out: int(out.request_id))
    return Rollouts.of_lists(
        prompts,
        [output.generated_tokens for output in outputs],
        [output.logprobs for output in outputs],
        sampler,
    )


class _Draws:
    """Draws the next tokens of a pass, in place of transformers.

    Args:
        batch: What transformers knows of the pass.
        prompts: The B prompts.
        sampler: How to sample.
        seeds: Of each completion, [B].
    """

    def __init__(
        self, batch: Any, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]
    ) -> None:
        self.batch = batch
        self.sampler = sampler
        self.seeds = seeds
        self.starts = [len(prompt.token_ids) for prompt in prompts.prompts]

    def __call__(self, scores: Tensor, output_ids: Tensor) -> None:
        """Draw R tokens.

        Args:
            scores: Logits, [1, at least R, V].
            output_ids: Where tokens go, and the bits of their float32 log-probabilities, int32
                [2, at least R].
        """
        # Of prompts that are read in several passes, all but the last pass predict nothing
        states = [now.state for now in self.batch.requests_in_batch if now.has_new_token]
        rows = [int(state.request_id) for state in states]
        drawn = [
            state.position_offset - self.starts[row]
            for state, row in zip(states, rows, strict=True)
        ]
        device = scores.device
        numbers = uniform(
            torch.tensor([self.seeds[row] for row in rows], dtype=torch.long, device=device),
            torch.tensor(drawn, dtype=torch.long, device=device),
        )
        tokens, logprobs = sample(scores[0, : len(rows)], self.sampler, numbers)
        output_ids[0, : len(rows)] = tokens
        output_ids[1, : len(rows)] = logprobs.view(torch.int32)
