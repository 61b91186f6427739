"""What of ours runs where vLLM runs a model, in this process or in a server's: it draws the tokens.

vLLM computes logits and schedules. What is drawn from them is drawn by us, as in all engines, so
that a completion is the same under each of them, to rounding.

Shapes: R completions in a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from opd.randomness import uniform
from opd.rollouts.rollouts import Sampler
from opd.rollouts.sampling import sample
from opd.rollouts.weight_stream import receive


class Drawing(LogitsProcessor):
    """Draws the next tokens of a pass.

    Of a row of logits it leaves the token drawn, with its log-probability as logit: so vLLM, which
    takes the largest and says its logit, takes and says ours. Requests that were not made by
    :func:`opd.rollouts.vllm.sampling_params` it leaves alone.
    """

    def __init__(self, *args: Any) -> None:
        self._rows: dict[int, tuple[Sampler, int, list[int]]] = {}  # sampler, seed, tokens so far

    def is_argmax_invariant(self) -> bool:
        """No: it decides."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow requests as they come, go and move."""
        process_dict_updates(self._rows, batch_update, _request)

    def apply(self, logits: Tensor) -> Tensor:
        """Draw a token from each row, [R, V]."""
        by_sampler: dict[Sampler, list[int]] = {}
        for row, (sampler, _, _) in self._rows.items():
            by_sampler.setdefault(sampler, []).append(row)
        for sampler, unordered in by_sampler.items():
            rows = sorted(unordered)
            drawn = [self._rows[row] for row in rows]
            numbers = uniform(
                torch.tensor([seed for _, seed, _ in drawn], device=logits.device),
                torch.tensor([len(tokens) for _, _, tokens in drawn], device=logits.device),
            )
            where = torch.tensor(rows, device=logits.device)
            those = logits if len(rows) == len(logits) else logits[where]
            tokens, logprobs = sample(those, sampler, numbers)
            logits[where] = -torch.inf
            logits[where, tokens] = logprobs
        return logits


def _request(params: Any, prompt: Any, tokens: list[int]) -> tuple[Sampler, int, list[int]] | None:
    asked = params.extra_args or {}
    if "sampler" not in asked:
        return None
    options = asked["sampler"]
    sampler = Sampler(**{**options, "eos_token_ids": tuple(options["eos_token_ids"])})
    return sampler, asked["seed"], tokens


def pack_heads(model: nn.Module) -> None:
    """Let heads on a CPU multiply with the weights that they have now.

    vLLM multiplies with a packed copy there, and of a head that is the embedding too it does not
    make another when weights are reloaded: it would go on with those that it began with.
    """
    layers: Sequence[Any] = [layer for layer in model.modules() if hasattr(layer, "cpu_linear")]
    for layer in layers:
        if layer.weight.numel():  # of those that are not packed only
            layer.quant_method.process_weights_after_loading(layer)


class Receiver:
    """What vLLM mixes into the workers of a server, so that they take a student's weights over."""

    model_runner: Any

    def opd_describe(self, *sizes: str) -> dict[str, Any]:
        """Say what model it is: its dtype, and some values of its config."""
        model_config = self.model_runner.model_config
        return {
            "dtype": str(model_config.dtype).removeprefix("torch."),
            **{size: getattr(model_config.hf_config, size, None) for size in sizes},
        }

    def opd_receive(self, host: str, port: str, key: str, seconds: str) -> None:
        """Take over the weights that somebody sends."""
        weights = receive(host, int(port), key, float(seconds))
        self.model_runner.reload_weights(weights_iterator=weights)
        pack_heads(self.model_runner.get_model())
