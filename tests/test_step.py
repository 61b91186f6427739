"""One step of OPD: its loss and gradient against a plain loop, and independent of the cut."""

import dataclasses
import shutil

import pytest
import torch
from conftest import load

from opd import sharding, stages
from opd.errors import NonFiniteError, UserError
from opd.metrics import (
    ROLLOUT_MAXIMA,
    ROLLOUT_MEANS,
    ROLLOUT_SUMS,
    TOKEN_METRICS,
    StepMetrics,
    token_metrics,
)
from opd.metrics_rows import read_metrics
from opd.models.load import EMBEDDED
from opd.module import OPDModule
from opd.objectives import GeneralizedJSD, PolicyGradient, ReverseKL
from opd.prompts import Prompt, PromptBatch, PromptFormat, tokenize_rows
from opd.rollouts import Rollouts, cut_into_micro_batches
from opd.step import (
    StepRequest,
    accumulate_gradients,
    apply_gradients,
    lots,
    sample,
    split,
    take_step,
)
from opd.weights import Weights
from opd.world import World

TEXTS = ["add 7", "what is 12 plus 30?", "9", "question: 9+9"]


def module_of(tiny, family="llama", **options):
    """A module without a Trainer: a step needs none."""
    student, teacher = (str(tiny / f"{family}-{role}") for role in ("student", "teacher"))
    module = OPDModule(student, teacher, max_new_tokens=16, **options)
    module.configure_model()
    return module


def batch_of(module) -> PromptBatch:
    rows = [{"prompt": text} for text in TEXTS]
    prompts = tokenize_rows(rows, module.tokenizer, PromptFormat(chat_template=False))
    return PromptBatch.collate(prompts, module.sampler.pad_token_id)


def rollouts_of(module, seed=0) -> Rollouts:
    return stages.generate(module, batch_of(module), seed, copies=2)


def step_of(module, request, rate=0.0):
    """Take a step of SGD, which leaves the weights as they are unless there is a rate."""
    optimizer = torch.optim.SGD(module.student.parameters(), lr=rate)
    return take_step(module, batch_of(module), request, optimizer, None)


