"""Weights of tokens: what they are, written out, and that they multiply loss and gradient."""

import math
from typing import ClassVar

import pytest
import torch
from test_divergences import N, logits, softmax
from test_step import module_of, rollouts_of
from test_tokens import LENGTHS, models, rollouts, run

from opd.errors import UserError
from opd.metrics_rows import read_metrics
from opd.mixture import Mixture
from opd.module import OPDModule
from opd.objectives import (
    ByDrift,
    ByEntropy,
    ByPosition,
    Distributions,
    FixedNegativeAdvantage,
    ForwardKL,
    PolicyGradient,
    ReverseKL,
    SampledExOPD,
    TopKKL,
    Weighted,
)
from opd.objectives.weighted import drift
from opd.rollouts import Tokens, cut_into_micro_batches
from opd.step import accumulate_gradients

POSITIONS = torch.tensor([0, 3, 4, 5, 10])
TOKENS = Tokens(
    torch.arange(N), torch.full((N,), -1.0).double(), position=POSITIONS[:N], weight=None
)
ENTROPY = ["--model.objective.weight", "opd.objectives.ByEntropy"]
WEIGHTED = ["--model.objective", "opd.objectives.Weighted"]


def entropy(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in softmax(row))


def both_of(student: torch.Tensor, teacher: torch.Tensor) -> Distributions:
    return Distributions(student.log_softmax(-1), {"teacher": teacher.log_softmax(-1)})


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_weights_by_entropy_are_between_that_of_certain_and_of_uncertain_tokens(of):
    student, teacher = logits(0), logits(1)
    found = ByEntropy(of, certain=0.5, uncertain=2.0)(both_of(student, teacher), TOKENS)
    rows = (student if of == "student" else teacher).tolist()
    expected = [2.0 + (0.5 - 2.0) / math.exp(entropy(row)) for row in rows]
    assert found.tolist() == pytest.approx(expected)


def test_a_choice_of_two_weighs_half_whatever_the_vocabulary():
    for size in (2, 5, 5000):
        row = torch.full((1, size), -1e9)
        row[:, :2] = 0.0
        assert ByEntropy()(both_of(row, row), TOKENS[:1]).item() == pytest.approx(0.5)
        row[:, 1] = -1e9
        assert ByEntropy()(both_of(row, row), TOKENS[:1]).item() == pytest.approx(0.0, abs=1e-6)


def test_weights_by_position():
    both = both_of(logits(0), logits(1))
    first = ByPosition(first=4)(both, TOKENS)
    assert first.tolist() == [1, 1, 0, 0, 0]
    decay = ByPosition(half_life=5)(both, TOKENS)
    assert decay.tolist() == pytest.approx([1, 2**-0.6, 2**-0.8, 0.5, 0.25])
    assert ByPosition(4, 5)(both, TOKENS).tolist() == pytest.approx([1, 2**-0.6, 0, 0, 0])


