"""Does an objective learn anything from its teacher? Asked before a run, with made-up numbers.

Some combinations train, and train nothing: the gradient is 0, or it is the same whatever the
teacher thinks. No metric shows it. So the objective is handed what students and teachers might
think of a few tokens, and its gradient by the logits is looked at:

- it is 0 everywhere: a loss without gradient, or weights that are all 0
- it is 0 on average over the tokens that the student might have sampled: a policy gradient whose
  advantage does not depend on the token, as a KL is the same whatever has been sampled
- it stays the same when the teacher changes: as that of log p - log q of a sampled token, whose
  slope is log p's alone; only as an advantage it has a teacher
- it stays the same when the advantage of a reward changes, although there is one

An objective that asks no teacher (its ``needs`` name none) is a control and may be blind. What is
handed out is diverse, but not everything: a loss that is 0 for nearly all tokens may be refused.

Shapes: n made-up tokens, V vocabulary, S tokens that an average is taken over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.errors import UserError
from opd.objectives.distributions import Distributions
from opd.objectives.objective import Objective, as_needed
from opd.objectives.weighted import ByPosition, Weighted
from opd.randomness import derive_seed
from opd.rollouts import Tokens
from opd.teachers import REFERENCE, TEACHER

NUMBERS = 2**20  # of an [n, V] array, about
FEWEST, MOST = 12, 384  # tokens
CONTEXTS, SAMPLES = 3, 4  # averages, and tokens S that each is taken over
ELSEWHERE = -60.0  # log-odds of tokens that an average leaves out
ROUNDING = 1e-12  # of a gradient in float64
NOTHING = 1e-9  # of a gradient, relative to the largest part of one
SHARPNESS = (0.3, 2.0, 8.0)  # standard deviations of logits: hardly any preference, some, one


@dataclass(frozen=True)
class _Case:
    """Made-up tokens: what is thought of each, and what is known of it."""

    logits: Mapping[str, Tensor]  # by reader; "student" is one of them
    tokens: Tokens


def check_objective(
    objective: Objective,
    *,
    vocabulary: int,
    max_new_tokens: int,
    rewarded: bool = False,
    same: Mapping[str, str] | None = None,
) -> None:
    """Refuse an objective that would learn nothing, or nothing from its teacher.

    Args:
        objective: The objective.
        vocabulary: Tokens, V.
        max_new_tokens: Of the longest completion.
        rewarded: Whether tokens have the advantage of a reward.
        same: Who thinks exactly what another does: ``student`` and ``reference`` may be the
            teacher.

    Raises:
        UserError: Its gradient is 0, or blind to the teacher or to the reward; says which.
    """
    _check_positions(objective, max_new_tokens)
    name, same = type(objective).__name__, same or {}
    rows = min(max(NUMBERS // vocabulary, FEWEST), MOST)
    average = _case(CONTEXTS * SAMPLES, vocabulary, max_new_tokens, rewarded, same, average=True)
    anywhere = _case(rows, vocabulary, max_new_tokens, rewarded, same, average=False)
    slopes = [_slope(objective, case) for case in (average, anywhere)]
    largest = max(float(slope.abs().max()) for slope in slopes)
    if largest <= ROUNDING:
        raise UserError(f"model.objective {name}: its gradient is 0 for every token{_why(same)}")
    asks = TEACHER in objective.needs
    if asks and _same(objective, anywhere, slopes[1], TEACHER):
        raise UserError(
            f"model.objective {name}: its gradient is the same whatever the teacher thinks; as "
            "log p - log q of a sampled token, whose slope is that of log p, it needs a policy "
            "gradient (opd.objectives.PolicyGradient). A control that asks no teacher says so with "
            "needs = {}"
        )
    if asks and _vanishes(_expected(slopes[0], average), slopes[0]):
        raise UserError(
            f"model.objective {name}: its gradient is 0 on average, whatever the teacher: what it "
            "multiplies log p(y) with does not depend on the token y that was sampled; take the "
            "gradient of a divergence itself, as opd.objectives.ReverseKL or TopKKL, or the "
            "advantage of opd.objectives.PolicyGradient"
        )
    if rewarded and _same(objective, anywhere, slopes[1], "advantage"):
        raise UserError(
            f"model.reward: objective {name} does not look at it; use "
            "opd.objectives.PolicyGradient or SampledExOPD, which add it to the advantage, or "
            "ClippedPolicyGradient, which has no other"
        )


def _check_positions(objective: Objective, max_new_tokens: int) -> None:
    while isinstance(objective, Weighted):
        weight = objective.weight
        if (
            isinstance(weight, ByPosition)
            and weight.half_life is None
            and weight.first is not None
            and weight.first >= max_new_tokens
        ):
            raise UserError(
                f"ByPosition.first={weight.first}: completions have at most {max_new_tokens} "
                "tokens (model.max_new_tokens), so that all would count; take it out"
            )
        objective = objective.objective


def _why(same: Mapping[str, str]) -> str:
    if same.get("student") == TEACHER:
        return (
            "; model.student and model.teacher are the same model and read the same prompts, so "
            "there is nothing to learn (data.format.context_field lets a teacher know more)"
        )
    return "; its loss has no slope, or all of its weights are 0"


def _case(
    rows: int, size: int, longest: int, rewarded: bool, same: Mapping[str, str], *, average: bool
) -> _Case:
    """Make up tokens: of all kinds, or, for an average, all that a student might have sampled."""
    random = torch.Generator().manual_seed(derive_seed("probe", rows, size))

    samples = min(SAMPLES, size)
    contexts = CONTEXTS if average else rows
    sharpness = torch.tensor(SHARPNESS, dtype=torch.float64).repeat(contexts)[:contexts, None]
    drawn = torch.randn(contexts, size, generator=random, dtype=torch.float64)
    logits = {  # large arrays take long to draw
        who: sharpness.roll(i, 0) * drawn.roll(1 + i * (size // 4), 1)
        for i, who in enumerate(("student", TEACHER, REFERENCE, "other"))
    }
    position = torch.randint(longest, (contexts,), generator=random)
    position[0], position[-1] = 0, longest - 1
    rank = torch.tensor([0, size // 9, size // 2, size - 1]).repeat(contexts)[:contexts, None]
    y = logits["student"].sort(descending=True).indices.gather(1, rank).squeeze(1)
    if average:
        spread = torch.linspace(0, size - 1, samples).long()
        there = torch.full((size,), ELSEWHERE, dtype=torch.float64)
        there[spread] = 0.0
        position = position.repeat_interleave(samples)
        logits = {who: (of + there).repeat_interleave(samples, 0) for who, of in logits.items()}
        y = spread.repeat(contexts)
    for who, other in same.items():
        logits[who] = logits[other]
    logmu = logits["student"].log_softmax(-1).gather(1, y[:, None]).squeeze(1)
    drift = torch.linspace(0, 1, len(y)).double()
    # On average over the tokens an advantage is 0: those of a reward are made by comparison
    advantage = torch.linspace(-1, 2, len(y)).double() * (not average) if rewarded else None
    return _Case(logits, Tokens(y, logmu, advantage, None, position, drift))


def _slope(objective: Objective, case: _Case, teacher: str = TEACHER) -> Tensor:
    """Return the gradient of the loss by the logits, [n, V]."""
    logits = case.logits
    opinions = {TEACHER: logits[teacher], REFERENCE: logits[REFERENCE]}
    log_q = {name: of.log_softmax(-1) for name, of in opinions.items()}
    opinions = as_needed(log_q, objective.needs, case.tokens.y)
    both = Distributions(logits["student"].log_softmax(-1), opinions)
    return objective.with_slope(both, case.tokens)[1]


def _expected(slope: Tensor, case: _Case) -> Tensor:
    """Average over the tokens that the student might have sampled, [contexts, V]."""
    samples = min(SAMPLES, slope.shape[1])
    p = case.tokens.logmu_y.exp()[:, None]
    weighted: Tensor = (p * slope).unflatten(0, (-1, samples))
    return weighted.sum(dim=1)


def _vanishes(part: Tensor, whole: Tensor) -> bool:
    """Whether nothing is left of something."""
    return float(part.abs().max()) <= NOTHING * float(whole.abs().max()) > 0


def _same(objective: Objective, case: _Case, slope: Tensor, changed: str) -> bool:
    """Whether the gradient is the same if the teacher, or the advantage, is another."""
    if changed == TEACHER:
        other = _slope(objective, case, "other")
    else:
        advantage = case.tokens.advantage
        assert advantage is not None
        tokens = replace(case.tokens, advantage=-2 * advantage)
        other = _slope(objective, _Case(case.logits, tokens))
    return _vanishes(other - slope, slope)
