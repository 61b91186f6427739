"""Numbers of a benchmark and how sure they are: pass@k, maj@k, means, intervals, differences.

A benchmark is a sample of problems, and the samples of one problem are alike; so there is one
value per problem, and the error of the mean comes from the spread of these values alone (Miller
2024, arXiv 2411.00640: standard errors clustered by problem). How many completions a
problem had needs no formula of its own: more of them make its value less noisy.

Nothing here reads files or knows models; everything is plain Python.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy import special

from opd.errors import UserError

CONFIDENCE = 0.95  # of the intervals, both sides together
FEW = 6  # problems that differ from the others; with fewer, their spread says too little


class Majority(NamedTuple):
    """Whether the most frequent answer is right, and whether others were as frequent."""

    right: bool
    tied: bool


@dataclass(frozen=True)
class Estimate:
    """A mean over problems.

    Args:
        mean: Of the problems' values.
        stderr: Its standard error; None with one problem, which says nothing of the others.
        low: Lower end of the 95% interval, or None.
        high: Upper end, or None.
        n: Problems.
    """

    mean: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that at least one of k completions is right, drawn from n with c right.

    That is 1 - C(n - c, k) / C(n, k), unbiased for the chance of k new completions (Chen et al.
    2021, arXiv 2107.03374, equation 1). It is calculated in whole numbers and rounded once.

    Raises:
        ValueError: Unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} completions, {c} of them right")
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def majority(groups: Sequence[int | None], right: Sequence[bool]) -> Majority:
    """Return whether a problem's most frequent answer is right (maj@n, self-consistency).

    Args:
        groups: [n], each completion's answer, as a number; None for a completion without one, which
            has no vote.
        right: [n], whether it is right; of a group its first completion decides.

    Returns:
        The verdict on the largest group. Of several, the one seen first counts, and `tied` is set.
        Without any answer it is wrong.
    """
    _check_lengths(len(right), groups=groups)
    votes = Counter(group for group in groups if group is not None)  # in the order seen
    if not votes:
        return Majority(right=False, tied=False)
    (winner, most), *others = votes.most_common()  # a stable sort: the one seen first
    return Majority(
        right=bool(right[list(groups).index(winner)]),
        tied=bool(others) and others[0][1] == most,
    )


def sample_metrics(
    right: Sequence[bool],
    groups: Sequence[int | None] | None,
    lengths: Sequence[int] | None,
    truncated: Sequence[bool] | None,
    answered: Sequence[bool],
) -> dict[str, float]:
    """Return the metrics of one problem; a benchmark's are their means over problems.

    Args:
        right: [n], whether each completion is right.
        groups: [n], its answer as a number, None without one; None where answers cannot be compared
            (programs).
        lengths: [n], tokens; None if not known.
        truncated: [n], whether it was cut off by the limit of tokens; None if not known.
        answered: [n], whether it holds an answer at all: a box, a block of code.

    Returns:
        `avg@n`; `pass@k` for k = 2, 4, 8, ... below n, and for n, if n > 1; `maj@n` and `maj_ties`
        if n > 1 and there are groups; `length` in tokens, `truncated`, `no_answer`. n and k are
        written out, as in `avg@32`. All but the length are shares.

    Raises:
        ValueError: No completion, or sequences of unequal lengths.
    """
    n = len(right)
    if n == 0:
        raise ValueError("a problem without completions has no metrics")
    _check_lengths(n, groups=groups, lengths=lengths, truncated=truncated, answered=answered)
    c = sum(map(bool, right))
    metrics = {f"avg@{n}": c / n}
    metrics |= {f"pass@{k}": pass_at_k(n, c, k) for k in _powers_of_two(n)}
    if groups is not None and n > 1:
        vote = majority(groups, right)
        metrics |= {f"maj@{n}": float(vote.right), "maj_ties": float(vote.tied)}
    if lengths is not None:
        metrics["length"] = sum(lengths) / n
    if truncated is not None:
        metrics["truncated"] = sum(map(bool, truncated)) / n
    metrics["no_answer"] = sum(not one for one in answered) / n
    return metrics


def _powers_of_two(n: int) -> list[int]:
    """Return 2, 4, 8, ... below n, and n; nothing for n = 1."""
    return sorted({2**i for i in range(1, n.bit_length())} | {n}) if n > 1 else []


def _check_lengths(n: int, **sequences: Sequence[object] | None) -> None:
    for name, sequence in sequences.items():
        if sequence is not None and len(sequence) != n:
            raise ValueError(f"{len(sequence)} {name} for {n} completions")


def mean_with_error(values: Sequence[float], share: bool = True) -> Estimate:
    """Return the mean of one value per problem with its standard error and 95% interval.

    The standard error is the sample standard deviation by the root of the number of problems, the
    interval Student's t with n - 1 degrees of freedom. Where that is known to be too narrow, it is
    widened, never narrowed:

    - A share near 0 or 1 has a skewed error. Its interval reaches at least as far as that of
      Clopper and Pearson with the effective sample size of Korn and Graubard (1998, Survey
      Methodology 24, 193-201), which is for clustered shares. It stays within 0 and 1.
    - If fewer than FEW problems differ from the most frequent value, as when none of 30 is solved,
      values that were not seen may still be frequent: up to u = 1 - 0.025^(1/n) of all problems, of
      which the sample would hold none with a chance of 1 in 40 (the exact form of the "rule of
      three"; Hanley and Lippman-Hand 1983, JAMA 249, 1743-1745). The interval reaches as far as the
      mean would move if they had the extreme values. With 0 of 30 right it is [0, 0.116].

    In simulations of 30 problems with 32 completions each, whose success rates have ten Beta
    distributions with means from 0.001 to 0.97, 95.3% to 100% of the intervals hold the true mean
    (tests/eval/test_statistics.py); of Student's alone 53% to 95%.

    Args:
        values: One per problem.
        share: Whether values lie between 0 and 1 by their nature, such as avg@n. Others, such as
            lengths, have Student's interval alone, which is a point where all are equal.

    Raises:
        ValueError: No values, one that is not finite, or a share outside of 0 to 1.
    """
    if share and any(not 0 <= value <= 1 for value in values):
        raise ValueError("a share lies between 0 and 1; other values need share=False")
    estimate = _with_interval(values, (0.0, 1.0) if share else None)
    if not share or not estimate.stderr:
        return estimate
    assert estimate.low is not None
    assert estimate.high is not None
    low, high = _clustered_share(estimate.mean, estimate.stderr, estimate.n)
    return Estimate(
        estimate.mean,
        estimate.stderr,
        max(0.0, min(low, estimate.low)),
        min(1.0, max(high, estimate.high)),
        estimate.n,
    )


def paired_difference(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], share: bool = True
) -> Estimate:
    """Return the mean of a - b over the problems that both have, with error and interval.

    Differences per problem have less spread than two means that are subtracted, as both models find
    the same problems hard (Miller 2024, arXiv 2411.00640).

    With 30 problems whose differences are skewed, as between models that solve few of them, 88% to
    93% of the intervals hold the true difference, not 95%; with hundreds of problems 93% to 96%.

    Args:
        a: A value per problem.
        b: Another model's, by the same names of problems.
        share: Whether the values are shares, so that a difference lies between -1 and 1: then the
            interval is widened if few problems differ, as that of a mean is.

    Raises:
        UserError: No problem is in both.
        ValueError: A value that is not finite, or a share outside of 0 to 1.
    """
    common = [problem for problem in a if problem in b]
    if not common:
        raise UserError("the two results have no problem in common")
    if share and any(not 0 <= each[problem] <= 1 for each in (a, b) for problem in common):
        raise ValueError("a share lies between 0 and 1; other values need share=False")
    differences = [a[problem] - b[problem] for problem in common]
    return _with_interval(differences, (-1.0, 1.0) if share else None)


def macro(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of several tasks' estimates, each task with the same weight.

    Tasks share no problems, so their errors are independent: the standard error is the root of the
    sum of squares, by the number of tasks. The interval combines theirs, which need not be
    symmetric: its ends are as far away as the root of the sum of squares of their distances, by the
    number of tasks (MOVER; Zou and Donner 2008, Statistics in Medicine 27, 1693-1702).

    Args:
        estimates: Of means or of differences, one per task.

    Returns:
        An estimate whose n is that of all problems; without error if a task has none.

    Raises:
        ValueError: No estimates.
    """
    if not estimates:
        raise ValueError("no tasks to take the mean of")
    tasks = len(estimates)
    mean = math.fsum(one.mean for one in estimates) / tasks
    n = sum(one.n for one in estimates)
    errors = [one.stderr for one in estimates if one.stderr is not None]
    below = [one.mean - one.low for one in estimates if one.low is not None]
    above = [one.high - one.mean for one in estimates if one.high is not None]
    if not len(errors) == len(below) == len(above) == tasks:
        return Estimate(mean, None, None, None, n)
    stderr, down, up = (math.hypot(*parts) / tasks for parts in (errors, below, above))
    return Estimate(mean, stderr, mean - down, mean + up, n)


def _with_interval(values: Sequence[float], bounds: tuple[float, float] | None) -> Estimate:
    """Return the mean with Student's interval, widened within bounds if few values differ."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to take the mean of")
    if not all(map(math.isfinite, values)):
        raise ValueError("a value is not finite")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, None, n)
    squares = math.fsum((value - mean) ** 2 for value in values)
    stderr = math.sqrt(squares / (n - 1) / n) if len(set(values)) > 1 else 0.0
    half = _student(n - 1) * stderr
    low, high = mean - half, mean + half
    if bounds is not None:
        if n - max(Counter(values).values()) < FEW:
            unseen = 1 - (0.5 - CONFIDENCE / 2) ** (1 / n)
            low = min(low, mean - unseen * (mean - bounds[0]))
            high = max(high, mean + unseen * (bounds[1] - mean))
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(mean, stderr, low, high, n)


def _student(degrees: int) -> float:
    """Return the quantile of Student's t that leaves 2.5% above it."""
    return float(special.stdtrit(degrees, 0.5 + CONFIDENCE / 2))


def _clustered_share(mean: float, stderr: float, n: int) -> tuple[float, float]:
    """Return the interval of Korn and Graubard for a share whose samples come in n clusters."""
    if not 0 < mean < 1:
        return mean, mean
    tail = 0.5 - CONFIDENCE / 2
    correction = float(special.ndtri(1 - tail)) / _student(n - 1)
    effective = mean * (1 - mean) / stderr**2 * correction**2
    right = mean * effective
    low = special.betaincinv(right, effective - right + 1, tail)
    high = special.betaincinv(right + 1, effective - right, 1 - tail)
    return float(low), float(high)
