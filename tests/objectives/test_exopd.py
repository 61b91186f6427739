"""ExOPD in float64 against its advantage written out, and its reference in a run."""

import math

import pytest
import torch
from conftest import AUTO
from test_divergences import TOKENS, N, V, logits, softmax
from test_step import module_of, rollouts_of, step_of

from opd import stages
from opd.errors import UserError
from opd.metrics_rows import read_metrics
from opd.models import LoRA
from opd.module import OPDModule
from opd.objectives import (
    Distributions,
    ExOPD,
    PolicyGradient,
    ReverseKL,
    SampledExOPD,
    as_needed,
)
from opd.rollouts import Tokens
from opd.step import StepRequest, accumulate_gradients

EXOPD = ["--model.objective", "opd.objectives.ExOPD"]


def opinions_of(teacher: torch.Tensor, reference: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"teacher": teacher.log_softmax(-1), "reference": reference.log_softmax(-1)}


def cost(p: list[float], q: list[float], r: list[float], scale: float) -> list[float]:
    """Minus the advantage of every token."""
    log = math.log
    return [log(a) - log(c) - scale * (log(b) - log(c)) for a, b, c in zip(p, q, r, strict=True)]


def expected_cost(p: list[float], q: list[float], r: list[float], scale: float) -> float:
    return sum(a * c for a, c in zip(p, cost(p, q, r, scale), strict=True))


@pytest.mark.parametrize("scale", [0.4, 1.0, 1.25, 3.0])
def test_value_and_slope_are_those_of_the_advantage_written_out(scale):
    student, teacher, reference = logits(0), logits(1), logits(2)
    both = Distributions(student.log_softmax(-1), opinions_of(teacher, reference))
    loss, slope = ExOPD(scale).with_slope(both, TOKENS)
    h = 1e-6
    for n in range(N):
        q, r = softmax(teacher[n].tolist()), softmax(reference[n].tolist())
        p = softmax(student[n].tolist())
        assert loss[n].item() == pytest.approx(expected_cost(p, q, r, scale), rel=1e-10)
        for v in range(V):
            up, down = student[n].tolist(), student[n].tolist()
            up[v] += h
            down[v] -= h
            ends = [expected_cost(softmax(row), q, r, scale) for row in (up, down)]
            assert slope[n, v].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_closed_form_is_value_and_gradient():
    student, opinions = logits(3).requires_grad_(), opinions_of(logits(4), logits(5))
    loss = ExOPD()(student.log_softmax(-1), opinions, TOKENS)
    (slope,) = torch.autograd.grad(loss.sum(), student)
    found = ExOPD().with_slope(Distributions(student.detach().log_softmax(-1), opinions), TOKENS)
    torch.testing.assert_close(found, (loss.detach(), slope), rtol=1e-12, atol=1e-14)


