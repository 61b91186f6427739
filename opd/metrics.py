"""Metrics of a step: per-token diagnostics and their reduction over tokens and ranks.

Shapes: N tokens, V vocabulary. Symbols as in the paper: p = student, q = teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from opd.objectives import Distributions, as_needed, largest, of_sampled
from opd.rollouts import Rollouts, Tokens
from opd.teachers import TEACHER
from opd.tokens import Measure

OVERLAP_K = 16
FAR = 5.0  # nats
ENGINE_GAP = "rollout/engine_logprob_gap"
TOKEN_METRICS = (
    "opd/reverse_kl",
    "opd/forward_kl",
    "opd/kl_above_5",
    "opd/student_entropy",
    "opd/teacher_entropy",
    "opd/entropy_gap",
    "opd/overlap_at_16",
    "opd/overlap_advantage",
    "opd/teacher_logprob",
    ENGINE_GAP,
)
WITHOUT_TEACHER = ("opd/student_entropy", ENGINE_GAP)  # of these, those that need none
ROLLOUT_MEANS = ("rollout/length_mean", "rollout/truncated_fraction", "rollout/accuracy")
FIXED_FRACTION = "opd/fixed_fraction"  # where there is a mixture
REWARD_METRIC = "rollout/reward"  # where there is a reward
DROPPED_FRACTION = "rollout/dropped_fraction"  # where there is dynamic sampling
ROLLOUT_SUMS = ("rollout/tokens",)
ROLLOUT_MAXIMA = ("rollout/length_max",)


def token_metrics(both: Distributions, tokens: Tokens) -> dict[str, Tensor]:
    r"""Diagnose every token; what no teacher tells, or one of sampled tokens cannot, is left out.

    Args:
        both: What student and teacher think.
        tokens: What is known of the sampled tokens, n of them.

    Returns:
        [n] by metric: both KLs and entropies in nats; ``kl_above_5``, whether the reverse KL is, as
        where a student is sure of what its teacher finds unlikely, and hardly has a gradient;
        ``entropy_gap`` = \\|H(q) - H(p)\\|;
        ``overlap_at_16``, the share of the student's 16 likeliest tokens that are among the
        teacher's; ``overlap_advantage``, sum over those of p (log q - log p) with p and q
        renormalised over them (0 = they agree); log q(y); and \\|log p(y) - log mu(y)\\|.
    """
    values = {
        "opd/student_entropy": both.student_entropy,
        ENGINE_GAP: (of_sampled(both.log_p, tokens.y) - tokens.logmu_y).abs(),
    }
    if TEACHER not in both.opinions:
        return values
    values["opd/teacher_logprob"] = _teacher_logprob(both, tokens)
    if both.log_q.ndim == 2:
        overlap, advantage = overlap_at_k(both.log_p, both.log_q, OVERLAP_K)
        values |= {
            "opd/reverse_kl": both.reverse_kl,
            "opd/forward_kl": both.forward_kl,
            "opd/kl_above_5": (both.reverse_kl > FAR).float(),
            "opd/teacher_entropy": both.teacher_entropy,
            "opd/entropy_gap": (both.teacher_entropy - both.student_entropy).abs(),
            "opd/overlap_at_16": overlap,
            "opd/overlap_advantage": advantage,
        }
    return values


def judged_by(divergence: str) -> Measure:
    """Measure what judges a candidate, and nothing else.

    Args:
        divergence: reverse_kl, forward_kl, or jeffreys, the sum of the two.

    Returns:
        A function of what student and teacher think and of the n sampled tokens; it gives
        ``divergence`` and ``moved``, how far the student is from what has sampled them, [n] each.
    """
    apart: Callable[[Distributions], Tensor] = {
        "reverse_kl": lambda both: both.reverse_kl,
        "forward_kl": lambda both: both.forward_kl,
        "jeffreys": lambda both: both.reverse_kl + both.forward_kl,
    }[divergence]
    return lambda both, tokens: {
        "divergence": apart(both),
        "moved": sampled_kl(of_sampled(both.log_p, tokens.y), tokens.logmu_y),
    }


def sampled_kl(log_p_y: Tensor, logmu_y: Tensor) -> Tensor:
    """Estimate KL(mu || p) from tokens y that mu has sampled: r - 1 - log r with r = p(y) / mu(y).

    Unbiased, for r has a mean of 1, and never negative; [n] -> [n], in nats.
    """
    log_ratio = log_p_y - logmu_y
    return log_ratio.expm1() - log_ratio


def prediction(both: Distributions, tokens: Tokens) -> dict[str, Tensor]:
    """Measure what predictions.jsonl holds of every token, [n] each."""
    values = {"student_logprob": of_sampled(both.log_p, tokens.y)}
    if TEACHER not in both.opinions:
        return values
    values |= {"teacher_logprob": _teacher_logprob(both, tokens)}
    return values | ({"reverse_kl": both.reverse_kl} if both.log_q.ndim == 2 else {})


def _teacher_logprob(both: Distributions, tokens: Tokens) -> Tensor:
    """Return log q(y), [n]."""
    return as_needed(both.opinions, {TEACHER: "sampled"}, tokens.y)[TEACHER]


def overlap_at_k(log_p: Tensor, log_q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compare the k likeliest tokens of student and teacher.

    Returns:
        The share of them in common [N], and the student's advantage on those [N].
    """
    k = min(k, log_p.shape[1])
    top_p, ids_p = largest(log_p, k)
    _, ids_q = largest(log_q, k)
    shared = (ids_p[:, :, None] == ids_q[:, None, :]).any(dim=2)  # [N, k]
    lowest = torch.finfo(log_p.dtype).min
    student = top_p.masked_fill(~shared, lowest).log_softmax(dim=1)
    teacher = log_q.gather(1, ids_p).masked_fill(~shared, lowest).log_softmax(dim=1)
    advantage = (student.exp() * (teacher - student)).masked_fill(~shared, 0.0).sum(dim=1)
    return shared.float().mean(dim=1), advantage


