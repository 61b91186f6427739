"""What every engine promises that turns prompts into completions."""

from __future__ import annotations

from typing import Protocol

import torch
from transformers import PreTrainedModel

from opd.prompts import PromptBatch
from opd.rollouts.rollouts import Rollouts, Sampler


class RolloutEngine(Protocol):
    """Samples one completion per prompt.

    All ranks call an engine together, each with its own prompts, possibly none. An engine samples
    in eval mode and without gradient, draws all randomness from the generator it is given, and
    leaves the model's mode and the global random state as it found them.
    """

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        sampler: Sampler,
        generator: torch.Generator,
    ) -> Rollouts:
        """Sample B completions for B prompts."""
        ...
