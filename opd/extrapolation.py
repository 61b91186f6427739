"""EffOPD as pure functions: when to search, along what, which candidates, and which one wins.

Paper (arXiv 2605.11739, EffOPD). After the optimizer steps t of a schedule (1, 2, 4, 8, ...), with
W the weights at t and an anchor from an earlier one::

    D = W - anchor                      direction
    W(c) = W + c D                      candidate with coefficient c
    c = 2, 4, 6, 8, 10                  tried in this order, while the score is not worse

Nothing here knows models, scores or Lightning: weights are lists of tensors, scores are numbers.

A schedule, a set of coefficients and an acceptance rule are written as short specifications:

=============  =====================================  ============================================
schedule       ``powers_of_two``                      t = 1, 2, 4, 8, ... (paper)
               ``every 5``                            t = 5, 10, 15, ...
               ``[3, 7, 20]``                         these steps
               ``[powers_of_two, every 50]``          the union of its items
               ``adaptive 8``                         after a search that keeps W, twice as many
                                                      steps later, at most 8; after one that makes
                                                      D more than twice or less than half as long,
                                                      half as many; else as many
coefficients   ``[2, 4, 6, 8, 10]``                   in this order, until one is refused (paper)
               ``doubling`` or ``doubling 64``        1, 2, 4, ... up to the limit, likewise
               ``two_sided`` or ``two_sided 64``      doubling; if 1 is refused, back toward the
                                                      anchor: -1/2, -3/4, -7/8, -15/16, -1
               ``bracket`` or ``bracket 4``           1 + c = 2, 4, ... up to the limit; if 2 is
                                                      refused, 1/2, 1/4, ... down to 1/limit and 0.
                                                      The first search of a run has no limit, and
                                                      begins with 0: has the step diverged?
accept         ``not_worse``                          score >= best so far (paper)
               ``better``                             score > best so far (published code)
               ``better 0.5``                         by more than so many standard errors
=============  =====================================  ============================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor

from opd.errors import UserError

DEFAULT_LIMITS = {"doubling": 64.0, "two_sided": 64.0, "bracket": 4.0}
FIRST_LIMIT = 2.0**20
BACKWARD = (-1 / 2, -3 / 4, -7 / 8, -15 / 16, -1.0)
ATTENTION_AND_MLP = (
    *("attn", "attention", "mlp", "ffn"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)

# --- schedule -------------------------------------------------------------------------------------

ScheduleItem = str | int


@dataclass
class Schedule:
    """When to search.

    Attributes:
        fixed: Whether there is a search after step t >= 1, whatever searches find.
        limit: Most steps between searches that adapt to what is found; 0: there are none.
        interval: Steps from the last one to the next.
        coming: The next one is after this step.
    """

    fixed: Callable[[int], bool]
    limit: int = 0
    interval: int = 1
    coming: int = 1

    def due(self, t: int) -> bool:
        """Whether there is a search after step t >= 1."""
        return self.fixed(t) or (self.limit > 0 and t >= self.coming)

    def searched(self, t: int, coefficient: float) -> None:
        """Take note of what the search after step t has found: the coefficient that it kept."""
        if not self.limit:
            return
        if not coefficient:
            self.interval = min(self.interval * 2, self.limit)
        elif not 0.5 <= 1 + coefficient <= 2:
            self.interval = max(self.interval // 2, 1)
        self.coming = t + self.interval


def parse_schedule(spec: ScheduleItem | Sequence[ScheduleItem]) -> Schedule:
    """Read a schedule's specification.

    Raises:
        UserError: The specification is not one of the module's table.
    """
    items = [spec] if isinstance(spec, str | int) else list(spec)
    if not items:
        raise UserError("EffOPD.schedule is empty; leave the callback out instead")
    parsed = [_parse_schedule_item(item) for item in items]
    fixed = [due for due, _ in parsed]
    return Schedule(
        lambda step: any(due(step) for due in fixed), limit=max(limit for _, limit in parsed)
    )


def _parse_schedule_item(item: ScheduleItem) -> tuple[Callable[[int], bool], int]:
    """Return when it is due, and the limit of an adaptive one."""
    name, number = (str(item), None) if isinstance(item, int) else _split(item, "schedule")
    whole = int(number) if number is not None and number >= 1 and number.is_integer() else None
    if name == "powers_of_two" and number is None:
        return lambda step: step > 0 and step & (step - 1) == 0, 0
    if name == "every" and whole is not None:
        return lambda step: step > 0 and step % whole == 0, 0
    if name == "adaptive" and whole is not None:
        return lambda step: False, whole
    if name.isdigit() and number is None and int(name) > 0:
        only = int(name)
        return lambda step: step == only, 0
    raise UserError(
        f"EffOPD.schedule {item!r} must be powers_of_two, 'every N', 'adaptive N', a step number "
        "from 1, or a list of these"
    )


# --- coefficients ---------------------------------------------------------------------------------

# Yields coefficients; is sent whether the last one was accepted.
Candidates = Generator[float, bool, None]
Coefficients = Callable[[bool], Candidates]  # is told whether this is the first search of a run


def parse_coefficients(spec: str | Sequence[float]) -> Coefficients:
    """Turn a specification of coefficients into a generator function.

    Raises:
        UserError: The specification is not one of the module's table.
    """
    if not isinstance(spec, str):
        values = [float(c) for c in spec]
        if not values or 0.0 in values:
            raise UserError(f"EffOPD.coefficients {values} must hold numbers other than 0")
        return lambda first: in_order(values)
    name, number = _split(spec, "coefficients")
    limit = DEFAULT_LIMITS.get(name, 0.0) if number is None else number
    if name == "doubling" and limit >= 1:
        return lambda first: doubling(limit)
    if name == "two_sided" and limit >= 1:
        return lambda first: two_sided(limit)
    if name == "bracket" and limit >= 2:
        return lambda first: first_bracket() if first else bracket(limit)
    raise UserError(
        f"EffOPD.coefficients {spec!r} must be a list of numbers, 'doubling LIMIT' or "
        "'two_sided LIMIT' with a limit of at least 1, or 'bracket LIMIT' with one of at least 2"
    )


def in_order(coefficients: Sequence[float]) -> Candidates:
    """Yield the coefficients in order until one is refused (paper: 2, 4, 6, 8, 10)."""
    for coefficient in coefficients:
        if not (yield coefficient):
            return


def doubling(limit: float) -> Candidates:
    """Yield 1, 2, 4, ... up to ``limit`` until one is refused."""
    coefficient = 1.0
    while coefficient <= limit and (yield coefficient):
        coefficient *= 2


def two_sided(limit: float) -> Candidates:
    """Double as long as it helps; if already 1 is refused, go back toward the anchor instead."""
    coefficient = 1.0
    while coefficient <= limit:
        if not (yield coefficient):
            break
        coefficient *= 2
    if coefficient == 1.0:
        yield from in_order(BACKWARD)


def bracket(limit: float) -> Candidates:
    """Double the displacement as long as it helps; if that is refused at once, halve it instead.

    Args:
        limit: The displacement becomes at most so many times as long, or as short; where that helps
            too, the anchor itself is asked.
    """
    length = 2.0  # 1 + c
    while length <= limit and (yield length - 1):
        length *= 2
    if length > 2.0:
        return
    length = 0.5
    while length >= 1 / limit:
        if not (yield length - 1):
            return
        length /= 2
    yield -1.0


def first_bracket() -> Candidates:
    """Do the same without a limit, where nothing is known of the learning rate.

    The anchor is asked first. Where it is better than W, the step has diverged: no doubling is of
    use, and halving goes on at least until something beats the anchor.
    """
    if not (yield -1.0):
        yield from bracket(FIRST_LIMIT)
        return
    length, found = 0.5, False
    while length >= 1 / FIRST_LIMIT:
        accepted = yield length - 1
        if found and not accepted:
            return
        found = found or accepted
        length /= 2


# --- acceptance -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How a candidate's score differs from the best so far, on the same examples.

    Attributes:
        difference: Candidate minus best; higher is better.
        standard_error: Of the difference, from its scatter over examples.
    """

    difference: float
    standard_error: float


