"""One step of OPD: its loss and gradient against a plain loop, and independent of the cut."""

from types import SimpleNamespace

import pytest
import torch
from conftest import load

from opd import sharding
from opd.errors import NonFiniteError
from opd.module import OPDModule
from opd.objectives import GeneralizedJSD, PolicyGradient, ReverseKL
from opd.prompts import Prompt, PromptBatch, PromptFormat, tokenize_rows
from opd.randomness import generator
from opd.rollouts import Rollouts, cut_into_micro_batches

TEXTS = ["add 7", "what is 12 plus 30?", "9", "question: 9+9"]


def module_of(tiny, family="llama", **options):
    student, teacher = (str(tiny / f"{family}-{role}") for role in ("student", "teacher"))
    module = OPDModule(student, teacher, max_new_tokens=16, **options)
    module.configure_model()
    strategy = SimpleNamespace(
        model=module, reduce=lambda tensor, reduce_op: tensor, broadcast=lambda text, src: text
    )
    module._fabric = None
    module.trainer = SimpleNamespace(strategy=strategy, world_size=1, global_rank=0, global_step=0)
    module.manual_backward = lambda loss: loss.backward()
    return module


def rollouts_of(module, seed=0) -> Rollouts:
    rows = [{"prompt": text} for text in TEXTS]
    prompts = tokenize_rows(rows, module.tokenizer, PromptFormat(chat_template=False))
    batch = PromptBatch.collate(prompts, module.sampler.pad_token_id).repeat(2)
    return module.generate(batch, generator("cpu", seed))


def gradients(module, rollouts, budget):
    module.zero_grad()
    module.student.eval()  # dropout off: it would differ between cuts
    module._accumulate_gradients(cut_into_micro_batches(rollouts, budget))
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


def test_padded_vocabularies_are_compared_on_what_they_share(tiny, tmp_path):
    module = module_of(tiny)
    rollouts = rollouts_of(module)
    expected, _ = gradients(module, rollouts, 100)
    padded = module.teachers["default"].model
    padded.resize_token_embeddings(module.vocabulary + 32, mean_resizing=False)
    with torch.no_grad():
        padded.get_output_embeddings().weight[module.vocabulary :] = 0
    loss, _ = gradients(module, rollouts, 100)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_an_empty_completion_does_not_divide_by_zero(tiny):
    module = module_of(tiny)
    rollouts = rollouts_of(module)
    rollouts.lengths[:] = 0
    loss = module._accumulate_gradients(cut_into_micro_batches(rollouts, 10**6))
    assert [values.numel() for values in loss] == [0]
    assert all(
        torch.isfinite(p.grad).all() for p in module.student.parameters() if p.grad is not None
    )


def test_each_prompt_is_scored_by_the_teacher_it_names(tiny):
    sources = {"one": str(tiny / "llama-teacher"), "two": str(tiny / "llama-student")}
    module = OPDModule(str(tiny / "llama-student"), sources)
    module.configure_model()

    def teacher(name):
        batch = PromptBatch.collate([Prompt(4, (5, 6), teacher=name)], 2)
        empty = torch.zeros(1, 0)
        return module.teacher_of(
            Rollouts(batch, empty.long(), torch.zeros(1).long(), torch.ones(1).bool(), empty)
        )

    assert teacher("two") is module.teachers["two"]
    for name in ("three", None):
        with pytest.raises(ValueError, match=r"prompt row 4 names teacher .*\['one', 'two'\]"):
            teacher(name)


def test_no_parameter_of_a_teacher_is_in_the_module(tiny):
    module = module_of(tiny)
    assert {id(p) for p in module.parameters()} == {id(p) for p in module.student.parameters()}
    assert not any(p.requires_grad for p in module.teachers["default"].model.parameters())


def test_a_run_logs_every_metric_of_the_contract(fit):
    import csv

    folder = fit("run", "--trainer.callbacks+=callbacks.EffOPD", steps=1)
    with (folder / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames)
    for group, names in {
        "opd": "loss reverse_kl forward_kl student_entropy teacher_entropy entropy_gap "
        "overlap_at_16 overlap_advantage teacher_logprob",
        "rollout": "tokens length_mean length_max truncated_fraction accuracy engine_logprob_gap",
        "optim": "lr grad_norm update_norm",
        "cost": "rollout_tokens search_tokens teacher_tokens train_tokens rollout_seconds "
        "teacher_seconds train_seconds search_seconds peak_memory_bytes",
        "effopd": "coefficient score_before score_after candidates direction_norm seconds tokens",
    }.items():
        assert {f"{group}/{name}" for name in names.split()} <= columns


def test_update_norm_is_the_norm_of_the_weights_change(fit):
    from opd.loggers import read_metrics

    before = load(fit("one", steps=1))["state_dict"]
    folder = fit("two", steps=2)
    after = load(folder)["state_dict"]
    change = torch.cat([(after[n] - before[n]).flatten().double() for n in before]).norm().item()
    rows = [row for row in read_metrics(folder / "metrics.csv") if "optim/update_norm" in row]
    assert float(rows[-1]["optim/update_norm"]) == pytest.approx(change, rel=1e-4)


def test_an_offloaded_teacher_gives_the_same_scores(tiny):
    rollouts = rollouts_of(module_of(tiny))
    module = module_of(tiny, teacher_offload=True)
    here = module_of(tiny).score_with_teacher(rollouts).hidden
    module.teachers["default"].to(torch.device("cpu"))
    assert torch.equal(module.score_with_teacher(rollouts).hidden, here)
    layers = sharding.transformer_layers(module.teachers["default"].model)
    assert all(p.is_meta for layer in layers for p in layer.parameters())  # back in host memory


def test_a_teacher_that_is_not_a_number_is_named_before_the_loss_that_follows(tiny):
    module = module_of(tiny)
    rollouts = rollouts_of(module)
    with torch.no_grad():
        module.teachers["default"].model.base_model.norm.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"step 1, rank 0: the teacher's log-probability of p"):
        module._accumulate_gradients(cut_into_micro_batches(rollouts, 100))
