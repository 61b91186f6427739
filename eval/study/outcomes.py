"""What trials cost and reached, and how methods compare: pure numbers, nothing is run here.

A run that ends before it has reached the target tells only that its cost is above what it had spent
by then. So a cost is a number within bounds (:class:`Bounds`), and so are medians and ratios of
costs: where enough seeds have reached the target, the bounds meet and the number is known.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eval.runs import Run
from eval.study.grid import Settings, Trial
from opd.errors import UserError

COSTS = ("steps", "tokens", "seconds")  # to the target
MEASURES = (*COSTS, "mean_reverse_kl")  # less is better, so methods are compared by their ratio
CONFIDENCE = 0.95
RESAMPLES = 4000
BOOTSTRAP_SEED = 0

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """A number at least ``low`` and at most ``high``, which are equal if it is known."""

    low: float
    high: float


@dataclass(frozen=True)
class Median:
    """A median over seeds.

    Attributes:
        value: The median.
        low: Lower end of its 95% bootstrap interval; None of a single seed, which says nothing of
            others.
        high: Upper end, or None; infinite where too many seeds may need any number.
    """

    value: Bounds
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        trial: The trial.
        steps: Optimizer steps to the target accuracy; None if it was not reached.
        tokens: Generated tokens to it, those of searches included; None also if not logged.
        seconds: Wall-clock to it of rollouts, teacher, training and searches, without validation.
        total: Steps, tokens and seconds by the end.
        search_share: Share of all its seconds that went into searches.
        final_accuracy: At the end, whether the target was reached or not.
        mean_accuracy: Mean over optimizer steps; None if the run ended before max_steps.
        mean_reverse_kl: Likewise of the reverse KL to the teacher, nats per token.
        final_reverse_kl: At the end; None if the teacher does not tell.
        lowest_reverse_kl: Of all validations.
    """

    trial: Trial
    steps: int | None
    tokens: float | None
    seconds: float | None
    total: Mapping[str, float]
    search_share: float
    final_accuracy: float
    mean_accuracy: float | None
    mean_reverse_kl: float | None
    final_reverse_kl: float | None
    lowest_reverse_kl: float | None

    @property
    def rise(self) -> float | None:
        """Final over lowest reverse KL: 1 if it ended at its best, more after a late swing."""
        if self.final_reverse_kl is None or not self.lowest_reverse_kl:
            return None
        return self.final_reverse_kl / self.lowest_reverse_kl

    def measured(self, measure: str) -> Bounds | None:
        """Return one of MEASURES; None if nothing is known of it."""
        value = getattr(self, measure)
        if value is not None:
            return Bounds(value, value)
        if measure not in COSTS:
            return None
        spent = self.total[measure]
        return Bounds(spent, math.inf) if self.steps is None else Bounds(0.0, spent)


@dataclass(frozen=True)
class Group:
    """The outcomes of trials that differ by their seeds alone.

    Attributes:
        method: Name of their method.
        learning_rate: Their learning rate.
        settings: Their point of the grid.
        outcomes: In the order of the seeds.
    """

    method: str
    learning_rate: float
    settings: Settings
    outcomes: tuple[Outcome, ...]

    def measured(self, measure: str) -> list[Bounds] | None:
        """Return one of MEASURES by seed; None if nothing is known of a seed's."""
        values = [outcome.measured(measure) for outcome in self.outcomes]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else None

    def median(self, measure: str) -> Median | None:
        """Return the median of one of MEASURES, likewise."""
        values = self.measured(measure)
        return None if values is None else median(values)


@dataclass(frozen=True)
class Comparison:
    """A group beside one of the baseline's at the same point of the grid.

    Attributes:
        group: The group.
        baseline: The baseline's, at ``group``'s learning rate or at its own best.
        ratios: By measure, the median over seeds of what the group needed over what the baseline
            needed with the same seed: below 1 the group is better. Only of what is known.
    """

    group: Group
    baseline: Group
    ratios: Mapping[str, Median]


# --- of a trial -----------------------------------------------------------------------------------


def outcome_of(trial: Trial, run: Run, target: float, max_steps: int) -> Outcome:
    """Read off a run what came of a trial.

    Args:
        trial: The trial.
        run: Its run folder.
        target: Accuracy to reach.
        max_steps: Optimizer steps over which means are taken.

    Raises:
        UserError: No accuracy was measured.
    """
    accuracies = [(p.step, p.accuracy) for p in run.points if p.accuracy is not None]
    kls = [(p.step, p.reverse_kl) for p in run.points if p.reverse_kl is not None]
    if not accuracies:
        raise UserError(
            f"{run.folder}: no accuracy was measured; set data.validation, with answers"
        )
    reached, cost = run.reached(target), run.summary["cost"]
    return Outcome(
        trial,
        steps=reached.step if reached else None,
        tokens=reached.tokens if reached else None,
        seconds=reached.seconds if reached else None,
        total={
            "steps": run.summary["steps"] if reached else max_steps,  # also where it diverged
            "tokens": cost["rollout_tokens"] + cost["search_generated_tokens"],
            "seconds": run.seconds,
        },
        search_share=run.search_share or 0.0,
        final_accuracy=accuracies[-1][1],
        mean_accuracy=mean_over_steps(accuracies, max_steps),
        mean_reverse_kl=mean_over_steps(kls, max_steps),
        final_reverse_kl=kls[-1][1] if kls else None,
        lowest_reverse_kl=min(kl for _, kl in kls) if kls else None,
    )


