"""Divergences and their gradients in float64 against definitions written out with plain sums."""

import math

import pytest
import torch

from opd.objectives import Distributions, ForwardKL, GeneralizedJSD, ReverseKL, SkewKL
from opd.rollouts import Tokens

N, V = 5, 7
TOKENS = Tokens(torch.zeros(N, dtype=torch.long), torch.zeros(N, dtype=torch.float64))


def logits(seed: int) -> torch.Tensor:
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_logits(objective, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return objective(student.log_softmax(-1), {"teacher": teacher.log_softmax(-1)}, TOKENS)


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(x) for x in row]
    return [x / sum(exps) for x in exps]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def jsd(p: list[float], q: list[float], beta: float) -> float:
    m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def skew(p: list[float], q: list[float], alpha: float) -> float:
    return kl(p, [alpha * a + (1 - alpha) * b for a, b in zip(p, q, strict=True)])


DEFINITIONS = [
    (ReverseKL(), lambda p, q: kl(p, q)),
    (ForwardKL(), lambda p, q: kl(q, p)),
    (GeneralizedJSD(0.25), lambda p, q: jsd(p, q, 0.25)),
    (GeneralizedJSD(0.9), lambda p, q: jsd(p, q, 0.9)),
    (SkewKL(), lambda p, q: skew(p, q, 0.1)),
    (SkewKL(0.7, "forward"), lambda p, q: skew(q, p, 0.7)),
]


@pytest.mark.parametrize(("objective", "definition"), DEFINITIONS)
def test_value_is_the_definition(objective, definition):
    student, teacher = logits(0), logits(1)
    ours = of_logits(objective, student, teacher)
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    expected = [definition(softmax(s), softmax(t)) for s, t in rows]
    assert ours.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("objective", "definition"), DEFINITIONS)
def test_gradient_is_the_definitions_slope(objective, definition):
    student, teacher = logits(0).requires_grad_(), logits(1)
    objective(
        student.log_softmax(-1), {"teacher": teacher.log_softmax(-1)}, TOKENS
    ).sum().backward()
    h = 1e-6
    for n in range(N):
        q = softmax(teacher[n].tolist())
        for v in range(V):
            up, down = student[n].tolist(), student[n].tolist()
            up[v] += h
            down[v] -= h
            slope = (definition(softmax(up), q) - definition(softmax(down), q)) / (2 * h)
            assert student.grad[n, v].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_reverse_kl_has_the_closed_form_gradient():
    """p (log p - log q - KL), with respect to the student's logits."""
    student, teacher = logits(2).requires_grad_(), logits(3)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    value = ReverseKL()(log_p, {"teacher": log_q}, TOKENS)
    value.sum().backward()
    with torch.no_grad():
        expected = log_p.exp() * (log_p - log_q - value[:, None])
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-14)


def test_forward_kl_has_the_closed_form_gradient():
    """p - q, with respect to the student's logits."""
    student, teacher = logits(2).requires_grad_(), logits(3)
    ForwardKL()(
        student.log_softmax(-1), {"teacher": teacher.log_softmax(-1)}, TOKENS
    ).sum().backward()
    expected = student.detach().softmax(-1) - teacher.softmax(-1)
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("beta", "limit", "scale"), [(1e-7, ForwardKL(), 1e-7), (1 - 1e-7, ReverseKL(), 1e-7)]
)
def test_jsd_tends_to_the_two_kls(beta, limit, scale):
    log_p, log_q = logits(4).log_softmax(-1), logits(5).log_softmax(-1)
    ratio = GeneralizedJSD(beta)(log_p, {"teacher": log_q}, TOKENS) / scale
    torch.testing.assert_close(
        ratio, limit(log_p, {"teacher": log_q}, TOKENS), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(("objective", "definition"), DEFINITIONS)
def test_closed_form_is_value_and_gradient(objective, definition):
    student, teacher = logits(6).requires_grad_(), logits(7)
    loss = of_logits(objective, student, teacher)
    (slope,) = torch.autograd.grad(loss.sum(), student)
    both = Distributions(student.detach().log_softmax(-1), {"teacher": teacher.log_softmax(-1)})
    found = objective.with_slope(both, TOKENS)
    torch.testing.assert_close(found, (loss.detach(), slope), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("direction", "limit"), [("reverse", ReverseKL()), ("forward", ForwardKL())]
)
def test_skew_kl_tends_to_the_two_kls(direction, limit):
    student, teacher = logits(4), logits(5)
    both = Distributions(student.log_softmax(-1), {"teacher": teacher.log_softmax(-1)})
    near, far = (SkewKL(alpha, direction).with_slope(both, TOKENS) for alpha in (1e-8, 0.3))
    expected = limit.with_slope(both, TOKENS)
    torch.testing.assert_close(near, expected, rtol=1e-4, atol=1e-6)
    assert (far[0] < expected[0]).all()


def test_skew_kl_is_finite_where_the_teacher_excludes_what_the_student_says():
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -1e9]])
    both = Distributions(student.log_softmax(-1), {"teacher": teacher.log_softmax(-1)})
    for direction in ("reverse", "forward"):
        loss, slope = SkewKL(0.1, direction).with_slope(both, TOKENS[:1])
        assert 0 < loss.item() < -math.log(0.1)
        assert slope.isfinite().all()


def test_entropy_of_a_uniform_distribution_is_log_v():
    uniform = Distributions(torch.zeros(1, V).log_softmax(-1), {})
    assert uniform.student_entropy.item() == pytest.approx(math.log(V))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_jsd_refuses_its_limits(beta):
    with pytest.raises(ValueError, match="between 0 and 1"):
        GeneralizedJSD(beta)
    with pytest.raises(ValueError, match="between 0 and 1"):
        SkewKL(beta)
