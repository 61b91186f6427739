"""Objectives that would learn nothing, or nothing from the teacher, are refused before a run."""

import math
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from conftest import QUICKSTART, QUIET, SHRUNK

from opd import objectives
from opd.cli import main
from opd.errors import UserError
from opd.objectives import (
    ByDrift,
    ByEntropy,
    ByPosition,
    ClippedPolicyGradient,
    Distributions,
    ExOPD,
    FixedNegativeAdvantage,
    ForwardKL,
    GeneralizedJSD,
    Objective,
    PolicyGradient,
    ReverseKL,
    SampledExOPD,
    SkewKL,
    TokenWeight,
    TopKKL,
    Weighted,
    of_sampled,
    reverse_kl,
)
from opd.objectives.policy_gradient import policy_gradient_loss
from opd.objectives.probe import check_objective
from opd.rollouts import Tokens

SIZES = [(5, 1), (31, 24), (4000, 16384)]


class K1(Objective):
    """log p(y) - log q(y), as it is reported; its gradient is that of log p(y)."""

    needs: ClassVar[Mapping] = {"teacher": "sampled"}

    def __call__(self, log_p, opinions, tokens):
        return of_sampled(log_p, tokens.y) - opinions["teacher"]


class Advantage(Objective):
    """The policy gradient of a KL over the k likeliest tokens: no token is to blame for it."""

    def __init__(self, k=3):
        self.of = TopKKL(k)

    def __call__(self, log_p, opinions, tokens):
        advantage = -self.of(log_p, opinions, tokens).detach()
        logp_y = of_sampled(log_p, tokens.y)
        return policy_gradient_loss(logp_y, logp_y.detach(), advantage)


class Detached(Objective):
    def __call__(self, log_p, opinions, tokens):
        return ReverseKL()(log_p.detach(), opinions, tokens)


class Entropy(Objective):
    """Names a teacher, and does not ask it."""

    def __call__(self, log_p, opinions, tokens):
        return (log_p.exp() * log_p).sum(-1)


class Never(TokenWeight):
    def __call__(self, both, tokens):
        return torch.zeros_like(both.log_p[:, 0])


class Late(TokenWeight):
    """The last token of the longest completion, where the teacher is sure of another."""

    def __init__(self, last):
        self.last = last

    def __call__(self, both, tokens):
        late = (tokens.position == self.last) & (both.reverse_kl > 0.01)
        return late.to(both.log_p.dtype)


GOOD = [
    *(ReverseKL(), ForwardKL(), GeneralizedJSD(0.01), SkewKL(0.9), SkewKL(0.1, "forward")),
    *(TopKKL(1), TopKKL(64, "union", "forward"), TopKKL(2, "intersection")),
    *(PolicyGradient(), PolicyGradient(importance_cap=None), ExOPD(), SampledExOPD(scale=0.5)),
    *(FixedNegativeAdvantage(), FixedNegativeAdvantage(below=1.0)),
    FixedNegativeAdvantage(below=1e-4),
    *(ClippedPolicyGradient(), ClippedPolicyGradient(kl=0.1)),
    Weighted(ClippedPolicyGradient(), ByEntropy()),
    *(Weighted(ReverseKL(), ByEntropy()), Weighted(ReverseKL(), ByPosition(half_life=0.1))),
    Weighted(PolicyGradient(), ByDrift()),
    Weighted(Weighted(PolicyGradient(), ByEntropy("teacher")), ByPosition(first=1, half_life=9)),
]


@pytest.mark.parametrize(("size", "longest"), SIZES)
@pytest.mark.parametrize("objective", GOOD, ids=repr)
def test_ours_are_not_refused_with_small_and_large_vocabularies(objective, size, longest):
    sizes = {"vocabulary": size, "max_new_tokens": longest}
    check_objective(objective, **sizes, rewarded=objective.needs_reward)


def test_the_vocabularies_of_today_are_no_problem():
    sizes = {"vocabulary": 151_936, "max_new_tokens": 16384}
    check_objective(SampledExOPD(), **sizes)
    with pytest.raises(UserError, match="0 on average"):
        check_objective(Advantage(), **sizes)


BLIND = {
    "its gradient is the same whatever the teacher": [K1(), Weighted(K1(), ByEntropy()), Entropy()],
    "its gradient is 0 on average": [Advantage(), Weighted(Advantage(), ByPosition(half_life=2))],
    "its gradient is 0 for every token": [Detached(), Weighted(ReverseKL(), Never())],
}


@pytest.mark.parametrize(("size", "longest"), SIZES)
@pytest.mark.parametrize(
    ("reason", "objective"), [(r, o) for r, all_of in BLIND.items() for o in all_of]
)
def test_what_learns_nothing_from_its_teacher_is_refused(reason, objective, size, longest):
    with pytest.raises(UserError, match=f"model.objective {type(objective).__name__}: {reason}"):
        check_objective(objective, vocabulary=size, max_new_tokens=longest)


def test_a_weight_of_few_tokens_is_seen_at_both_ends_of_a_completion():
    for last in (0, 4095):
        check_objective(Weighted(ReverseKL(), Late(last)), vocabulary=31, max_new_tokens=4096)
    with pytest.raises(UserError, match="gradient is 0 for every token"):
        check_objective(Weighted(ReverseKL(), Late(4096)), vocabulary=31, max_new_tokens=4096)


