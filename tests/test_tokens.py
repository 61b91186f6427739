"""compare() on tiles against full-width arrays, written out and differentiated by autograd."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import peak_memory
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from opd.metrics import TOKEN_METRICS, token_metrics
from opd.models import LoRA, load_model
from opd.objectives import (
    Distributions,
    ForwardKL,
    GeneralizedJSD,
    PolicyGradient,
    ReverseKL,
    SkewKL,
    TopKKL,
)
from opd.prompts import Prompt, PromptBatch
from opd.rollouts import Rollouts
from opd.teachers import LocalTeacher, Teachers
from opd.teachers.local import BaseTeacher
from opd.tokens import compare

OBJECTIVES = [ReverseKL(), ForwardKL(), GeneralizedJSD(0.25), PolicyGradient()]
OBJECTIVES += [SkewKL(0.25), TopKKL(3, "union", "forward")]
LENGTHS, PROMPTS, TEMPERATURE = [5, 2, 7, 0], [3, 1, 4, 2], 1.7


def rollouts(vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        Prompt(i, tuple(torch.randint(3, vocabulary, (n,), generator=generator).tolist()))
        for i, n in enumerate(PROMPTS)
    ]
    ids = torch.randint(3, vocabulary, (4, max(LENGTHS)), generator=generator)
    lengths = torch.tensor(LENGTHS)
    batch = PromptBatch.collate(prompts, pad_id=0)
    logmu = -torch.rand(4, max(LENGTHS), generator=generator)
    return Rollouts(batch, ids, lengths, torch.ones(4, dtype=torch.bool), logmu)


def models(tiny, family):
    if family == "embedded":
        return load_model("embedded:base").eval(), load_model("embedded:teacher").eval()
    return tuple(
        load_model(str(tiny / f"{family}-{role}")).eval() for role in ("student", "teacher")
    )


def run(student, teacher, micro, objective, measure=token_metrics, **options):
    vocabulary = student.get_output_embeddings().out_features
    reader = LocalTeacher(teacher, vocabulary=vocabulary, temperature=TEMPERATURE)
    opinions = {"teacher": reader.read(micro)}
    options = {"vocabulary": vocabulary, "temperature": TEMPERATURE, **options}
    return compare(student, micro, opinions, objective, measure, **options)


def gradients(model):
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def assert_close(ours, expected):
    """Equal to float32 rounding, which is relative to a tensor's largest number."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * scale + 1e-7)


def binned_kl(p, q, ids):
    tail = [v for v in range(len(p)) if v not in ids]
    p, q = (torch.cat([x[ids], x[tail].sum()[None]]) for x in (p, q))
    return (p * (p / q).log()).sum()


def written_out(student, teacher, micro, objective):
    """Loss of each token, one completion at a time, without padding or tiles; definitions."""
    losses = []
    for i, prompt in enumerate(micro.prompts.prompts):
        y = micro.completion_ids[i, : LENGTHS[i]]
        ids, start = torch.cat([torch.tensor(prompt.token_ids), y])[None], PROMPTS[i] - 1
        log_p, log_q = (
            (model(ids).logits[0, start : start + len(y)] / TEMPERATURE).log_softmax(-1)
            for model in (student, teacher)
        )
        log_q = log_q.detach()
        p, q = log_p.exp(), log_q.exp()
        logp_y, logq_y = (x.gather(1, y[:, None])[:, 0] for x in (log_p, log_q))
        if isinstance(objective, ReverseKL):
            loss = (p * (log_p - log_q)).sum(-1)
        elif isinstance(objective, ForwardKL):
            loss = (q * (log_q - log_p)).sum(-1)
        elif isinstance(objective, GeneralizedJSD):
            m = 0.25 * q + 0.75 * p
            loss = 0.25 * (q * (log_q - m.log())).sum(-1) + 0.75 * (p * (log_p - m.log())).sum(-1)
        elif isinstance(objective, SkewKL):
            loss = (p * (log_p - (0.25 * p + 0.75 * q).log())).sum(-1)
        elif isinstance(objective, TopKKL):
            tops = torch.cat([p.topk(3).indices, q.topk(3).indices], dim=1).tolist()
            sets = [sorted(set(top)) for top in tops]
            rows = [binned_kl(q[n], p[n], ids) for n, ids in enumerate(sets)]
            loss = torch.stack(rows) if rows else p.sum(-1)
        else:
            ratio = (logp_y - micro.engine_logprobs[i, : len(y)]).exp().clamp(max=5).detach()
            loss = -ratio * (logq_y - logp_y).detach() * (logp_y - logp_y.detach()).exp()
        losses.append(loss)
    return torch.cat(losses)