def gradients(module, rollouts, budget):
    module.zero_grad()
    module.student.eval()  # dropout off: it would differ between cuts
    accumulate_gradients(module, cut_into_micro_batches(rollouts, budget))
    loss = module.train_metrics.compute()["opd/loss"]
    module.train_metrics.reset()
    return loss, [p.grad.clone() for p in module.student.parameters()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("objective", [ReverseKL(), GeneralizedJSD(0.25), PolicyGradient()])
def test_loss_and_gradient_do_not_depend_on_the_micro_batch_size(tiny, family, objective):
    """1 x 8 = 8 x 1, to float32 rounding, with unequal prompts and completions."""
    module = module_of(tiny, family, objective=objective)
    rollouts = rollouts_of(module)
    assert len(set(rollouts.lengths.tolist())) > 1 or family == "gpt2"
    whole, whole_grads = gradients(module, rollouts, 10**6)
    single, single_grads = gradients(module, rollouts, 1)
    assert single == pytest.approx(whole, rel=1e-5)
    for a, b in zip(whole_grads, single_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_is_that_of_the_token_mean_written_out(tiny, family):
    """Sum over rows and tokens of KL(p || q), each row by itself and unpadded, over the count."""
    module = module_of(tiny, family)
    rollouts = rollouts_of(module)
    loss, grads = gradients(module, rollouts, 100)
    module.zero_grad()
    total, count = torch.zeros(()), 0
    teacher = module.teachers["default"].model
    for i, prompt in enumerate(rollouts.prompts.prompts):
        tokens = rollouts.completion_ids[i, : rollouts.lengths[i]].tolist()
        ids, start = torch.tensor([[*prompt.token_ids, *tokens]]), len(prompt.token_ids) - 1
        log_p = module.student(ids).logits[0, start:-1].log_softmax(-1)
        log_q = teacher(ids).logits[0, start:-1].log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
        count += len(tokens)
    (total / count).backward()
    assert loss == pytest.approx((total / count).item(), rel=1e-4)
    for ours, parameter in zip(grads, module.student.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-6)


def test_an_empty_completion_does_not_divide_by_zero(tiny):
    """All are empty: no loss, and every gradient is there and 0."""
    module = module_of(tiny)
    rollouts = rollouts_of(module)
    rollouts.lengths[:] = 0
    module.zero_grad()
    values, _ = accumulate_gradients(module, cut_into_micro_batches(rollouts, 10**6))
    assert [v["opd/loss"].numel() for v in values] == [0]
    slopes = [p.grad for p in module.student.parameters()]
    assert len(slopes) > 10
    assert all(slope is not None and not slope.any() for slope in slopes)


def test_a_teacher_reads_prompts_as_its_own_template_renders_them(tiny, tmp_path):
    """The JSD of completions after the student's rendering and after the teacher's, written out."""
    folder = shutil.copytree(tiny / "llama-teacher", tmp_path / "teacher")
    template = "{% for m in messages %}Q: {{ m.content }}{% endfor %} A:"
    (folder / "chat_template.jinja").write_text(template)
    module = OPDModule(
        str(tiny / "llama-student"), str(folder), GeneralizedJSD(0.25), max_new_tokens=9
    )
    module.configure_model()
    fmt = PromptFormat(teacher_rendering="own")
    rows = [{"prompt": text} for text in TEXTS]
    prompts = tokenize_rows(rows, module.tokenizer, fmt, teachers=module.teacher_readers())
    batch = PromptBatch.collate(prompts, module.sampler.pad_token_id)
    loss, _ = gradients(module, stages.generate(module, batch, 0), 70)
    rollouts = stages.generate(module, batch, 0)
    module.zero_grad()
    total, plain = torch.zeros(()), torch.zeros(())
    for i, text in enumerate(TEXTS):
        y = rollouts.completion_ids[i, : rollouts.lengths[i]].tolist()
        readings = []
        for model, words in [
            (module.student, f"<s>[user]{text}[assistant]"),
            (module.teachers["default"].model, f"Q: {text} A:"),
            (module.teachers["default"].model, f"<s>[user]{text}[assistant]"),
        ]:
            read = module.tokenizer(words, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([[*read, *y]])).logits[0, len(read) - 1 : -1]
            readings.append(logits.softmax(-1))
        for q, sums in zip(readings[1:], (total, plain), strict=True):
            p, m = readings[0], 0.25 * q + 0.75 * readings[0]
            sums += 0.25 * (q * (q / m).log()).sum() + 0.75 * (p * (p / m).log()).sum()
    assert loss == pytest.approx((total / rollouts.num_tokens).item(), rel=1e-4)
    assert loss != pytest.approx((plain / rollouts.num_tokens).item(), rel=1e-2)


def test_own_renderings_of_a_run(fit, tmp_path):
    """Teachers with other templates than the student's: what they read is longer; no line warns."""
    teacher = shutil.copytree(EMBEDDED / "teacher", tmp_path / "teacher")
    template = (teacher / "chat_template.jinja").read_text()
    (teacher / "chat_template.jinja").write_text(template + "+")
    options = ["--model.teacher", str(teacher), "--data.format.teacher_rendering", "own"]
    own = read_metrics(fit("own", *options, steps=1) / "metrics.csv")
    plain = read_metrics(fit("plain", *options[:2], steps=1) / "metrics.csv")
    (ours,), (theirs,) = ([r for r in rows if "opd/loss" in r] for rows in (own, plain))
    assert ours["rollout/tokens"] == theirs["rollout/tokens"]
    assert float(ours["opd/loss"]) > float(theirs["opd/loss"])
    assert float(own[0]["val/reverse_kl"]) > float(plain[0]["val/reverse_kl"])


def test_a_teacher_of_another_vocabulary_renders_nothing(tiny):
    module = OPDModule(str(tiny / "llama-student"), str(tiny / "gpt2-teacher"))
    with pytest.raises(UserError, match="its tokenizer differs from the student's"):
        module.teacher_readers()


def test_readers_are_named_as_prompts_name_them(tiny):
    student, teacher = str(tiny / "llama-student"), str(tiny / "llama-teacher")
    assert set(OPDModule(student, teacher).teacher_readers()) == {"default", None}
    one = OPDModule(student, {"math": teacher}).teacher_readers()
    assert one[None] == one["math"]
    two = OPDModule(student, {"math": teacher, "code": student}).teacher_readers()
    assert {name: source for name, (source, _) in two.items()} == {
        "math": teacher,
        "code": student,
    }


def test_each_prompt_is_read_by_the_teacher_it_names(tiny):
    sources = {"one": str(tiny / "llama-teacher"), "two": str(tiny / "llama-student")}
    module = OPDModule(str(tiny / "llama-student"), sources, max_new_tokens=4, temperature=0.7)
    module.configure_model()
    micro = rollouts_of(module)
    kls = {}
    for name in sources:
        named = [dataclasses.replace(p, teacher=name) for p in micro.prompts.prompts]
        part = dataclasses.replace(micro, prompts=dataclasses.replace(micro.prompts, prompts=named))
        kls[name] = stages.compare(module, stages.read(module, part), None, token_metrics).values[
            "opd/reverse_kl"
        ]
    assert kls["one"].min() > 1e-4
    assert kls["two"].abs().max() < 1e-6  # the student itself
    for name in ("three", None):
        with pytest.raises(ValueError, match=r"prompt row 4 names teacher .*\['one', 'two'\]"):
            module.teachers.check([Prompt(4, (5, 6), teacher=name)])
    with pytest.raises(ValueError, match=r"^p.jsonl line 5 names teacher None, so it is for 'def"):
        module.teachers.check([Prompt(4, (5, 6), where="p.jsonl line 5")])


def test_data_sets_and_teachers_have_the_metrics_of_their_completions(tiny):
    """Those that only they would have; an answer counts for the data set of its prompt."""
    sources = {"one": str(tiny / "llama-teacher"), "two": str(tiny / "llama-student")}
    module = OPDModule(str(tiny / "llama-student"), sources, max_new_tokens=6)
    module.configure_model()
    drawn = rollouts_of(module)
    belongs = [
        ("math", "two", "7"),
        ("code", "one", None),
        ("math", "one", "9"),
        ("math", "two", None),
    ]
    of = [
        dataclasses.replace(prompt, data_set=data, teacher=teacher, answer=answer)
        for prompt, (data, teacher, answer) in zip(drawn.prompts.prompts[::2], belongs, strict=True)
    ]
    drawn.prompts.prompts = [prompt for prompt in of for _ in range(2)]
    groups = ["data/math", "data/code", "teacher/one", "teacher/two"]

    def metrics_of(rollouts, groups=()):
        names = [*TOKEN_METRICS, *ROLLOUT_MEANS]
        metrics = StepMetrics(names, ROLLOUT_SUMS, ROLLOUT_MAXIMA, groups=groups)
        stages.count_rollouts(module, metrics, rollouts)
        for micro in stages.micro_batches(module, rollouts):
            values = stages.compare(module, stages.read(module, micro), None, token_metrics).values
            stages.count_tokens(module, metrics, micro, values)
        return metrics.compute()

    together = metrics_of(drawn, groups)
    for group in groups:
        kind, _, name = group.partition("/")
        field = {"data": "data_set", "teacher": "teacher"}[kind]
        rows = [i for i, p in enumerate(drawn.prompts.prompts) if getattr(p, field) == name]
        alone = metrics_of(drawn.select(rows))
        assert ("rollout/accuracy" in alone) == (group != "data/code")  # it has no answers
        ours = {n.removesuffix(f"/{group}"): v for n, v in together.items() if n.endswith(group)}
        assert ours == pytest.approx(alone, rel=1e-4, abs=1e-6)
    plain = {name: value for name, value in together.items() if name.count("/") == 1}
    assert plain == metrics_of(drawn)


def test_no_parameter_of_a_teacher_is_in_the_module(tiny):
    module = module_of(tiny)
    assert {id(p) for p in module.parameters()} == {id(p) for p in module.student.parameters()}
    assert not any(p.requires_grad for p in module.teachers["default"].model.parameters())


def test_a_run_logs_every_metric_of_the_contract(searched):
    import csv

    with (searched / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames)
    for group, names in {
        "opd": "loss reverse_kl forward_kl student_entropy teacher_entropy entropy_gap "
        "kl_above_5 overlap_at_16 overlap_advantage teacher_logprob",
        "rollout": "tokens length_mean length_max truncated_fraction accuracy engine_logprob_gap",
        "optim": "lr grad_norm update_norm",
        "cost": "rollout_tokens search_tokens teacher_tokens train_tokens rollout_seconds "
        "teacher_seconds train_seconds search_seconds peak_memory_bytes",
        "effopd": "coefficient score_before score_after candidates direction_norm seconds tokens",
    }.items():
        assert {f"{group}/{name}" for name in names.split()} <= columns


def test_update_norm_is_the_norm_of_the_weights_change(vanilla):
    from opd.metrics_rows import read_metrics

    before, after = (load(vanilla, f"step=00000{step}.ckpt")["state_dict"] for step in (2, 3))
    change = torch.cat([(after[n] - before[n]).flatten().double() for n in before]).norm().item()
    rows = [row for row in read_metrics(vanilla / "metrics.csv") if "optim/update_norm" in row]
    assert float(rows[-1]["optim/update_norm"]) == pytest.approx(change, rel=1e-4)


def test_an_offloaded_teacher_has_the_same_opinion(tiny):
    rollouts = rollouts_of(module_of(tiny))
    module = module_of(tiny, teacher_offload=True)
    here = stages.read(module_of(tiny), rollouts).opinions["teacher"].hidden
    module.teachers["default"].to(torch.device("cpu"))
    assert torch.equal(stages.read(module, rollouts).opinions["teacher"].hidden, here)
    layers = sharding.transformer_layers(module.teachers["default"].model)
    assert all(p.is_meta for layer in layers for p in layer.parameters())  # back in host memory


def test_a_tied_head_is_offloaded_with_its_embedding(tiny):
    """To another device than the one that it was loaded on, of which there is one: meta."""
    teacher = module_of(tiny, teacher_offload=True).teachers["default"]
    assert (
        teacher.model.get_output_embeddings().weight is teacher.model.get_input_embeddings().weight
    )
    teacher.to(torch.device("meta"))
    assert teacher.model.get_output_embeddings().weight.is_meta


def test_a_teacher_that_is_not_a_number_is_named_before_the_loss_that_follows(tiny):
    module = module_of(tiny)
    with torch.no_grad():
        module.teachers["default"].model.base_model.norm.weight.fill_(torch.nan)
    before = [p.detach().clone() for p in module.student.parameters()]
    with pytest.raises(NonFiniteError, match=r"step 1, rank 0: the teacher's log-probability of p"):
        step_of(module, StepRequest())
    for weight, old in zip(module.student.parameters(), before, strict=True):
        assert torch.equal(weight, old)


class Ranks(World):
    """One of several ranks of a dealt batch, which knows what all of them have."""

    def __init__(self, rank, counts):
        super().__init__()
        self.rank, self.size, self.total = rank, len(counts), sum(counts)

    def sum(self, value):
        return torch.tensor(float(self.total))


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("prompts", [1, 7, 8])
def test_a_completion_has_the_same_lot_on_any_number_of_ranks(copies, prompts):
    """Prompts are dealt in turn; a lot belongs to (prompt, copy); evenly spaced from 0 to 1."""
    total = prompts * copies
    whole = lots(total, copies, Ranks(0, [total]), 5, "lot").view(prompts, copies)
    spacing = [i / (total - 1) for i in range(total)] if total > 1 else [1]
    assert sorted(whole.flatten().tolist()) == pytest.approx(spacing)
    counts = [len(range(rank, prompts, 3)) * copies for rank in range(3)]
    for rank, count in enumerate(counts):
        mine = lots(count, copies, Ranks(rank, counts), 5, "lot")
        assert mine.tolist() == whole[rank::3].flatten().tolist()


def test_split_holds_out_the_share_asked_for(tiny):
    rollouts = rollouts_of(module_of(tiny))
    rollouts.columns["lot"] = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])[
        torch.tensor([3, 1, 7, 5, 0, 2, 6, 4])
    ].div(7)
    held_out, trained = split(rollouts, 0.25)
    assert held_out.columns["lot"].mul(7).round().tolist() == [1, 0]
    assert len(trained) == 6
    assert torch.equal(
        held_out.completion_ids[0, : held_out.lengths[0]],
        rollouts.completion_ids[1, : rollouts.lengths[1]],
    )
    five = rollouts.select(range(5))
    five.columns["lot"] = torch.tensor([1.0, 0.25, 0.5, 0.0, 0.75])
    assert [len(part) for part in split(five, 0.25)] == [1, 4]  # not more than the share
    nothing, everything = split(rollouts, 0.0)
    assert (len(nothing), len(everything)) == (0, 8)