WEIGHTS = [ByEntropy("teacher", 1.0, 0.2), ByPosition(half_life=3)]
OBJECTIVES = [ReverseKL(), ForwardKL(), TopKKL(2), PolicyGradient(), FixedNegativeAdvantage()]


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: type(w).__name__)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_loss_and_gradient_are_multiplied_and_no_gradient_flows_through_the_weight(
    objective, weight
):
    both = both_of(logits(2), logits(3))
    factors = weight(both, TOKENS)
    assert len(set(factors.tolist())) == N
    plain = objective.with_slope(both, TOKENS)
    weighted = Weighted(objective, weight)
    expected = (plain[0] * factors, plain[1] * factors[:, None])
    torch.testing.assert_close(weighted.with_slope(both, TOKENS), expected)
    student = logits(2).requires_grad_()
    loss = weighted(student.log_softmax(-1), dict(both.opinions), TOKENS)
    (slope,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close((loss.detach(), slope), expected)


class OfSampled(ByPosition):
    """A weight that the teacher's opinion of the sampled token is enough for."""

    needs: ClassVar = {"teacher": "sampled"}

    def __init__(self):
        super().__init__(first=1)


def test_it_needs_what_either_needs_and_is_weighed_as_its_objective():
    sampled = PolicyGradient(importance_cap=None)
    by_teacher = Weighted(sampled, ByEntropy("teacher"))
    assert by_teacher.needs == {"teacher": "full"}
    assert by_teacher.ratio_of == "sampled"  # although it is made of the whole distribution
    assert Weighted(sampled, ByEntropy()).needs == {"teacher": "sampled"}
    assert Weighted(ReverseKL(), ByEntropy()).ratio_of == "previous"
    assert Weighted(PolicyGradient(), ByEntropy()).ratio_of is None
    beyond = Weighted(SampledExOPD(), ByEntropy("teacher"))
    assert beyond.needs == {"teacher": "full", "reference": "sampled"}
    assert Weighted(FixedNegativeAdvantage(), ByPosition(3)).needs == {}
    assert Weighted(ReverseKL(), OfSampled()).needs == {"teacher": "full"}


def test_two_weights_multiply_and_are_measured_as_one():
    both = both_of(logits(4), logits(5))
    twice = Weighted(Weighted(TopKKL(2), ByPosition(half_life=2)), ByEntropy())
    assert twice.metrics == (*TopKKL(2).metrics, "opd/token_weight")
    product = ByPosition(half_life=2)(both, TOKENS) * ByEntropy()(both, TOKENS)
    found = twice.measure(both, TOKENS)
    assert set(found) == set(twice.metrics)
    torch.testing.assert_close(found["opd/token_weight"], product)
    loss, _ = twice.with_slope(both, TOKENS)
    torch.testing.assert_close(loss, product * TopKKL(2).with_slope(both, TOKENS)[0])


@pytest.mark.parametrize("tile", [1, 3, 100])
def test_positions_are_those_in_the_completion_whatever_the_tile(tiny, tile):
    student, teacher = models(tiny, "llama")
    micro = rollouts(250)
    objective = Weighted(ReverseKL(), ByPosition(first=4, half_life=2))
    values = run(student, teacher, micro, objective, tile=tile).values
    expected = [2 ** (-t / 2) * (t < 4) for length in LENGTHS for t in range(length)]
    assert values["opd/token_weight"].tolist() == pytest.approx(expected)
    weighted = values["opd/reverse_kl"] * torch.tensor(expected)
    torch.testing.assert_close(values["opd/loss"], weighted, rtol=1e-4, atol=1e-6)


# --- drift ----------------------------------------------------------------------------------------


def test_drift_by_hand():
    """|log q - log mu| are 1, 0, 3 and 2; all agree; one token; none."""
    logmu = torch.tensor([[-1, -2, -1, -3], [-1, -1, 0, 0], [-4, 0, 0, 0], [0, 0, 0, 0]])
    apart = torch.tensor([[1, 0, -3, 2], [0, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]])
    found = drift((logmu + apart).double(), logmu.double())
    assert found[0].tolist() == pytest.approx([0, 1 / 6, 1 / 6, 4 / 6])
    assert found[1].tolist() == [0] * 4
    assert found[2, 0] == found[3, 0] == 0
    tokens = Tokens(torch.arange(4), logmu[0], drift=found[0])
    weights = ByDrift()(both_of(logits(0), logits(1)), tokens)
    assert weights.tolist() == pytest.approx([1.5, 1 + 5 / 12, 1 + 5 / 12, 1 + 1 / 6])


@pytest.mark.parametrize("tile", [1, 3, None])
@pytest.mark.parametrize("objective", [PolicyGradient(), ReverseKL()])
def test_a_step_weighs_by_drift_whatever_the_tile_and_the_cut(tiny, objective, tile):
    """IW-OPD of whole completions, in float64, each by itself, with a sharpened distribution."""
    weighted = Weighted(objective, ByDrift(gamma=2.0))
    module = module_of(tiny, objective=weighted, temperature=1.3, tile_tokens=tile)
    sampled = rollouts_of(module)
    module.student.eval()
    values, readings = accumulate_gradients(module, cut_into_micro_batches(sampled, 60), True)
    slopes = [p.grad.clone() for p in module.student.parameters()]
    module.zero_grad()
    teacher = module.teachers["default"].model
    total = 0
    for reading, found in zip(readings, values, strict=True):
        weights = []
        for i, prompt in enumerate(reading.micro.prompts.prompts):
            y = reading.micro.completion_ids[i, : reading.micro.lengths[i]]
            ids = torch.cat([torch.tensor(prompt.token_ids), y])[None]
            start = len(prompt.token_ids) - 1
            log_p, log_q = (
                (model(ids).logits[0, start:-1].double() / 1.3).log_softmax(-1)
                for model in (module.student, teacher)
            )
            logp_y, logq_y = (x.gather(1, y[:, None])[:, 0] for x in (log_p, log_q))
            d = (logq_y - logp_y).abs().tolist()
            w = [1 + 2.0 * (1 - sum(d[:t]) / sum(d)) for t in range(len(d))]
            weights += w
            w = torch.tensor(w).double()
            if isinstance(objective, ReverseKL):
                total = total + (w * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()
            else:
                total = total - (w * (logq_y - logp_y).detach() * logp_y).sum()
        assert found["opd/token_weight"].tolist() == pytest.approx(weights, rel=1e-3)
        assert min(weights) < 1.5 < 2.9 < max(weights)
    (total / sampled.num_tokens).backward()
    for ours, parameter in zip(slopes, module.student.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=2e-3, atol=2e-5)


def test_drift_is_asked_for_where_it_is_needed_alone():
    by_drift = Weighted(PolicyGradient(), ByDrift())
    assert by_drift.needs_drift
    assert Weighted(by_drift, ByEntropy()).needs_drift
    assert Weighted(Weighted(ReverseKL(), ByEntropy()), ByDrift()).needs_drift
    assert not Weighted(PolicyGradient(), ByEntropy()).needs_drift
    assert by_drift.needs == {"teacher": "sampled"}
    for gamma in (0.0, -1.0, math.inf):
        with pytest.raises(UserError, match="must be above 0"):
            ByDrift(gamma)
    mixture = {"objective": Weighted(ReverseKL(), ByDrift()), "mixture": Mixture(0.5)}
    with pytest.raises(UserError, match="ByDrift weighs by what the student has sampled"):
        OPDModule("embedded:base", "embedded:teacher", **mixture)


def test_a_run_weighs_by_drift(fit):
    inner = ["--model.objective.objective", "opd.objectives.SampledExOPD"]
    inner += ["--model.objective.weight", "opd.objectives.ByDrift"]
    folder = fit("run", *WEIGHTED, *inner, "--model.reuse.steps", "2", steps=1)
    (row,) = [row for row in read_metrics(folder / "metrics.csv") if "opd/loss" in row]
    assert 1.1 < float(row["opd/token_weight"]) < 1.5


def test_a_run_logs_the_mean_weight(fit):
    """With an objective in an objective on the command line, and reuse of rollouts."""
    inner = ["--model.objective.objective", "opd.objectives.TopKKL"]
    inner += ["--model.objective.objective.k", "3", *ENTROPY, "--model.objective.weight.of"]
    folder = fit("run", *WEIGHTED, *inner, "teacher", "--model.reuse.steps", "2", steps=1)
    (row,) = [row for row in read_metrics(folder / "metrics.csv") if "opd/loss" in row]
    assert 0 < float(row["opd/token_weight"]) < 0.5
    assert 0 < float(row["opd/loss"]) < float(row["opd/reverse_kl"])
    assert "opd/student_mass_in_support" in row
