"""PPO's clipped loss against numbers worked by hand: both signs of A, in and out of the clip."""

import math

import pytest
import torch

from opd.errors import UserError
from opd.objectives import ByEntropy, ClippedPolicyGradient, Distributions, PolicyGradient, Weighted
from opd.objectives.policy_gradient import clipped_surrogate, k3
from opd.rollouts import Tokens

V = 7
Y = torch.tensor([3, 0, 6, 2])
# A, rho -> min(rho A, clip(rho, 0.8, 1.28) A), and its slope by rho
BY_HAND = [
    (2.0, 1.0, 2.0, 2.0),
    (2.0, 1.25, 2.5, 2.0),  # beyond 1.2, within 1.28
    (2.0, 1.5, 2.56, 0.0),  # clipped above
    (2.0, 0.5, 1.0, 2.0),  # never clipped below
    (-2.0, 1.0, -2.0, -2.0),
    (-2.0, 0.9, -1.8, -2.0),
    (-2.0, 0.5, -1.6, 0.0),  # clipped below
    (-2.0, 1.5, -3.0, -2.0),  # never clipped above
    (0.0, 1.5, 0.0, 0.0),
]


@pytest.mark.parametrize(("advantage", "ratio", "value", "slope"), BY_HAND)
def test_the_surrogate_by_hand(advantage, ratio, value, slope):
    rho = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    found = clipped_surrogate(rho, torch.tensor([advantage]).double(), 0.2, 0.28)
    assert found.item() == pytest.approx(value)
    assert torch.autograd.grad(found.sum(), rho)[0].item() == pytest.approx(slope)


def logits(seed: int, rows: int = len(Y)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, V, generator=generator, dtype=torch.float64)


def judged(objective, student, ratios, advantage, reference=None):
    """Loss, slope by the logits and metrics of tokens, which mu has sampled at these p / mu."""
    log_p = student.log_softmax(-1)
    logmu = log_p[torch.arange(len(Y)), Y] - torch.tensor(ratios).double().log()
    tokens = Tokens(Y, logmu, torch.tensor(advantage).double())
    both = Distributions(log_p, {} if reference is None else {"reference": reference})
    return *objective.with_slope(both, tokens), objective.measure(both, tokens)


def test_loss_slope_and_metrics_by_hand():
    """By the logits, -A rho (onehot(y) - p) where nothing is clipped, and 0 where it is."""
    student = logits(0)
    ratios, advantage = [1.25, 1.5, 0.5, 1.0], [2.0, 2.0, -2.0, -3.0]
    loss, slope, found = judged(ClippedPolicyGradient(0.2, 0.28), student, ratios, advantage)
    assert loss.tolist() == pytest.approx([-2.5, -2.56, 1.6, 3.0])
    weights = [-2.5, 0.0, 0.0, 3.0]
    p = student.softmax(-1)
    for i, weight in enumerate(weights):
        expected = [weight * ((v == Y[i]).item() - p[i, v].item()) for v in range(V)]
        assert slope[i].tolist() == pytest.approx(expected)
    assert found["rl/ratio"].tolist() == pytest.approx(ratios)
    assert found["rl/clip_fraction"].tolist() == [0, 1, 1, 0]
    symmetric = judged(ClippedPolicyGradient(), student, ratios, advantage)[2]
    assert symmetric["rl/clip_fraction"].tolist() == [1, 1, 1, 0]
    harmless = judged(ClippedPolicyGradient(), student, [0.5, 1.5, 1.5, 0.5], [1.0, -1.0, 0.0, 0.0])
    assert harmless[2]["rl/clip_fraction"].tolist() == [0] * 4
    assert "rl/kl" not in found


def test_the_penalty_is_k3_of_the_token_sampled():
    """r/p - log(r/p) - 1 at y; by the logits of p, (1 - r/p) (onehot(y) - p)."""
    student, reference = logits(1), logits(2).log_softmax(-1)
    p, rows = student.softmax(-1), torch.arange(len(Y))
    of_y = (reference.exp() / p)[rows, Y]
    arguments = student, [1.0] * 4, [0.5] * 4
    loss, slope, found = judged(ClippedPolicyGradient(kl=0.3), *arguments, reference[rows, Y])
    bare, bare_slope, _ = judged(ClippedPolicyGradient(), *arguments)
    assert of_y.sub(1).abs().max() > 0.5
    torch.testing.assert_close(found["rl/kl"], of_y - of_y.log() - 1)
    torch.testing.assert_close(loss - bare, 0.3 * (of_y - of_y.log() - 1))
    onehot = torch.nn.functional.one_hot(Y, V).double()
    torch.testing.assert_close(slope - bare_slope, 0.3 * (1 - of_y)[:, None] * (onehot - p))
    whole = judged(ClippedPolicyGradient(kl=0.3), *arguments, reference)[2]
    torch.testing.assert_close(whole["rl/kl"], found["rl/kl"])


def test_the_penalty_does_not_overflow():
    """The logarithm of r/p is kept within 20; beyond, it has no slope."""
    logp, logr = torch.zeros(2, requires_grad=True), torch.tensor([19.0, 1000.0])
    found = k3(logp.double(), logr.double())
    assert found.tolist() == pytest.approx([math.exp(19) - 20, math.exp(20) - 21])
    assert torch.autograd.grad(found.sum(), logp)[0].tolist() == pytest.approx(
        [1 - math.exp(19), 0]
    )


def test_the_penalty_is_the_kl_to_the_reference_on_average():
    student, reference = logits(3, 1).log_softmax(-1), logits(4, 1).log_softmax(-1)
    every = torch.arange(V)
    tokens = Tokens(every, student[0], torch.zeros(V).double())
    both = Distributions(student.expand(V, V), {"reference": reference.expand(V, V)})
    of_each = ClippedPolicyGradient(kl=1.0).measure(both, tokens)["rl/kl"]
    exact = (student[0].exp() * (student[0] - reference[0])).sum().item()
    assert (student[0].exp() * of_each).sum().item() == pytest.approx(exact)


def test_who_is_asked():
    assert ClippedPolicyGradient().needs == {}
    assert ClippedPolicyGradient(kl=0.1).needs == {"reference": "sampled"}
    assert ClippedPolicyGradient().ratio_of is None  # the ratio is in it
    assert Weighted(ClippedPolicyGradient(), ByEntropy()).needs_reward
    assert not Weighted(PolicyGradient(), ByEntropy()).needs_reward


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("clip_low", value) for value in (0.0, 1.1, math.nan)],
        *[("clip_high", value) for value in (0.0, math.inf)],
        *[("kl", value) for value in (-0.1, math.inf)],
    ],
)
def test_options_are_looked_at(name, value):
    with pytest.raises(UserError, match=f"ClippedPolicyGradient.{name}={value} must be"):
        ClippedPolicyGradient(**{name: value})
    ClippedPolicyGradient(clip_low=1.0, clip_high=5.0)