Accept = Callable[[Comparison], bool]


def parse_accept(spec: str) -> Accept:
    """Turn an acceptance rule into a function.

    Raises:
        UserError: The rule is not one of the module's table.
    """
    name, margin = _split(spec, "accept")
    if name == "not_worse" and margin is None:
        return lambda comparison: comparison.difference >= 0
    if name == "better" and (margin is None or margin >= 0):
        errors = margin or 0.0
        return lambda comparison: comparison.difference > errors * comparison.standard_error
    raise UserError(f"EffOPD.accept {spec!r} must be not_worse, better or 'better MARGIN'")


def _split(spec: str, key: str) -> tuple[str, float | None]:
    """Split ``name`` or ``name number``."""
    name, _, rest = spec.strip().partition(" ")
    return name, _number(rest, spec, key) if rest else None


def _number(word: str, spec: str, key: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UserError(f"EffOPD.{key} {spec!r}: {word!r} is not a number") from None


# --- search ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What a score says of some weights: a weighted mean over examples; higher is better.

    Attributes:
        values: Sum of the quantity over each example's units, on this rank, [E].
        weights: Units of each example (1 answer, n tokens), on this rank, [E].
        moved: Sum of KL(mu || p) over each example's units: how far the weights have come from
            those that sampled it, on this rank, [E]; None: the score does not know.
    """

    values: Tensor
    weights: Tensor
    moved: Tensor | None = None

    def proximal(self, weight: float) -> Score:
        """Return the score less so many times how far the weights have moved.

        What is maximised then, -KL(p || q) - KL(mu || p) for a weight of 1, has its maximum about
        half-way between mu, that has sampled the examples, and the teacher q, be they far apart or
        near: a candidate must gain more than it moves (the proximal step of mirror descent; a
        trust region as in 1502.05477 whose radius nobody has to choose).
        """
        if not weight:
            return self
        assert self.moved is not None
        return Score(self.values - weight * self.moved, self.weights)

    def mean(self, reduce_sum: Callable[[Tensor], Tensor]) -> float:
        """Sum of values divided by sum of weights, over all ranks; a collective."""
        sums = torch.stack([self.values.double().sum(), self.weights.double().sum()])
        total, weight = reduce_sum(sums).tolist()
        return total / weight if weight else float("nan")

    def compare(self, best: Score, reduce_sum: Callable[[Tensor], Tensor]) -> Comparison:
        """Compare with the best score so far, example by example, over all ranks; a collective.

        A score that is not finite is worse than all others: the weights have diverged.
        """
        change = self.values.double() - best.values.double()
        weight = self.weights.double().sum()
        count = torch.full_like(weight, float(change.numel()))
        broken = [(~score.values.isfinite()).double().sum() for score in (self, best)]
        sums = torch.stack([change.sum(), change.square().sum(), count, weight, *broken])
        total, squares, n, units, broken_here, broken_before = reduce_sum(sums).tolist()
        if broken_here or broken_before:
            return Comparison(-math.inf if broken_here else math.inf, 0.0)
        if not units:
            return Comparison(float("nan"), float("nan"))
        variance = max(squares - total * total / n, 0.0) / max(n - 1, 1)
        return Comparison(total / units, (n * variance) ** 0.5 / units)


@dataclass(frozen=True)
class Tried:
    """One candidate of a search."""

    coefficient: float
    score: float
    accepted: bool


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        score_before: Score of W.
        score_after: Score of the weights kept.
        coefficient: Of the weights kept; 0 if every candidate was refused.
        tried: All candidates, in order.
    """

    score_before: float
    score_after: float
    coefficient: float = 0.0
    tried: list[Tried] = field(default_factory=list)

    def learning_rate_factor(self, steps: int) -> float:
        """How many times as long the optimizer's steps should have been.

        1 + c of a single step. Of several, what they agree on adds up in D, and what is noise does
        not: that D is too short says less of each step, 1 + c / steps; that it is too long is taken
        as it is. Where the anchor has won, half of the shortest that was refused.

        Args:
            steps: Optimizer steps that D is made of.
        """
        if self.coefficient > 0:
            return 1 + self.coefficient / steps
        if self.coefficient > -1:
            return 1 + self.coefficient
        return min((1 + t.coefficient for t in self.tried if t.coefficient > -1), default=1.0) / 2


def search(
    candidates: Candidates,
    score_at: Callable[[float], Score],
    accept: Accept,
    reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    proximal: Callable[[float], float] = lambda coefficient: 0.0,
) -> SearchResult:
    """Walk along the direction and keep the last accepted candidate (2605.11739, EffOPD).

    Args:
        candidates: Yields coefficients and is told whether they were accepted.
        score_at: Scores W + c D; c = 0 scores W itself.
        accept: Whether a candidate replaces the best so far.
        reduce_sum: Sums a tensor over ranks, so that all ranks decide alike.
        proximal: How much it counts, for a candidate and the best so far, that they have moved.
    """
    best = score_at(0.0)
    before = best.mean(reduce_sum)
    result = SearchResult(score_before=before, score_after=before)
    coefficient = next(candidates, None)
    while coefficient is not None:
        score = score_at(coefficient)
        value = score.mean(reduce_sum)
        weight = proximal(coefficient)
        compared = score.proximal(weight).compare(best.proximal(weight), reduce_sum)
        accepted = accept(compared)
        result.tried.append(Tried(coefficient, value, accepted))
        if accepted:
            best, result.score_after, result.coefficient = score, value, coefficient
        try:
            coefficient = candidates.send(accepted)
        except StopIteration:
            coefficient = None
    return result


# --- weights --------------------------------------------------------------------------------------


@torch.no_grad()
def set_candidate(
    weights: Sequence[Tensor], base: Sequence[Tensor], anchor: Sequence[Tensor], coefficient: float
) -> None:
    """Set weights to W + c (W - anchor), elementwise, without further memory.

    Always computed from the exact copies, never from an earlier candidate: c = 0 gives back W bit
    for bit, and c = -1 the anchor. What is nearer to the anchor is computed from there, so that it
    is exact too where W is far away. Tensors may be shards: nothing is gathered.

    Args:
        weights: Tensors to overwrite.
        base: Exact copy of W, on the same or another device.
        anchor: The anchor, on the same or another device.
        coefficient: c.
    """
    from_anchor = coefficient < -0.5
    start, length = (anchor, 1 + coefficient) if from_anchor else (base, coefficient)
    if length == 0.0:
        copy_weights(weights, start)
        return
    targets = list(weights)
    copy_weights(targets, base)
    torch._foreach_sub_(targets, _beside(targets, anchor))
    torch._foreach_mul_(targets, length)
    torch._foreach_add_(targets, _beside(targets, start))


@torch.no_grad()
def copy_weights(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy weights, across devices if need be."""
    torch._foreach_copy_(list(targets), list(sources))


@torch.no_grad()
def direction_norm(
    weights: Sequence[Tensor],
    anchor: Sequence[Tensor],
    reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> float:
    """Frobenius norm of D = W - anchor over all tensors and ranks' shards; a collective."""
    squares = [
        (w.double() - a.to(w.device).double()).square().sum()
        for w, a in zip(weights, anchor, strict=True)
    ]
    return float(reduce_sum(torch.stack(squares).sum()).sqrt())


def _beside(targets: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Move tensors to the devices of their targets."""
    return [t.to(target.device) for t, target in zip(tensors, targets, strict=True)]


def select_parameters(
    names: Sequence[str], spec: str | Sequence[str], owner: str = "EffOPD"
) -> list[str]:
    """Choose the parameters that a search moves.

    Args:
        names: Names of all trainable parameters.
        spec: ``all``; ``attention_and_mlp``, every name that contains one of the published code's
            words; or glob patterns such as ``*.layers.*``, of which one must match.
        owner: Whose option it is.

    Raises:
        UserError: Nothing matches.
    """
    if spec == "all":
        chosen = list(names)
    elif spec == "attention_and_mlp":
        chosen = [name for name in names if any(word in name for word in ATTENTION_AND_MLP)]
    else:
        patterns = [spec] if isinstance(spec, str) else list(spec)
        chosen = [name for name in names if any(fnmatch(name, p) for p in patterns)]
    if not chosen:
        examples = ", ".join(list(names)[:2])
        raise UserError(
            f"{owner}.parameters {spec!r} matches no parameter; names are like {examples}"
        )
    return chosen