@pytest.mark.parametrize("tile", [1, 4, 100])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("family", ["embedded", "llama", "gpt2"])
def test_loss_and_gradient_are_those_of_the_definition_at_full_width(tiny, family, objective, tile):
    student, teacher = models(tiny, family)
    micro = rollouts(student.get_output_embeddings().out_features)
    expected = written_out(student, teacher, micro, objective)
    expected.sum().backward()
    slopes = gradients(student)
    compared = run(student, teacher, micro, objective, tile=tile)
    (compared.total * 3.0).backward()  # the factor of the step goes through
    torch.testing.assert_close(compared.total, expected.sum(), rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(compared.values["opd/loss"], expected, rtol=1e-4, atol=1e-5)
    for ours, slope in zip(gradients(student), slopes, strict=True):
        assert_close(ours, 3.0 * slope)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize("family", ["llama-student", "gpt2-student"])
def test_loss_and_gradient_of_an_adapter_with_its_base_as_teacher(tiny, family, targets):
    """The student is its own teacher, the adapter off; a head's adapter has its gradient too."""
    if family == "gpt2-student" and isinstance(targets, list):
        targets = ["c_attn", "lm_head"]
    source = str(tiny / family)
    student = load_model(source, adapter=LoRA(rank=2, targets=targets)).eval()
    torch.manual_seed(0)
    trained = [p for p in student.parameters() if p.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.2)
    size = student.get_output_embeddings().out_features
    micro = rollouts(size)
    expected = written_out(student, load_model(source).eval(), micro, ReverseKL())
    assert expected.mean() > 0.003
    slopes = torch.autograd.grad(expected.sum(), trained)
    base = BaseTeacher(student, vocabulary=size, temperature=TEMPERATURE)
    options = {"vocabulary": size, "temperature": TEMPERATURE}
    opinions = {"teacher": base.read(micro)}
    compared = compare(student, micro, opinions, ReverseKL(), token_metrics, **options)
    torch.testing.assert_close(compared.values["opd/loss"], expected, rtol=1e-4, atol=1e-5)
    for ours, slope in zip(torch.autograd.grad(compared.total, trained), slopes, strict=True):
        assert_close(ours, slope)


def test_a_teacher_that_knows_more_reads_its_own_prompt(tiny):
    """Against the definition: the same completion after another prompt, in the teacher only."""
    student, teacher = models(tiny, "llama")
    micro = rollouts(student.get_output_embeddings().out_features)
    more = {0: (9, 8, 7, 6, 5), 3: (4,)}  # longer than what the student reads, and shorter
    theirs = [replace(p, teacher_ids=more.get(i)) for i, p in enumerate(micro.prompts.prompts)]
    informed = replace(micro, prompts=replace(micro.prompts, prompts=theirs))
    size = student.get_output_embeddings().out_features
    reader = LocalTeacher(teacher, vocabulary=size, temperature=TEMPERATURE)
    teachers = Teachers({"default": reader}, size, reference=reader)
    opinions = teachers.read(informed, reference=True)
    options = {"vocabulary": size, "temperature": TEMPERATURE}
    found = compare(student, informed, opinions, ReverseKL(), token_metrics, **options)
    found = found.values["opd/loss"]
    plainly = {"teacher": opinions["reference"]}
    by_reference = compare(student, informed, plainly, ReverseKL(), token_metrics, **options)
    losses = []
    for i, prompt in enumerate(theirs):
        y = micro.completion_ids[i, : LENGTHS[i]]
        log_p, log_q = (
            (model(torch.cat([torch.tensor(read), y])[None]).logits[0] / TEMPERATURE).log_softmax(
                -1
            )[len(read) - 1 : len(read) - 1 + len(y)]
            for model, read in (
                (student, prompt.token_ids),
                (teacher, prompt.teacher_ids or prompt.token_ids),
            )
        )
        losses.append((log_p.exp() * (log_p - log_q)).sum(-1))
    torch.testing.assert_close(found, torch.cat(losses), rtol=1e-4, atol=1e-5)
    plain = run(student, teacher, micro, ReverseKL()).values["opd/loss"]
    same = [i not in more for i, length in enumerate(LENGTHS) for _ in range(length)]
    torch.testing.assert_close(plain[torch.tensor(same)], found[torch.tensor(same)])
    torch.testing.assert_close(by_reference.values["opd/loss"], plain)
    assert not torch.allclose(plain[:5], found[:5])


def test_values_do_not_depend_on_the_tile(tiny):
    student, teacher = models(tiny, "llama")
    micro = rollouts(student.get_output_embeddings().out_features)
    whole = run(student, teacher, micro, ReverseKL()).values
    assert set(whole) == {*TOKEN_METRICS, "opd/loss"}
    for tile in (1, 3, 13):
        values = run(student, teacher, micro, ReverseKL(), tile=tile).values
        for name, value in whole.items():
            assert value.shape == (sum(LENGTHS),)
            torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-5)


