"""What the paper finds, as questions with an answer: of each seed, yes or no, and the numbers.

Rows are those of ``opd analyze``, of two runs from one base, called ``opd`` and ``rl``. Thresholds
are the paper's where it names one. Where it compares, so is here: whichever is larger.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Found = Mapping[str, Sequence[Row]]
OPD, RL = "opd", "rl"
POINTS = 10  # of a curve that is averaged
TINY_CHANGE = 0.02  # of accuracy: "negligible"
RECOVERED = 0.95  # of what the whole update gains
EARLY_RECOVERED = 0.8  # of the final score


@dataclass(frozen=True)
class Answer:
    """Whether the paper's finding holds, and the numbers by which it does.

    Attributes:
        holds: None where it cannot be said.
        numbers: As text.
    """

    holds: bool | None
    numbers: str


@dataclass(frozen=True)
class Finding:
    """What the paper finds.

    Attributes:
        section: Of the paper.
        says: What.
        ask: Finds the answer in the rows of one seed.
    """

    section: str
    says: str
    ask: Callable[[Found], Answer]


def last(rows: Sequence[Row], run: str) -> list[Row]:
    """Return the rows of a run's last checkpoint."""
    mine = [row for row in rows if row["run"] == run]
    step = max(row["step"] for row in mine)
    return [row for row in mine if row["step"] == step]


def _spectral(measure: str, larger: str) -> Callable[[Found], Answer]:
    def ask(found: Found) -> Answer:
        rl, opd = (float(last(found["spectra"], run)[0][measure]) for run in (RL, OPD))
        holds = opd > rl if larger == OPD else rl > opd
        return Answer(holds, f"RL {rl:.4g}, OPD {opd:.4g}")

    return ask


def gain_per_norm(found: Found) -> Answer:
    """Compare mean accuracies of W_0 + a dW up to the smaller of both final norms."""
    curves = {}
    for run in (OPD, RL):
        rows = sorted((r for r in found["scaling"] if r["run"] == run), key=lambda r: r["norm"])
        curves[run] = [(float(row["norm"]), float(row["accuracy"])) for row in rows]
    norm = min(curve[-1][0] for curve in curves.values())
    points = [norm * i / POINTS for i in range(1, POINTS + 1)]
    opd, rl = (
        math.fsum(interpolated(curves[run], point) for point in points) / POINTS
        for run in (OPD, RL)
    )
    return Answer(opd > rl, f"mean up to norm {norm:.3g}: RL {rl:.3f}, OPD {opd:.3f}")


def interpolated(curve: Sequence[tuple[float, float]], x: float) -> float:
    """Read a curve between two of its points, which are in order."""
    for (left, low), (right, high) in itertools.pairwise(curve):
        if left <= x <= right and right > left:
            return low + (x - left) / (right - left) * (high - low)
    return curve[-1][1] if x > curve[-1][0] else curve[0][1]


def embedding_swap(found: Found) -> Answer:
    """Compare the trained model with the one that has the base's embedding."""
    changes = []
    for run in (RL, OPD):
        of = {
            row["weights"]: float(row["accuracy"])
            for row in found["embeddings"]
            if row["run"] == run
        }
        changes.append(of["with the base's embedding"] - of["as trained"])
    text = f"accuracy changes by {changes[0]:+.3f} (RL), {changes[1]:+.3f} (OPD)"
    return Answer(max(map(abs, changes)) <= TINY_CHANGE, text)


def nearer_to_the_base(found: Found) -> Answer:
    """Compare the cosines of hidden states with the base's."""
    trained = [row for row in found["embeddings"] if row["weights"] == "as trained"]
    of = {row["run"]: float(row["cosine"]) for row in trained if "cosine" in row}
    if of.keys() != {OPD, RL}:
        return Answer(None, "no prompts were named")
    return Answer(of[OPD] > of[RL], f"cosine: RL {of[RL]:.3f}, OPD {of[OPD]:.3f}")


def mlp_over_attention(found: Found) -> Answer:
    """Compare mean accuracies of windows."""
    means = {}
    for run in (RL, OPD):
        for group in ("mlp", "attention"):
            rows = [r for r in found["windows"] if r["run"] == run and r["group"] == group]
            means[run, group] = math.fsum(float(r["accuracy"]) for r in rows) / len(rows)
    holds = all(means[run, "mlp"] > means[run, "attention"] for run in (RL, OPD))
    parts = (
        f"{run} {means[run, 'mlp']:.3f} and {means[run, 'attention']:.3f}" for run in (RL, OPD)
    )
    return Answer(holds, f"MLP and attention: {', '.join(parts)}")


def middle_windows(found: Found) -> Answer:
    """Ask whether the best window of MLP is neither the first nor the last.

    Those that the model's ends cut have fewer layers, and are worth less for that alone.
    """
    best, holds = {}, True
    for run in (RL, OPD):
        rows = [r for r in found["windows"] if r["run"] == run and r["group"] == "mlp"]
        whole = [r for r in rows if r["matrices"] == max(r["matrices"] for r in rows)]
        if len(whole) < 3:
            return Answer(None, "too few layers")
        centres = [row["centre"] for row in whole]
        best[run] = max(whole, key=lambda row: float(row["accuracy"]))["centre"]
        holds &= min(centres) < best[run] < max(centres)
    return Answer(holds, f"best centre: RL {best[RL]}, OPD {best[OPD]}")


