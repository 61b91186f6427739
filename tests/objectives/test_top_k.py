"""The KL of k tokens and a tail in float64, against sums over buckets that are written out."""

import math

import pytest
import torch
from test_divergences import TOKENS, N, V, kl, logits, of_logits, softmax

from opd.metrics_rows import read_metrics
from opd.objectives import Distributions, ForwardKL, ReverseKL, TopKKL

SUPPORTS = ["student", "teacher", "union", "intersection"]
DIRECTIONS = ["reverse", "forward"]


def both_of(student: torch.Tensor, teacher: torch.Tensor) -> Distributions:
    return Distributions(student.log_softmax(-1), {"teacher": teacher.log_softmax(-1)})


def likeliest(p: list[float], k: int) -> set[int]:
    return set(sorted(range(len(p)), key=lambda v: -p[v])[:k])


def chosen(p: list[float], q: list[float], support: str, k: int) -> set[int]:
    ours, theirs = likeliest(p, k), likeliest(q, k)
    sets = {"student": ours, "teacher": theirs, "union": ours | theirs}
    return {**sets, "intersection": ours & theirs}[support]


def buckets(p: list[float], inside: set[int]) -> list[float]:
    tail = [p[v] for v in range(len(p)) if v not in inside]
    return [p[v] for v in sorted(inside)] + ([sum(tail)] if tail else [])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("k", [1, 3, V - 1, V, V + 2])
def test_value_and_slope_are_those_of_the_buckets(k, support, direction):
    """The set stays what it is while a logit is moved; no gradient flows through the choice."""
    student, teacher = logits(0), logits(1)
    objective, h = TopKKL(k, support, direction), 1e-6
    loss, slope = objective.with_slope(both_of(student, teacher), TOKENS)
    for n in range(N):
        q = softmax(teacher[n].tolist())
        inside = chosen(softmax(student[n].tolist()), q, support, k)

        def kl_of(row: list[float], q=q, inside=inside) -> float:
            p = buckets(softmax(row), inside), buckets(q, inside)
            return kl(*p) if direction == "reverse" else kl(*p[::-1])

        assert loss[n].item() == pytest.approx(kl_of(student[n].tolist()), rel=1e-9, abs=1e-12)
        for v in range(V):
            up, down = student[n].tolist(), student[n].tolist()
            up[v] += h
            down[v] -= h
            expected = (kl_of(up) - kl_of(down)) / (2 * h)
            assert slope[n, v].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("k", [2, V])
def test_closed_form_is_value_and_gradient(k, support, direction):
    student, teacher = logits(2).requires_grad_(), logits(3)
    objective = TopKKL(k, support, direction)
    loss = of_logits(objective, student, teacher)
    (slope,) = torch.autograd.grad(loss.sum(), student)
    found = objective.with_slope(both_of(student.detach(), teacher), TOKENS)
    torch.testing.assert_close(found, (loss.detach(), slope), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("direction", "full"), [("reverse", ReverseKL()), ("forward", ForwardKL())]
)
@pytest.mark.parametrize("support", SUPPORTS)
def test_at_one_token_it_is_the_binary_kl_and_at_all_tokens_the_full_one(support, direction, full):
    student, teacher = logits(4), logits(5)
    both = both_of(student, teacher)
    expected = full.with_slope(both, TOKENS)
    torch.testing.assert_close(
        TopKKL(V, support, direction).with_slope(both, TOKENS), expected, rtol=1e-12, atol=1e-14
    )
    if support in ("student", "teacher"):
        loss, _ = TopKKL(1, support, direction).with_slope(both, TOKENS)
        for n in range(N):
            p, q = softmax(student[n].tolist()), softmax(teacher[n].tolist())
            (v,) = likeliest(p if support == "student" else q, 1)
            a, b = (p, q) if direction == "reverse" else (q, p)
            binary = a[v] * math.log(a[v] / b[v]) + (1 - a[v]) * math.log((1 - a[v]) / (1 - b[v]))
            assert loss[n].item() == pytest.approx(binary, rel=1e-9)
        assert (loss > 0).all()
        assert (loss < expected[0]).all()  # no more than the full KL, never below 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_where_the_two_have_no_token_in_common_nothing_is_learnt(direction):
    student = torch.tensor([[9.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 9.0]])
    objective = TopKKL(1, "intersection", direction)
    both = both_of(student.detach(), teacher)
    loss, slope = objective.with_slope(both, TOKENS[:1])
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert slope.abs().max() < 1e-6
    by_autograd = of_logits(objective, student, teacher)
    by_autograd.sum().backward()
    assert student.grad.abs().max() < 1e-6
    masses = objective.measure(both, TOKENS[:1])
    assert [mass.item() for mass in masses.values()] == [0.0, 0.0]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("support", SUPPORTS)
def test_nothing_is_nan_where_a_tail_has_hardly_any_mass(support, direction):
    student = torch.tensor([[500.0, 0.0, -500.0, -500.0]])
    teacher = torch.tensor([[-500.0, 400.0, 500.0, -500.0]])
    for k in (1, 2, 3, 4):
        objective = TopKKL(k, support, direction)
        for value in objective.with_slope(both_of(student, teacher), TOKENS[:1]):
            assert value.isfinite().all()


def test_the_mass_inside_of_the_set_is_measured():
    student, teacher = logits(6), logits(7)
    for support in SUPPORTS:
        objective = TopKKL(2, support)
        found = objective.measure(both_of(student, teacher), TOKENS)
        assert tuple(found) == objective.metrics
        for n in range(N):
            p, q = softmax(student[n].tolist()), softmax(teacher[n].tolist())
            inside = chosen(p, q, support, 2)
            for mass, of in zip(found.values(), (p, q), strict=True):
                assert mass[n].item() == pytest.approx(sum(of[v] for v in inside))


def test_a_run_logs_the_mass_inside_of_the_set(fit):
    top_k = ["--model.objective", "opd.objectives.TopKKL", "--model.objective.k", "3"]
    folder = fit("run", *top_k, "--model.objective.support", "teacher", steps=1)
    (row,) = [row for row in read_metrics(folder / "metrics.csv") if "opd/loss" in row]
    ours, theirs = (float(row[f"opd/{who}_mass_in_support"]) for who in ("student", "teacher"))
    assert 0.2 < ours < theirs < 1