def test_every_step_prompt_and_copy_draws_numbers_of_its_own(tiny):
    """The same text in four rows, two copies each, in two steps."""
    module = module_of(tiny, rollouts_per_prompt=2)
    (prompt,) = batch_of(module).prompts[:1]
    rows = [dataclasses.replace(prompt, row=row) for row in range(4)]
    batch = PromptBatch.collate(rows, module.sampler.pad_token_id)
    said = {
        tuple(rollouts.completion_ids[i, :4].tolist())
        for rollouts in (sample(module, batch, t) for t in (1, 2))
        for i in range(8)
    }
    assert len(said) == 16
    again = sample(module, batch, 2)
    assert {tuple(row) for row in again.completion_ids[:, :4].tolist()} < said


def test_requests_are_merged_whatever_their_order():
    keep, hold = StepRequest(keep_opinions=True), StepRequest(held_out=0.25)
    for requests in ([keep, hold, StepRequest()], [StepRequest(), hold, keep]):
        assert StepRequest.merged(requests) == StepRequest(True, 0.25)
    assert StepRequest.merged([]) == StepRequest(False, 0.0)
    short, shorter = StepRequest(max_new_tokens=9), StepRequest(max_new_tokens=4)
    for requests in ([short, shorter, keep], [StepRequest(), shorter, short]):
        assert StepRequest.merged(requests).max_new_tokens == 4


