"""The sampled-token form against the paper's formulas, written out token by token."""

import math

import pytest
import torch

from opd.objectives import FixedNegativeAdvantage, PolicyGradient, as_needed, reverse_kl
from opd.objectives.policy_gradient import policy_gradient_loss
from opd.rollouts import Tokens


def objective(loss, log_p, log_q, tokens, logmu):
    opinions = as_needed({"teacher": log_q}, loss.needs, tokens)
    assert opinions["teacher"].ndim == 1  # one number of the teacher per token is all it needs
    return loss(log_p, opinions, Tokens(tokens, logmu))


def written_out(logp, logp_old, advantage, clip=0.2, dual_clip=3.0):
    rho = math.exp(min(max(logp - logp_old, -20), 20))
    clipped = min(max(rho, 1 - clip), 1 + clip)
    surrogate = min(rho * advantage, clipped * advantage)
    if advantage < 0:
        surrogate = max(surrogate, dual_clip * advantage)
    return -surrogate


@pytest.mark.parametrize("advantage", [-2.0, -0.1, 0.0, 0.3, 5.0])
@pytest.mark.parametrize("logp_old", [-30.0, -3.0, -1.1, -1.0, -0.9, -0.05])
def test_surrogate_is_the_published_one(advantage, logp_old):
    logp = torch.tensor([-1.0], dtype=torch.float64)
    loss = policy_gradient_loss(logp, torch.tensor([logp_old]).double(), torch.tensor([advantage]))
    assert loss.item() == pytest.approx(written_out(-1.0, logp_old, advantage), rel=1e-6)


@pytest.mark.parametrize(("logp_old", "ratio"), [(-3.0, 2.0), (-31.0, 20.0), (19.5, -20.0)])
def test_logarithm_of_the_ratio_is_kept_within_20(logp_old, ratio):
    """So wide a clip and dual clip that nothing else bounds the loss, -rho A."""
    logp, old = torch.tensor([-1.0]).double(), torch.tensor([logp_old]).double()
    options = {"clip": 1e12, "dual_clip": 1e12}
    loss = policy_gradient_loss(logp, old, torch.tensor([-2.0]).double(), **options)
    assert loss.item() == pytest.approx(2 * math.exp(ratio))


def test_gradient_is_minus_advantage_times_score():
    """sum_t (log p(y_t) - log q(y_t)) grad log p(y_t), 2605.11739 section 2."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    log_q = torch.randn(6, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    tokens = torch.randint(9, (6,), generator=generator)
    log_p = student.log_softmax(-1)
    logmu = log_p.detach().gather(1, tokens[:, None]).squeeze(1)
    (ours,) = torch.autograd.grad(
        objective(PolicyGradient(), log_p, log_q, tokens, logmu).sum(), student, retain_graph=True
    )
    rows = torch.arange(6)
    cost = (log_p - log_q)[rows, tokens].detach()
    (expected,) = torch.autograd.grad((cost * log_p[rows, tokens]).sum(), student)
    torch.testing.assert_close(ours, expected)


def test_gradient_is_that_of_reverse_kl_on_average():
    """Summed over all tokens with weight p(y), the sampled-token gradient is the full one."""
    student = torch.randn(1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_q = torch.randn(1, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    student.requires_grad_()
    log_q = log_q.log_softmax(-1)
    log_p = student.log_softmax(-1)
    tokens, everywhere = torch.arange(5), (log_p.expand(5, 5), log_q.expand(5, 5))
    logmu = log_p.detach()[0]
    losses = objective(PolicyGradient(), *everywhere, tokens, logmu)
    loss = (log_p.exp().detach()[0] * losses).sum()
    (sampled,) = torch.autograd.grad(loss, student, retain_graph=True)
    (full,) = torch.autograd.grad(reverse_kl(log_p, log_q).sum(), student)
    torch.testing.assert_close(sampled, full)


@pytest.mark.parametrize(("logmu", "weight"), [(-1.0, 1.0), (-1.5, math.exp(0.5)), (-9.0, 5.0)])
def test_importance_weight_is_capped(logmu, weight):
    log_p = torch.tensor([[-1.0, math.log(1 - math.exp(-1.0))]], dtype=torch.float64)
    log_q = torch.tensor([[-2.0, math.log(1 - math.exp(-2.0))]], dtype=torch.float64)
    arguments = (log_p, log_q, torch.tensor([0]), torch.tensor([logmu], dtype=torch.float64))
    plain = objective(PolicyGradient(importance_cap=None), *arguments)
    assert (objective(PolicyGradient(), *arguments) / plain).item() == pytest.approx(weight)


def suppressed(objective, student: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return objective(student.log_softmax(-1), {}, Tokens(y, torch.zeros(len(y)).double()))


def test_a_fixed_negative_advantage_pushes_unlikely_tokens_down_and_no_others():
    """By the logits: 0.3 (onehot(y) - p) where p(y) < 0.2, else 0; no teacher is asked."""
    rule = FixedNegativeAdvantage(advantage=-0.3, below=0.2)
    assert rule.needs == {}
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(40, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(6, (40,), generator=generator)
    loss = suppressed(rule, student, y)
    (found,) = torch.autograd.grad(loss.sum(), student)
    both = set()
    for row, token, value, gradient in zip(student.tolist(), y.tolist(), loss, found, strict=True):
        exps = [math.exp(logit) for logit in row]
        p = [e / sum(exps) for e in exps]
        weight = 0.3 if p[token] < 0.2 else 0.0
        both.add(weight)
        expected = [weight * ((v == token) - p[v]) for v in range(6)]
        assert gradient.tolist() == pytest.approx(expected, abs=1e-12)
        assert value.item() == pytest.approx(weight)
    assert both == {0.0, 0.3}


def test_on_average_a_fixed_negative_advantage_takes_mass_from_all_unlikely_tokens():
    """Summed over y with weight p(y), the gradient is 0.5 grad sum of p(y) where p(y) < 0.3."""
    student = torch.randn(1, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    student.requires_grad_()
    p = student.softmax(-1)[0]
    losses = suppressed(FixedNegativeAdvantage(below=0.3), student.expand(7, 7), torch.arange(7))
    average = (p.detach() * losses).sum()
    (found,) = torch.autograd.grad(average, student, retain_graph=True)
    (expected,) = torch.autograd.grad(0.5 * p[p < 0.3].sum(), student)
    assert 0 < (p < 0.3).sum() < 7
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"advantage": 0.5}, {"below": 0.0}, {"below": 1.5}])
def test_a_fixed_negative_advantage_is_negative_and_of_a_probability(options):
    with pytest.raises(ValueError, match="the first must be below 0"):
        FixedNegativeAdvantage(**options)