def rollout_metrics(rollouts: Rollouts) -> dict[str, Tensor]:
    """Measure B completions, [B] each; whether their answers are right is another matter."""
    lengths = rollouts.counts.double()
    return {
        "rollout/tokens": lengths,
        "rollout/length_mean": lengths,
        "rollout/length_max": lengths,
        "rollout/truncated_fraction": (~rollouts.finished).double(),
    }


class StepMetrics(Metric):
    """Named means, sums and maxima, each reduced over ranks once: means as (sum, count).

    Args:
        means: Names of the means.
        sums: Names of the sums.
        maxima: Names of the maxima.
        groups: What else is taken of parts of the values: ``data/<name>`` for what belongs to a
            data set, ``teacher/<name>`` for what a teacher reads. Named ``<metric>/<group>``.
    """

    full_state_update = False

    def __init__(
        self,
        means: Sequence[str],
        sums: Sequence[str] = (),
        maxima: Sequence[str] = (),
        groups: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.totals: Tensor
        self.counts: Tensor
        self.highest: Tensor
        self.groups = tuple(groups)
        means, sums, maxima = (self._with_groups(names) for names in (means, sums, maxima))
        self.summed = {name: i for i, name in enumerate([*means, *sums])}
        self.means = frozenset(means)
        self.maxima = {name: i for i, name in enumerate(maxima)}
        zeros = torch.zeros(len(self.summed), dtype=torch.float64)
        self.add_state("totals", zeros, dist_reduce_fx="sum")
        self.add_state("counts", zeros.clone(), dist_reduce_fx="sum")
        lowest = torch.full((len(self.maxima),), -torch.inf, dtype=torch.float64)
        self.add_state("highest", lowest, dist_reduce_fx="max")

    def _with_groups(self, names: Sequence[str]) -> list[str]:
        return [*names, *(f"{name}/{group}" for group in self.groups for name in names)]

    def update(
        self, values: Mapping[str, Tensor], members: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add values, each a tensor of any shape whose elements count alike.

        Args:
            values: By the names of metrics.
            members: By the names of groups, which elements of the values belong to one.
        """
        of_groups = {
            f"{name}/{group}": value[chosen.to(value.device)]
            for group, chosen in (members or {}).items()
            for name, value in values.items()
        }
        for name, value in {**values, **of_groups}.items():
            if name in self.maxima:
                i = self.maxima[name]
                if value.numel():
                    self.highest[i] = torch.maximum(self.highest[i], value.max())
            else:
                i = self.summed[name]
                self.totals[i] += value.sum(dtype=torch.float64)
                self.counts[i] += value.numel()

    def compute(self) -> dict[str, float]:
        """Return everything that has at least one value."""
        result = {}
        rows = zip(self.summed, self.totals.tolist(), self.counts.tolist(), strict=True)
        for name, total, count in rows:
            if count:
                result[name] = total / count if name in self.means else total
        highest = zip(self.maxima, self.highest.tolist(), strict=True)
        return result | {name: value for name, value in highest if value != -torch.inf}
