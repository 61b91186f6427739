"""Does the engine sample from the student? If not, its log-probabilities show it.

Losses take completions for the student's own. An engine that has other weights, or rounds much more
roughly, samples from something else, and nothing breaks: training goes on, and is worse.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from opd.errors import StoppedBeforeStep, UserError
from opd.rollouts.rollouts import Sampler

log = logging.getLogger(__name__)

ROUNDING = 0.5  # nats: more than that no precision explains


@dataclass(frozen=True)
class GapLimits:
    """How far an engine's log-probabilities may be from the student's.

    In a configuration, or ``--model.engine_gap.stop 0.2`` on the command line. The gap is the mean
    of ``rollout/engine_logprob_gap`` over a step's tokens, on all ranks. Where a sampler leaves
    out tokens (top_p, top_k) there is one of its own, and nothing is said.

    Args:
        warn: A line warns, once, where the gap is above, in nats; None: never.
        stop: The run ends before a step is taken, and is saved, where it is above; None: never.
    """

    warn: float | None = 0.1
    stop: float | None = 1.0

    def __post_init__(self) -> None:
        for name, limit in [("warn", self.warn), ("stop", self.stop)]:
            if limit is not None and not limit > 0:
                raise UserError(f"model.engine_gap.{name}={limit} must be above 0, or null")


class GapAlarm:
    """Compares the gap of every step with the limits.

    Args:
        limits: Above which to do what.
    """

    def __init__(self, limits: GapLimits) -> None:
        self.limits = limits
        self._first: float | None = None
        self._warned = False

    def check(self, t: int, gap: float, sampler: Sampler) -> None:
        """Look at the gap of a step, the same on all ranks, before it is taken.

        Args:
            t: Number of the step, from 1.
            gap: Mean over its tokens, in nats.
            sampler: What it was sampled with.

        Raises:
            StoppedBeforeStep: It is above the limit; names a cause.
        """
        if sampler.top_p < 1 or sampler.top_k > 0:
            return
        if self._first is None:
            self._first = gap
        warn, stop = self.limits.warn, self.limits.stop
        if (stop is None or gap <= stop) and (warn is None or gap <= warn or self._warned):
            return
        line = (
            f"step {t}: the engine's log-probabilities are {gap:.3g} nats per token from the "
            f"student's, so it samples from something else; {self._cause(gap)}"
        )
        if stop is not None and gap > stop:
            raise StoppedBeforeStep(
                f"{line}. The weights are those of step {t - 1}; model.engine_gap.stop is {stop:g}"
            )
        self._warned = True
        log.warning("%s (model.engine_gap.warn is %g)", line, warn)

    def _cause(self, gap: float) -> str:
        assert self._first is not None
        if gap > 10 * self._first:
            return (
                f"it was {self._first:.2g} when the run began: new weights do not reach it, or "
                "something changes them behind opd.weights.Weights.edit"
            )
        if gap > ROUNDING:
            return (
                "from the first step on: it has another model, other weights, another temperature "
                "or other token ids than the student"
            )
        return (
            "from the first step on: probably precision, as of an engine in bfloat16 beside a "
            "student in float32 (its dtype, or trainer.precision)"
        )