def test_the_gradient_on_average_is_that_of_the_kl():
    """What the check takes of a policy gradient, written out: sum over y of p A slope of log p."""
    log_p, log_q = (
        torch.randn(1, 4, generator=torch.Generator().manual_seed(i)).double().log_softmax(-1)
        for i in (0, 1)
    )
    slopes = []
    for y in range(4):
        tokens = Tokens(torch.tensor([y]), log_p[:, y])
        both = Distributions(log_p, {"teacher": log_q})
        slopes.append(log_p[0, y].exp() * PolicyGradient().with_slope(both, tokens)[1])
    exact = ReverseKL().with_slope(Distributions(log_p, {"teacher": log_q}), tokens)[1]
    torch.testing.assert_close(sum(slopes), exact)
    assert math.isclose(float(sum(slopes).sum()), 0, abs_tol=1e-12)


def test_a_reward_that_nobody_looks_at():
    sizes = {"vocabulary": 31, "max_new_tokens": 24, "rewarded": True}
    for objective in (PolicyGradient(), SampledExOPD(), Weighted(PolicyGradient(), ByEntropy())):
        check_objective(objective, **sizes)
    check_objective(PolicyGradient(), **sizes, same={"student": "teacher"})  # it has the reward
    for objective in (ReverseKL(), FixedNegativeAdvantage(), Weighted(TopKKL(3), ByEntropy())):
        with pytest.raises(UserError, match=r"model.reward: objective \w+ does not look at it"):
            check_objective(objective, **sizes)


def test_positions_that_no_completion_has():
    beyond = Weighted(ForwardKL(), ByPosition(first=24))
    check_objective(beyond, vocabulary=31, max_new_tokens=25)
    with pytest.raises(UserError, match=r"ByPosition.first=24: completions have at most 24 tokens"):
        check_objective(beyond, vocabulary=31, max_new_tokens=24)
    outer = Weighted(beyond, ByEntropy())
    with pytest.raises(UserError, match=r"ByPosition.first=24"):
        check_objective(outer, vocabulary=31, max_new_tokens=24)
    check_objective(
        Weighted(ForwardKL(), ByPosition(24, half_life=3)), vocabulary=31, max_new_tokens=24
    )


@pytest.mark.parametrize("objective", GOOD, ids=repr)
def test_a_student_that_is_its_teacher_learns_nothing_from_it(objective):
    def check():
        options = {"same": {"student": "teacher"}, "rewarded": objective.needs_reward}
        check_objective(objective, vocabulary=31, max_new_tokens=24, **options)

    if isinstance(objective, ExOPD | SampledExOPD) or "teacher" not in objective.needs:
        check()  # nothing is learnt from a teacher, or there is a reference
    else:
        with pytest.raises(UserError, match="are the same model and read the same prompts"):
            check()


def test_all_of_ours_are_looked_at():
    ours = {
        o for o in vars(objectives).values() if isinstance(o, type) and issubclass(o, Objective)
    }
    assert {type(o) for o in GOOD} == ours - {Objective}


class Critic(Objective):
    needs: ClassVar[Mapping] = {"critic": "full"}

    def __call__(self, log_p, opinions, tokens):
        return reverse_kl(log_p, opinions["critic"])


class Single(Objective):
    """Of float32 numbers only, as a kernel may be."""

    def __call__(self, log_p, opinions, tokens):
        assert log_p.dtype == torch.float32, "made for float32"
        return reverse_kl(log_p, opinions["teacher"])


def test_what_cannot_be_tried_out_is_said_and_run(fit, caplog):
    fit("run", "--model.objective", "test_probe.Single", steps=1)
    said = "model.objective Single cannot be tried out on made-up numbers before the run: made for"
    assert sum(said in record.getMessage() for record in caplog.records) == 1


def test_what_needs_more_than_there_is_ends_in_one_line(tmp_path, capsys, caplog):
    place = ["--output", str(tmp_path / "run"), "--model.objective", "test_probe.Critic"]
    assert main(["fit", "--config", QUICKSTART, *SHRUNK, *QUIET, *place]) == 2
    assert "Critic needs a 'critic', which this run has not" in capsys.readouterr().err
    assert "cannot be tried out" not in caplog.text


EXOPD = ["--model.objective", "opd.objectives.ExOPD", "--model.reference"]
RUNS = {
    "K1: its gradient is the same whatever": ["--model.objective", "test_probe.K1"],
    "Advantage: its gradient is 0 on average": ["--model.objective", "test_probe.Advantage"],
    "model.student and model.teacher are the same": ["--model.student", "embedded:teacher"],
    "model.reference and model.teacher are both": [*EXOPD, "embedded:teacher"],
}


@pytest.mark.parametrize(("said", "options"), RUNS.items(), ids=RUNS)
def test_a_run_ends_before_it_begins(said, options, tmp_path, capsys):
    place = ["--output", str(tmp_path / "run"), "--trainer.max_steps", "1"]
    assert main(["fit", "--config", QUICKSTART, *SHRUNK, *QUIET, *place, *options]) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("opd")]
    assert said in line
    validate = ["--data.validation_limit", "4", *QUIET]
    assert main(["validate", "--config", QUICKSTART, *validate, *options]) == 0
