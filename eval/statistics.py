"""Metrics of the completions of one problem; their mean over problems is the benchmark's score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb


def sample_metrics(
    right: Sequence[bool],
    groups: Sequence[int | None] | None,
    lengths: Sequence[int | None],
    truncated: Sequence[bool | None],
    answered: Sequence[bool],
) -> dict[str, float]:
    """Return the metrics of the n completions of one problem.

    ``avg@n`` is the share of right ones, ``pass@k`` the unbiased estimate 1 - C(n-c, k) / C(n, k)
    of c right ones, ``maj@n`` whether the largest group of equal answers is right (the first seen
    of several largest ones, which ``maj_ties`` counts).

    Args:
        right: Of each completion, whether it is right.
        groups: Of each, the number of its answer; None: without a majority.
        lengths: Of each, its tokens, where they are known.
        truncated: Of each, whether it was cut, where that is known.
        answered: Of each, whether it gives an answer.
    """
    n, c = len(right), sum(right)
    metrics = {f"avg@{n}": c / n}
    powers = [2**i for i in range(1, n.bit_length()) if 2**i < n]
    for k in [*powers, *([n] if n > 1 else [])]:
        metrics[f"pass@{k}"] = 1 - comb(n - c, k) / comb(n, k)
    if groups is not None:
        votes = Counter(group for group in groups if group is not None)
        most = max(votes.values(), default=0)
        winners = [group for group, count in votes.items() if count == most]
        metrics[f"maj@{n}"] = float(bool(winners) and right[list(groups).index(winners[0])])
        metrics["maj_ties"] = float(len(winners) > 1)
    if known := [length for length in lengths if length is not None]:
        metrics["length"] = sum(known) / len(known)
    if cut := [value for value in truncated if value is not None]:
        metrics["truncated"] = sum(cut) / len(cut)
    metrics["no_answer"] = 1 - sum(answered) / n
    return metrics