def test_at_scale_1_it_is_reverse_kl_whatever_the_reference():
    both = Distributions(logits(6).log_softmax(-1), opinions_of(logits(7), logits(8)))
    found, expected = (o.with_slope(both, TOKENS) for o in (ExOPD(1.0), ReverseKL()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_the_best_student_is_the_teacher_extrapolated():
    """p = q (q/r)^(scale - 1), normalised, has no gradient, and its loss is the least."""
    teacher, reference = (logits(seed).log_softmax(-1) for seed in (9, 10))
    best = (teacher + 0.25 * (teacher - reference)).log_softmax(-1)
    opinions = {"teacher": teacher, "reference": reference}
    loss, slope = ExOPD(1.25).with_slope(Distributions(best, opinions), TOKENS)
    assert slope.abs().max() < 1e-14
    near = (best + 0.1 * logits(11)).log_softmax(-1)
    assert (loss < ExOPD(1.25)(near, opinions, TOKENS)).all()


def test_on_average_the_sampled_form_has_the_gradient_of_the_full_one():
    """Summed over all tokens with weight p(y)."""
    student = logits(12)[:1].requires_grad_()
    opinions = opinions_of(logits(13)[:1], logits(14)[:1])
    log_p, y = student.log_softmax(-1), torch.arange(V)
    everywhere = {name: opinion.expand(V, V) for name, opinion in opinions.items()}
    rule = SampledExOPD(scale=1.5)
    tokens = Tokens(y, log_p.detach()[0])
    sampled = rule(log_p.expand(V, V), as_needed(everywhere, rule.needs, y), tokens)
    (found,) = torch.autograd.grad((log_p.exp().detach()[0] * sampled).sum(), student)
    log_p = student.log_softmax(-1)
    (expected,) = torch.autograd.grad(ExOPD(1.5)(log_p, opinions, tokens).sum(), student)
    torch.testing.assert_close(found, expected)
    plain = PolicyGradient()(log_p.expand(V, V), {"teacher": everywhere["teacher"][0]}, tokens)
    at_1 = SampledExOPD(scale=1.0)(
        log_p.expand(V, V), {name: row[0] for name, row in everywhere.items()}, tokens
    )
    torch.testing.assert_close(at_1, plain)


# --- the reference --------------------------------------------------------------------------------


def test_gradient_of_a_step_is_that_of_a_plain_loop_over_three_models(tiny):
    """The reference is the student before training, and stays; so it is for further steps."""
    module = module_of(tiny, objective=ExOPD(2.0), micro_batch_tokens=60)
    reference, teacher = module.teachers.reference.model, module.teachers["default"].model
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    module.student.eval()
    rollouts = rollouts_of(module)
    values, readings = accumulate_gradients(module, stages.micro_batches(module, rollouts), True)
    found = [parameter.grad.clone() for parameter in module.student.parameters()]
    module.zero_grad()
    total = torch.zeros(())
    for i, prompt in enumerate(rollouts.prompts.prompts):
        tokens = rollouts.completion_ids[i, : rollouts.lengths[i]].tolist()
        ids, start = torch.tensor([[*prompt.token_ids, *tokens]]), len(prompt.token_ids) - 1
        log_p, log_q, log_r = (
            model(ids).logits[0, start:-1].log_softmax(-1)
            for model in (module.student, teacher, reference)
        )
        total = total + (log_p.exp() * (log_p - log_r - 2 * (log_q - log_r))).sum()
    (total / rollouts.num_tokens).backward()
    for ours, parameter in zip(found, module.student.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-6)
    assert sum(v["opd/loss"].sum() for v in values).item() == pytest.approx(total.item(), rel=1e-3)
    assert not any(p.requires_grad for p in reference.parameters())
    assert {name for reading in readings for name in reading.opinions} == {"teacher", "reference"}
    part = readings[0].select([0])
    assert stages.compare(module, part, module.objective, lambda *_: {}).total.isfinite()
    module.ledger.synchronize(module.world.sum, module.world.size)
    assert module.ledger.totals["teacher_tokens"] == 2 * rollouts.num_tokens  # two models' price


def test_scores_and_held_out_completions_look_at_the_teacher_alone(tiny):
    """To judge takes no reference: it says as much as a run of ReverseKL."""
    module, plain = module_of(tiny, objective=ExOPD()), module_of(tiny)
    scores = []
    for one in (module, plain):
        output = step_of(one, StepRequest(keep_opinions=True, held_out=0.5))
        held_out = [stages.read(one, micro) for micro in output.held_out]
        assert all(set(reading.opinions) == {"teacher"} for reading in held_out)
        for readings in (output.readings, held_out):
            scores.append(stages.judge(one, readings, "reverse_kl").values)
    for ours, theirs in zip(scores[:2], scores[2:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_is_loaded_that_no_objective_needs(tiny):
    module = module_of(tiny)
    assert module.teachers.reference is None
    with pytest.raises(UserError, match=r"model.reference x: objective ReverseKL asks no"):
        OPDModule("embedded:base", "embedded:teacher", reference="x")


def test_with_an_adapter_the_reference_is_the_base_that_is_there():
    options = {"objective": ExOPD(), "adapter": LoRA(rank=2)}
    module = OPDModule("embedded:base", "embedded:teacher", **options)
    module.configure_model()
    assert module.teachers.reference.model is module.student
    apart = OPDModule("embedded:base", "embedded:teacher", reference="embedded:teacher", **options)
    apart.configure_model()
    assert apart.teachers.reference.model is not apart.student


RUNS = {
    "plain": [],
    "auto": AUTO,
    "reuse": [*AUTO, "--model.reuse.steps", "2"],
    "offload": ["--model.teacher_offload", "true"],
    "adapter": ["--model.adapter.rank", "4", "--model.optimizer.lr", "0.01"],
}


@pytest.mark.parametrize("more", RUNS.values(), ids=RUNS)
def test_a_run_with_a_reference(fit, more):
    """Of the first step, student and reference are one: its loss is scale times the KL."""
    folder = fit("run", *EXOPD, "--model.objective.scale", "1.5", *more)
    first, second = (r for r in read_metrics(folder / "metrics.csv") if "opd/loss" in r)
    assert float(first["opd/loss"]) == pytest.approx(1.5 * float(first["opd/reverse_kl"]), rel=1e-3)
    assert float(second["opd/loss"]) != pytest.approx(1.5 * float(second["opd/reverse_kl"]))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_is_a_number_above_0(scale):
    for objective in (ExOPD, SampledExOPD):
        with pytest.raises(UserError, match="must be above 0"):
            objective(scale=scale)
