"""Diagnostics against plain loops, and their reduction as (sum, count)."""

import math

import pytest
import torch

from opd.metrics import TOKEN_METRICS, StepMetrics, overlap_at_k, sampled_kl, token_metrics
from opd.objectives import Distributions
from opd.rollouts import Tokens


def logprobs(seed: int, n: int = 6, v: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, v, generator=generator, dtype=torch.float64).log_softmax(-1)


def test_overlap_against_sets():
    log_p, log_q = logprobs(0), logprobs(1)
    share, advantage = overlap_at_k(log_p, log_q, 16)
    for n in range(len(log_p)):
        p, q = log_p[n].tolist(), log_q[n].tolist()
        top_p = set(sorted(range(40), key=lambda v: -p[v])[:16])
        top_q = set(sorted(range(40), key=lambda v: -q[v])[:16])
        shared = top_p & top_q
        assert share[n].item() == pytest.approx(len(shared) / 16)
        mass_p, mass_q = (sum(math.exp(x[v]) for v in shared) for x in (p, q))
        expected = sum(
            math.exp(p[v]) / mass_p * ((q[v] - math.log(mass_q)) - (p[v] - math.log(mass_p)))
            for v in shared
        )
        assert advantage[n].item() == pytest.approx(expected)


def test_how_far_a_student_has_moved_is_a_kl_on_average():
    """Over the tokens that mu samples: sum over v of mu(v) (log mu(v) - log p(v))."""
    log_mu, log_p = logprobs(2), logprobs(3)
    for mu, p in zip(log_mu, log_p, strict=True):
        of_each = sampled_kl(p, mu)
        assert of_each.min() >= 0
        mean = sum(mu[v].exp().item() * of_each[v].item() for v in range(40))
        exact = sum(mu[v].exp().item() * (mu[v] - p[v]).item() for v in range(40))
        assert mean == pytest.approx(exact)
    assert sampled_kl(log_p, log_p).abs().max() == 0


def test_no_overlap_is_no_advantage():
    log_p = torch.tensor([[5.0, 4.0, 0.0, 0.0]]).log_softmax(-1)
    log_q = torch.tensor([[0.0, 0.0, 5.0, 4.0]]).log_softmax(-1)
    share, advantage = overlap_at_k(log_p, log_q, 2)
    assert share.item() == 0
    assert advantage.item() == 0


def test_every_metric_of_a_token_is_its_definition():
    """p = (1/2, 1/4, 1/4), q = (1/8, 1/8, 3/4), mu(y) = 1/3, y = 1: worked out by hand, in nats."""
    log_p = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    log_q = torch.tensor([[0.125, 0.125, 0.75]], dtype=torch.float64).log()
    tokens = Tokens(torch.tensor([1]), torch.tensor([1 / 3], dtype=torch.float64).log())
    ln2, ln3 = math.log(2), math.log(3)
    expected = {
        "opd/reverse_kl": ln2 + 0.25 * ln2 - 0.25 * ln3,
        "opd/forward_kl": 0.125 * -2 * ln2 + 0.125 * -ln2 + 0.75 * ln3,
        "opd/kl_above_5": 0.0,
        "opd/student_entropy": 1.5 * ln2,
        "opd/teacher_entropy": 0.25 * 3 * ln2 + 0.75 * (2 * ln2 - ln3),
        "opd/entropy_gap": 1.5 * ln2 - (0.75 * ln2 + 0.75 * (2 * ln2 - ln3)),
        "opd/overlap_at_16": 1.0,
        "opd/overlap_advantage": -(1.25 * ln2 - 0.25 * ln3),
        "opd/teacher_logprob": -3 * ln2,
        "rollout/engine_logprob_gap": 2 * ln2 - ln3,
    }
    expected["opd/entropy_gap"] = abs(expected["opd/entropy_gap"])
    ours = token_metrics(Distributions(log_p, {"teacher": log_q}), tokens)
    assert set(expected) == set(TOKEN_METRICS)
    assert {name: value.item() for name, value in ours.items()} == pytest.approx(expected)


def test_forward_and_reverse_kl_are_not_exchanged():
    """The student is sure of token 0, where the teacher wavers."""
    log_p = torch.tensor([[1 - 1e-3, 1e-3]], dtype=torch.float64).log()
    log_q = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    tokens = Tokens(torch.tensor([0]), torch.zeros(1, dtype=torch.float64))
    values = token_metrics(Distributions(log_p, {"teacher": log_q}), tokens)
    assert values["opd/reverse_kl"].item() == pytest.approx(math.log(2), abs=0.01)
    assert values["opd/forward_kl"].item() == pytest.approx(
        0.5 * math.log(1e3) - math.log(2), abs=0.01
    )


@pytest.mark.parametrize(("kl", "above"), [(4.99, 0), (5.01, 1)])
def test_a_token_is_far_from_the_teacher_above_five_nats(kl, above):
    """A student that is sure of a token to which its teacher gives exp(-kl)."""
    log_p = torch.tensor([[0.0, -1e9]])
    log_q = torch.tensor([[-kl, math.log1p(-math.exp(-kl))]])
    tokens = Tokens(torch.tensor([0]), torch.zeros(1))
    values = token_metrics(Distributions(log_p, {"teacher": log_q}), tokens)
    assert values["opd/reverse_kl"].item() == pytest.approx(kl)
    assert values["opd/kl_above_5"].item() == above


def test_a_student_equal_to_its_teacher_has_no_gap():
    log_p = logprobs(2)
    own = log_p.gather(1, torch.arange(6)[:, None]).squeeze(1)
    values = token_metrics(Distributions(log_p, {"teacher": log_p}), Tokens(torch.arange(6), own))
    zero = ("opd/reverse_kl", "opd/forward_kl", "opd/entropy_gap", "rollout/engine_logprob_gap")
    for name in zero:
        assert values[name].abs().max().item() == pytest.approx(0, abs=1e-12)
    assert (values["opd/overlap_at_16"] == 1).all()
    torch.testing.assert_close(values["opd/teacher_logprob"], own)


def test_metrics_are_means_of_all_values_not_means_of_means():
    metrics = StepMetrics(["a", "b"], ["s"], ["m"])
    first = {"a": torch.tensor([1.0]), "m": torch.tensor([3.0, 9.0]), "s": torch.tensor([2.0])}
    metrics.update(first)
    metrics.update({"a": torch.tensor([2.0, 3.0, 6.0]), "m": torch.tensor([4.0])})
    metrics.update({"s": torch.tensor([3.0, 4.0])})
    assert metrics.compute() == {"a": 3.0, "s": 9.0, "m": 9.0}
    metrics.reset()
    assert metrics.compute() == {}


def test_metrics_of_a_group_are_those_of_its_members():
    metrics = StepMetrics(["a"], ["s"], ["m"], groups=["data/x", "data/y", "data/none"])
    of_x = torch.tensor([True, False, True])
    members = {"data/x": of_x, "data/y": ~of_x, "data/none": torch.zeros(3, dtype=torch.bool)}
    values = torch.tensor([1.0, 5.0, 3.0])
    metrics.update({"a": values, "s": values, "m": values}, members)
    y_only = {"data/y": torch.ones(1, dtype=torch.bool)}
    metrics.update({name: torch.tensor([9.0]) for name in "asm"}, y_only)
    assert metrics.compute() == {
        **{"a": 4.5, "s": 18.0, "m": 9.0},
        **{"a/data/x": 2.0, "s/data/x": 4.0, "m/data/x": 3.0},
        **{"a/data/y": 7.0, "s/data/y": 14.0, "m/data/y": 9.0},
    }