def mean_over_steps(curve: Sequence[tuple[int, float]], steps: int) -> float | None:
    """Return the mean of a curve over optimizer steps: its area from 0 to ``steps``, by ``steps``.

    Args:
        curve: (step, value) in order; between them it is a straight line.
        steps: Where it must end at least.

    Returns:
        The mean; None if the curve does not begin at 0, or ends before.
    """
    if not curve or curve[0][0] > 0 or curve[-1][0] < steps:
        return None
    return sum((b - a) * (u + v) / 2 for (a, u), (b, v) in itertools.pairwise(curve)) / steps


# --- over seeds -----------------------------------------------------------------------------------


def median(values: Sequence[Bounds]) -> Median:
    """Return the median over seeds, with its bootstrap interval.

    The bounds of a median are the medians of the bounds. The interval is the percentile bootstrap's
    (Efron 1979, Annals of Statistics 7, 1-26): seeds are drawn with replacement, always with the
    same random numbers; it reaches from the 2.5% quantile of the medians of the lower bounds to the
    97.5% quantile of those of the upper bounds. With few seeds it is too narrow: of 3 it is their
    range, which holds the median of all seeds 3 times in 4; of 5, 94 times in 100.

    Args:
        values: One per seed; of paired ones the pair.
    """
    if len(values) == 1:
        return Median(middle(values), None, None)
    bounds = _as_array(values)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = generator.integers(len(values), size=(RESAMPLES, len(values)))
    medians = np.sort(_median(bounds[drawn].swapaxes(0, 1)), axis=0)  # [resamples, 2]
    tail = round(RESAMPLES * (1 - CONFIDENCE) / 2)  # of them are left out at each end
    low, high = medians[tail, 0], medians[-1 - tail, 1]
    return Median(middle(values), float(low), float(high))


def middle(values: Sequence[Bounds]) -> Bounds:
    """Return the median alone."""
    return Bounds(*map(float, _median(_as_array(values))))


def _as_array(values: Sequence[Bounds]) -> Array:
    return np.array([(value.low, value.high) for value in values])  # [seeds, 2]


def _median(values: Array) -> Array:
    """Return the median along the first axis; of an even number the mean of the middle two."""
    ordered = np.sort(values, axis=0)
    n = len(ordered)
    middles: Array = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return middles


def ratio(a: Bounds, b: Bounds) -> Bounds:
    """Divide numbers that are not negative.

    Where both may be any number above something, so may their ratio: from 0 to infinity. So may
    that of 0 to 0.
    """
    low = 0.0 if not a.low or math.isinf(b.high) else _divide(a.low, b.high)
    return Bounds(low, _divide(a.high, b.low))


def _divide(a: float, b: float) -> float:
    return a / b if b else math.inf


def grouped(outcomes: Sequence[Outcome]) -> list[Group]:
    """Put outcomes together that differ by their seeds alone: by settings, then rate, then method.

    Methods keep their order.
    """
    found: dict[tuple[Settings, float, str], list[Outcome]] = {}
    points = list(dict.fromkeys(outcome.trial.settings for outcome in outcomes))
    for outcome in outcomes:
        trial = outcome.trial
        found.setdefault((trial.settings, trial.learning_rate, trial.method), []).append(outcome)
    return [
        Group(method, rate, settings, tuple(of_seeds))
        for (settings, rate, method), of_seeds in sorted(
            found.items(), key=lambda item: (points.index(item[0][0]), item[0][1])
        )
    ]


def best(groups: Sequence[Group], method: str, settings: Settings) -> Group:
    """Return a method's group at its best learning rate.

    That is where the median seed needs fewest steps, and of equal ones ends most accurate.
    """
    own = [g for g in groups if (g.method, g.settings) == (method, settings)]

    def judged(group: Group) -> tuple[float, float, float]:
        steps = middle(group.measured("steps") or [])
        accuracies = [outcome.final_accuracy for outcome in group.outcomes]
        return steps.high, steps.low, -statistics.median(accuracies)

    return min(own, key=judged)


def comparisons(groups: Sequence[Group], baseline: str) -> list[Comparison]:
    """Compare each group with the baseline at the same learning rate, if any, and at its best.

    Pairs are of one seed, so what a seed makes easy or hard for all is not taken for noise. That
    the baseline's best rate is chosen on the same seeds is to its advantage.

    Args:
        groups: Of the whole study.
        baseline: Name of a method.
    """
    compared = []
    for group in groups:
        if group.method == baseline:
            continue
        same = [
            other
            for other in groups
            if (other.method, other.settings) == (baseline, group.settings)
            and other.learning_rate == group.learning_rate
        ]
        at_best = best(groups, baseline, group.settings)
        for other in same if at_best in same else [*same, at_best]:
            ratios = {}
            for measure in MEASURES:
                ours, theirs = group.measured(measure), other.measured(measure)
                if ours is not None and theirs is not None:
                    ratios[measure] = median(list(map(ratio, ours, theirs)))
            compared.append(Comparison(group, other, ratios))
    return compared
