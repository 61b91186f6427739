"""What judges a candidate, against plain loops."""

import math

import pytest
import torch
from test_step import module_of, step_of

from opd.scores import TeacherKL
from opd.step import StepRequest

TEMPERATURE = 0.7


DIVERGENCES = {
    "reverse_kl": lambda log_p, log_q: log_p.exp() * (log_p - log_q),
    "forward_kl": lambda log_p, log_q: log_q.exp() * (log_q - log_p),
    "jeffreys": lambda log_p, log_q: (log_p.exp() - log_q.exp()) * (log_p - log_q),
}


def sums_of(module, micro, divergence):
    """Sums over the tokens of each completion, one unpadded row at a time.

    Of the divergence, and of how far the student is from what it was when it sampled them.
    """
    teacher = module.teachers["default"].model
    divergences, moved = [], []
    for i, prompt in enumerate(micro.prompts.prompts):
        y = micro.completion_ids[i, : micro.lengths[i]]
        ids, start = torch.cat([torch.tensor(prompt.token_ids), y])[None], len(prompt.token_ids) - 1
        with torch.no_grad():
            log_p, log_q = (
                (model(ids).logits[0, start:-1] / TEMPERATURE).log_softmax(-1)
                for model in (module.student.eval(), teacher)
            )
        divergences.append(DIVERGENCES[divergence](log_p, log_q).sum().item())
        sampled = zip(log_p.tolist(), y.tolist(), micro.engine_logprobs[i].tolist(), strict=False)
        ratios = [math.exp(row[token] - log_mu_y) for row, token, log_mu_y in sampled]
        moved.append(sum(r - 1 - math.log(r) for r in ratios))
    return divergences, moved


@pytest.mark.parametrize(
    ("rollouts", "completions", "divergence"),
    [
        ("step", 8, "reverse_kl"),
        ("part", 2, "reverse_kl"),
        ("held_out", 2, "reverse_kl"),
        ("part", 2, "forward_kl"),
        ("held_out", 2, "jeffreys"),
    ],
)
def test_teacher_kl_is_minus_the_divergence_of_each_completion(
    tiny, rollouts, completions, divergence
):
    """A lower divergence is a higher score; a mean over tokens; its tokens are counted."""
    module = module_of(tiny, rollouts_per_prompt=2, temperature=TEMPERATURE, micro_batch_tokens=60)
    score = TeacherKL(rollouts, fraction=0.25, divergence=divergence)
    output = step_of(module, score.request(), rate=30.0)
    score.prepare(module, output, seed=0)
    found = score(module)
    module.ledger.synchronize(lambda tensor: tensor, world_size=1)
    judged = [reading.micro for reading in score._readings]
    assert sum(int((micro.lengths > 0).sum()) for micro in judged) == completions
    by_hand = [
        (-kl, far)
        for micro in judged
        for kl, far, length in zip(
            *sums_of(module, micro, divergence), micro.lengths.tolist(), strict=True
        )
        if length
    ]
    expected, moved = ([one[i] for one in by_hand] for i in (0, 1))
    lengths = [length for micro in judged for length in micro.lengths.tolist() if length]
    assert found.values.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found.moved.tolist() == pytest.approx(moved, rel=1e-3, abs=1e-5)
    assert min(moved) > 0.01  # the step has moved it
    nearer = found.proximal(0.5)
    less = [a - b / 2 for a, b in zip(expected, moved, strict=True)]
    assert nearer.values.tolist() == pytest.approx(less, rel=1e-3, abs=1e-5)
    assert nearer.weights.tolist() == lengths
    assert found.weights.tolist() == lengths
    mean = found.mean(lambda tensor: tensor)
    assert mean == pytest.approx(sum(expected) / sum(lengths), rel=1e-4)
    assert mean < 0
    assert module.ledger.totals["search_tokens"] == sum(lengths)
    score.release()
    assert score._readings == []
    teacher_tokens = module.ledger.totals["teacher_tokens"]
    assert teacher_tokens == module.ledger.totals["rollout_tokens"]  # nothing is read twice


def test_a_student_nearer_to_its_teacher_scores_higher(tiny):
    module = module_of(tiny, temperature=TEMPERATURE)
    score = TeacherKL("step")
    output = step_of(module, score.request())
    score.prepare(module, output, seed=0)
    apart = score(module).mean(lambda tensor: tensor)
    module.student.load_state_dict(module.teachers["default"].model.state_dict())
    assert apart < score(module).mean(lambda tensor: tensor) == pytest.approx(0, abs=1e-6)


def test_held_out_completions_are_others_than_those_trained_on(tiny):
    module = module_of(tiny, rollouts_per_prompt=2)
    output = step_of(module, TeacherKL("held_out", fraction=0.5).request())
    trained, held_out = (
        {float(lot) for micro in part for lot in micro.columns["lot"]}
        for part in (output.micro_batches, output.held_out)
    )
    assert (len(trained), len(held_out)) == (4, 4)
    assert max(held_out) < 0.5 <= min(trained)


def test_scores_ask_for_what_they_need():
    assert TeacherKL("fresh").request() == StepRequest()
    assert TeacherKL("part", fraction=0.3).request() == StepRequest(keep_opinions=True)
    assert TeacherKL("held_out", fraction=0.3).request() == StepRequest(held_out=0.3)