def top_tenth_recovers(found: Found) -> Answer:
    """Ask how much of the gain of all components the top tenth has."""
    base = float(next(r["accuracy"] for r in found["scaling"] if r["a"] == 0))
    shares = []
    for run in (RL, OPD):
        rows = {
            (r["part"], r["percent"]): float(r["accuracy"])
            for r in found["subspaces"]
            if r["run"] == run
        }
        gain = rows["all", 100] - base
        shares.append((rows["top", 10] - base) / gain if gain > 0 else math.nan)
    if any(map(math.isnan, shares)):
        return Answer(None, "no gain to recover")
    return Answer(min(shares) > RECOVERED, f"RL {shares[0]:.0%}, OPD {shares[1]:.0%} of the gain")


def larger_tail(found: Found) -> Answer:
    """Compare norms of the bottom half of the components."""
    norms = {
        row["run"]: float(row["norm"])
        for row in found["subspaces"]
        if row["part"] == "bottom" and row["percent"] == 50
    }
    ratio = norms[RL] / norms[OPD]
    return Answer(ratio > 1, f"bottom half: RL's norm {ratio:.2f} times OPD's")


def earlier_lock_in(found: Found) -> Answer:
    """Compare cosines with the last directions at the same share of training."""
    at = {}
    for run in (OPD, RL):
        rows = sorted((r for r in found["lock_in"] if r["run"] == run), key=lambda r: r["step"])
        end = rows[-1]["step"]
        at[run] = [(row["step"] / end, float(row["cosine_mean"])) for row in rows]
    share = max(curve[0][0] for curve in at.values())
    opd, rl = (interpolated(at[run], share) for run in (OPD, RL))
    return Answer(opd > rl, f"after {share:.0%} of the steps: RL {rl:.3f}, OPD {opd:.3f}")


def in_a_plane(found: Found) -> Answer:
    """Compare how much of u_1's way two components explain."""
    means = {}
    for run in (RL, OPD):
        values = {r["matrix"]: float(r["explained"]) for r in found["planes"] if r["run"] == run}
        means[run] = math.fsum(values.values()) / len(values)
    return Answer(means[OPD] > means[RL], f"explained: RL {means[RL]:.1%}, OPD {means[OPD]:.1%}")


def early_with_final_norm(found: Found) -> Answer:
    """Ask for the accuracy of OPD's first checkpoint with the norms of the end."""
    rows = [row for row in found["norm_matching"] if row["run"] == OPD]
    step = min(row["step"] for row in rows)
    of = {row["b"]: float(row["accuracy"]) for row in rows if row["step"] == step}
    whole = [row for row in found["scaling"] if row["run"] == OPD and row["a"] == 1]
    final = float(whole[0]["accuracy"])
    text = f"step {step}: {of[0.0]:.3f}, with the final norm {of[1.0]:.3f}, at the end {final:.3f}"
    return Answer(of[1.0] >= EARLY_RECOVERED * final and of[1.0] > of[0.0], text)


def worse_beyond(found: Found) -> Answer:
    """Ask whether 1.6 of the way is worse than 0.8."""
    rows = [row for row in found["norm_matching"] if row["run"] == OPD]
    step = min(row["step"] for row in rows)
    of = {row["b"]: float(row["accuracy"]) for row in rows if row["step"] == step}
    return Answer(of[1.6] < of[0.8], f"step {step}: {of[0.8]:.3f} at b = 0.8, {of[1.6]:.3f} at 1.6")


FINDINGS = (
    Finding("4.1", "OPD gains more accuracy per norm of the update than RL", gain_per_norm),
    Finding(
        "4.3", "The base's embedding in the trained model changes next to nothing", embedding_swap
    ),
    Finding("4.3", "OPD's hidden states stay nearer to the base's", nearer_to_the_base),
    Finding("4.4", "Updates of MLP are worth more than those of attention", mlp_over_attention),
    Finding("4.4", "The middle layers are worth most", middle_windows),
    Finding("4.5", "OPD's spectral norm is larger", _spectral("spectral_norm", OPD)),
    Finding("4.5", "Its ratio to the Frobenius norm is larger", _spectral("spectral_ratio", OPD)),
    Finding("4.5", "OPD's effective rank is smaller", _spectral("effective_rank", RL)),
    Finding("4.5", "The top 1% has more of OPD's norm", _spectral("top_ratio", OPD)),
    Finding("4.6", "A tenth of the rank recovers 95% of the gain, of both", top_tenth_recovers),
    Finding("4.6", "RL's tail has the larger norm", larger_tail),
    Finding("4.7", "OPD's directions are those of the end earlier", earlier_lock_in),
    Finding("4.7", "The way of u_1 lies in a plane, more so with OPD", in_a_plane),
    Finding(
        "4.8", "An early update with the final norm has 80% of the score", early_with_final_norm
    ),
    Finding("4.8", "More than the final norm makes it worse", worse_beyond),
)


def answered(by_seed: Mapping[int, Found]) -> Iterator[tuple[Finding, dict[int, Answer]]]:
    """Ask all questions of all seeds."""
    for finding in FINDINGS:
        yield finding, {seed: finding.ask(found) for seed, found in by_seed.items()}


def verdict(answers: Mapping[int, Answer]) -> str:
    """Say of how many seeds a finding holds."""
    known = [answer.holds for answer in answers.values() if answer.holds is not None]
    if not known:
        return "cannot be said"
    word = "yes" if all(known) else "no" if not any(known) else "mixed"
    return f"{word} ({sum(known)} of {len(known)})"