def test_without_an_objective_there_is_no_gradient_and_no_loss(tiny):
    student, teacher = models(tiny, "llama")
    compared = run(student, teacher, rollouts(250), None)
    assert not compared.total.requires_grad
    assert compared.total.item() == 0
    assert set(compared.values) == set(TOKEN_METRICS)


def test_a_micro_batch_without_tokens_gives_zero_gradients_to_all_that_is_trained(tiny):
    student, teacher = models(tiny, "llama")
    empty = rollouts(250).placeholder(None)
    compared = run(student, teacher, empty, ReverseKL())
    compared.total.backward()
    slopes = gradients(student)
    assert slopes
    assert all(slope is not None and not slope.any() for slope in slopes)
    assert {value.shape for value in compared.values.values()} == {(0,)}


class Products(TorchDispatchMode):
    """Counts what is added up to the gradient of a head."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.addmm_.default
        return function(*args, **(kwargs or {}))


def test_no_gradient_is_formed_for_a_frozen_head():
    student, teacher = models(None, "embedded")
    head = student.get_output_embeddings()
    products = []
    for trained in (True, False):
        head.weight.requires_grad_(trained)
        with Products() as counted:
            run(student, teacher, rollouts(18), ReverseKL(), tile=3).total.backward()
        products.append(counted.count)
    assert products == [5, 0]  # of 14 tokens in tiles of 3
    head.weight.grad = None
    run(student, teacher, rollouts(18), ReverseKL(), tile=3).total.backward()
    assert head.weight.grad is None
    assert student.get_input_embeddings().weight.grad.any()


def test_padding_of_the_larger_vocabulary_is_left_out(tiny):
    """With whatever weights it has; and its rows of the head get no gradient."""
    student, teacher = models(tiny, "gpt2")
    size = student.get_output_embeddings().out_features
    micro = rollouts(size)
    expected = run(student, teacher, micro, ReverseKL(), vocabulary=size)
    expected.total.backward()
    slope = gradients(student)[0][:size]
    student, teacher = models(tiny, "gpt2")
    for model in (student, teacher):
        model.resize_token_embeddings(size + 32, mean_resizing=False)
        with torch.no_grad():
            model.get_output_embeddings().weight[size:] = 3.0
    reader = LocalTeacher(teacher, vocabulary=size, temperature=TEMPERATURE)
    opinions = {"teacher": reader.read(micro)}
    options = {"vocabulary": size, "temperature": TEMPERATURE, "tile": 4}
    padded = compare(student, micro, opinions, ReverseKL(), token_metrics, **options)
    padded.total.backward()
    torch.testing.assert_close(padded.total, expected.total)
    ours = student.get_output_embeddings().weight.grad
    torch.testing.assert_close(ours[:size], slope, rtol=1e-4, atol=1e-6)
    assert not ours[size:].any()


def test_bias_soft_cap_and_scale_of_a_head_are_honoured():
    """Logits 2 * 5 tanh((h W^T + b) / 5): gradients as autograd takes them at full width."""
    student, teacher = models(None, "embedded")
    head = student.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 18))
    student.config.final_logit_softcapping, student.config.logit_scale = 5.0, 2.0
    micro = rollouts(18)
    ids, mask, predicts = micro.inputs()
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    hidden = student.model(input_ids=ids, attention_mask=mask, position_ids=positions)
    product = F.linear(hidden.last_hidden_state[predicts], head.weight, head.bias)
    log_p = (2 * 5 * torch.tanh(product / 5) / TEMPERATURE).log_softmax(-1)
    hidden = teacher.model(input_ids=ids, attention_mask=mask, position_ids=positions)
    logits = F.linear(hidden.last_hidden_state[predicts], teacher.lm_head.weight)
    log_q = (logits / TEMPERATURE).log_softmax(-1).detach()
    (log_p.exp() * (log_p - log_q)).sum().backward()
    expected = gradients(student)
    run(student, teacher, micro, ReverseKL(), tile=4).total.backward()
    ours = gradients(student)
    assert ours[-1].shape == (18,)
    for left, right in zip(ours, expected, strict=True):
        assert_close(left, right)


def test_a_weight_of_a_completion_multiplies_the_loss_of_its_tokens(tiny):
    student, teacher = models(tiny, "llama")
    micro = rollouts(250)
    plain = micro.spread(run(student, teacher, micro, ReverseKL()).values["opd/loss"]).sum(1)
    micro.columns["weight"] = torch.tensor([1.0, 0.0, 2.5, 7.0])
    weighted = run(student, teacher, micro, ReverseKL(), tile=3)
    expected = plain[0] + 2.5 * plain[2]
    torch.testing.assert_close(weighted.total.detach(), expected, rtol=1e-5, atol=1e-6)


@dataclass
class OnlySampled:
    """The opinion of a teacher that tells log q(y) alone."""

    logq_y: torch.Tensor
    gives = "sampled"

    def opened(self):
        return nullcontext(lambda rows: self.logq_y[rows])


def test_a_teacher_of_sampled_tokens_is_enough_for_the_policy_gradient(tiny):
    student, teacher = models(tiny, "llama")
    micro = rollouts(250)
    full = run(student, teacher, micro, PolicyGradient(), tile=3)
    full.total.backward()
    expected = gradients(student)
    opinions = {"teacher": OnlySampled(full.values["opd/teacher_logprob"])}
    options = {"vocabulary": 300, "temperature": TEMPERATURE, "tile": 4}
    options["vocabulary"] = student.get_output_embeddings().out_features
    sampled = compare(student, micro, opinions, PolicyGradient(), token_metrics, **options)
    sampled.total.backward()
    for ours, slope in zip(gradients(student), expected, strict=True):
        torch.testing.assert_close(ours, slope, rtol=1e-5, atol=1e-7)
    kept = ("opd/student_entropy", "opd/teacher_logprob", "rollout/engine_logprob_gap", "opd/loss")
    assert set(sampled.values) == set(kept)  # what cannot be told is left out
    for name in kept:
        torch.testing.assert_close(sampled.values[name], full.values[name])


def test_an_opinion_of_some_completions_is_that_part_of_it(tiny):
    student, teacher = models(tiny, "llama")
    micro = rollouts(250)
    whole = micro.spread(run(student, teacher, micro, None).values["opd/reverse_kl"])
    vocabulary = student.get_output_embeddings().out_features
    reader = LocalTeacher(teacher, vocabulary=vocabulary, temperature=TEMPERATURE)
    rows = [2, 0]
    opinions = {"teacher": reader.read(micro).select(rows)}
    options = {"vocabulary": vocabulary, "temperature": TEMPERATURE}
    part = compare(student, micro.select(rows), opinions, None, token_metrics, **options)
    expected = [*whole[2, :7].tolist(), *whole[0, :5].tolist()]
    assert part.values["opd/reverse_kl"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_no_array_as_wide_as_the_vocabulary_is_as_long_as_the_micro_batch(objective):
    """[N, V] is 8 MiB here. In tiles of a sixteenth, less than one such array is held at once."""
    tokens, vocabulary, width = 512, 4096, 32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    student, teacher = (
        torch.randn(vocabulary, width, generator=generator, requires_grad=i == 0) for i in (0, 1)
    )
    whole = tokens * vocabulary * 4
    tiled = peak_memory(lambda: tiled_loss(hidden, student, teacher, objective, 32).backward())
    slopes = [hidden.grad, student.grad]
    hidden.grad = student.grad = None
    full = peak_memory(lambda: full_loss(hidden, student, teacher, objective).backward())
    for ours, expected in zip(slopes, [hidden.grad, student.grad], strict=True):
        assert_close(ours, expected)
    print(f"{type(objective).__name__}: {full / whole:.1f} -> {tiled / whole:.2f} times [N, V]")
    assert tiled < whole < 4 * whole < full


def tiled_loss(hidden, student, teacher, objective, tile):
    from opd.models import Head
    from opd.rollouts import Tokens
    from opd.tokens import _Tiles

    tokens = Tokens(torch.zeros(len(hidden), dtype=torch.long), torch.zeros(len(hidden)))
    head, theirs = (Head(weight, None, None, 1.0) for weight in (student, teacher))
    opened = {"teacher": lambda rows: theirs(hidden[rows].detach()).log_softmax(-1)}
    return _Tiles(opened, objective, token_metrics, tokens, 1.0, tile).run(head, hidden)


def full_loss(hidden, student, teacher, objective):
    from opd.objectives import as_needed
    from opd.rollouts import Tokens

    tokens = Tokens(torch.zeros(len(hidden), dtype=torch.long), torch.zeros(len(hidden)))
    log_p = (hidden @ student.T).log_softmax(-1)
    log_q = (hidden.detach() @ teacher.T).log_softmax(-1)
    opinions = as_needed({"teacher": log_q}, objective.needs, tokens.y)
    token_metrics(Distributions(log_p.detach(), {"teacher": log_q}), tokens)
    return objective(log_p, opinions, tokens).sum()


@pytest.mark.parametrize("objective", [ReverseKL(), ForwardKL()], ids=lambda o: type(o).__name__)
def test_products_of_bfloat16_keep_the_gradient_within_a_per_cent(objective):
    """As on a GPU: against float64 on the same rounded hidden states and weights.

    Shapes of a head of SmolLM2, logits of a spread of 3 nats; the teacher is near. To round logits
    too, as autocast would, costs several per cent.
    """
    from opd.models import Head
    from opd.rollouts import Tokens
    from opd.tokens import _Tiles

    count, width, vocabulary = 24, 576, 49_152
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=generator).bfloat16().double()
    weight = torch.randn(vocabulary, width, generator=generator) * 3 / width**0.5
    weight = weight.bfloat16().double()
    log_q = (hidden @ weight.T + torch.randn(count, vocabulary, generator=generator) / 2).float()
    exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    tokens = Tokens(torch.zeros(count, dtype=torch.long), torch.zeros(count))
    opinions = {"teacher": log_q.double().log_softmax(-1)}
    objective((exact[0] @ exact[1].T).log_softmax(-1), opinions, tokens).sum().backward()
    rounded = hidden.clone().requires_grad_()
    logits = rounded @ weight.T
    logits = logits + (logits.bfloat16().double() - logits).detach()
    objective(logits.log_softmax(-1), opinions, tokens).sum().backward()
    ours = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    head = Head(ours[1], None, None, 1.0, factor=ours[1].detach().bfloat16())
    tiles = _Tiles({"teacher": lambda rows: log_q[rows]}, objective, token_metrics, tokens, 1.0, 10)
    tiles.run(head, ours[0]).backward()
    for found, expected in zip(ours, exact, strict=True):
        error = (found.grad - expected.grad).norm() / expected.grad.norm()
        assert error < 0.01
    trap = (rounded.grad - exact[0].grad).norm() / exact[0].grad.norm()
    print(f"{type(objective).__name__}: {float(error):.2%}, of rounded logits {float(trap):.2%}")
    assert trap > 0.02
