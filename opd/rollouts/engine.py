"""What every engine promises that turns prompts into completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.prompts import PromptBatch
from opd.rollouts.rollouts import Rollouts, Sampler
from opd.weights import Weights


class RolloutEngine(ABC):
    """Base of all engines: samples one completion per prompt.

    All ranks call an engine together, each with its own prompts, possibly none. It samples in eval
    mode and without gradient, and leaves the model's mode and the global random state as it found
    them.

    Attributes:
        staleness: How many steps the weights that have sampled may be behind those that are
            trained.
    """

    staleness: int = 0

    def start(  # noqa: B027 - some need nothing
        self, student: PreTrainedModel, weights: Weights, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Get ready to sample with a student.

        Args:
            student: The student, whole or sharded.
            weights: Its weights. An engine that holds a copy takes them over, before it samples,
                when their version has changed.
            tokenizer: The student's tokenizer.
        """

    def stop(self) -> None:  # noqa: B027
        """Let go of all that :meth:`start` has taken."""

    def ahead(  # noqa: B027 - few can
        self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]
    ) -> None:
        """Begin to sample, if ``staleness`` allows it, what the next step will ask for.

        Args:
            prompts: B prompts.
            sampler: How to sample.
            seeds: One per completion, [B].
        """

    @abstractmethod
    def __call__(self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]) -> Rollouts:
        """Sample B completions for B prompts.

        Args:
            prompts: B prompts.
            sampler: How to sample.
            seeds: One per completion, [B]. A completion's draws depend on its seed alone: not on
                what else is in the batch, nor on the rank.
        """