def test_a_step_keeps_what_was_asked_for_and_nothing_else(tiny):
    module = module_of(tiny, rollouts_per_prompt=2)
    plain = step_of(module, StepRequest())
    assert (plain.readings, plain.held_out) == ([], [])
    asked = step_of(module, StepRequest(keep_opinions=True, held_out=0.25))
    assert [reading.micro for reading in asked.readings] == asked.micro_batches
    counts = [sum(len(micro) for micro in part) for part in (asked.micro_batches, asked.held_out)]
    assert counts == [6, 2]


def test_gradients_are_clipped():
    """Gradient (3, 4) has norm 5; clipped to 1 it is (0.6, 0.8); SGD goes lr times that."""
    module = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    weights, before = Weights(module), module.weight.detach().clone()

    def apply(gradient, t, factor=1.0):
        module.weight.grad = torch.tensor([gradient])
        options = {"learning_rate_factor": factor, "max_grad_norm": 1.0, "t": t}
        return apply_gradients(weights, module, optimizer, optimizer.step, **options)

    for t, factor in [(1, 1.0), (2, 0.1)]:
        metrics = apply([3.0, 4.0], t, factor)
        assert metrics["optim/lr"] == pytest.approx(0.5 * factor)
        assert metrics["optim/grad_norm"] == pytest.approx(5)
        assert weights.version == t
    moved = before - 0.55 * torch.tensor([[0.6, 0.8]])
    torch.testing.assert_close(module.weight.detach(), moved)
    apply([0.03, 0.04], 3)  # below the limit: left alone
    moved -= 0.5 * torch.tensor([[0.03, 0.04]])
    torch.testing.assert_close(module.weight.detach(), moved)
    with pytest.raises(NonFiniteError, match="step 4: the gradient's norm is inf"):
        apply([torch.inf, 0.0], 4)
    assert torch.isfinite(module.weight).all()


def test_the_scheduler_follows_the_step_whose_length_is_measured(tiny):
    """Of a gradient that is clipped, SGD takes steps as long as the rate times the limit."""
    module = module_of(tiny, update_norm=True, max_grad_norm=1e-3)
    optimizer = torch.optim.SGD(module.student.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    for rate in (0.5, 0.05):
        update = take_step(module, batch_of(module), StepRequest(), optimizer, scheduler).update
        assert update["optim/lr"] == pytest.approx(rate)
        assert update["optim/grad_norm"] > 1e-3
        assert update["optim/update_norm"] == pytest.approx(rate * 1e-3, rel=1e-2)
