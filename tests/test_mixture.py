"""GKD's mixture: which completions are the data's, and what they count for."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import DDP, ROOT, launch
from test_step import batch_of, gradients, module_of

from opd import stages
from opd.errors import UserError
from opd.metrics import sampled_kl, token_metrics
from opd.metrics_rows import read_metrics
from opd.mixture import Mixture, given
from opd.module import OPDModule
from opd.objectives import GeneralizedJSD, PolicyGradient
from opd.prompts import Prompt, PromptBatch, PromptFormat, tokenize_rows
from opd.reuse import importance_weights
from opd.rewards import Correctness, RewardTerm
from opd.rollouts import Conversations, Environment, Sampler, TransformersEngine
from opd.step import sample

SAMPLER = Sampler(max_new_tokens=4, eos_token_ids=(1,), pad_token_id=2)


def prompts_of(count, every=1):
    own = [(7, 8, 1) if i % every == 0 else None for i in range(count)]
    return [Prompt(i, (5,), completion_ids=ids) for i, ids in enumerate(own)]


def test_rows_are_drawn_by_seed_and_row_whatever_else_is_in_the_batch():
    prompts, mixture = prompts_of(2000), Mixture(0.3)
    chosen = mixture.choose(prompts, 5)
    assert sum(chosen) == pytest.approx(600, abs=70)  # 3.4 standard deviations
    assert mixture.choose(prompts[1::2], 5) == chosen[1::2]
    assert mixture.choose(prompts, 6) != chosen
    assert Mixture(1.0).choose(prompts, 5) == [True] * 2000
    assert Mixture(1.0).choose(prompts_of(6, every=3), 5) == [True, False, False] * 2
    assert mixture.choose([], 5) == []


def test_given_completions_are_cut_off_and_ended_as_sampled_ones():
    completions = [(7, 1), (3, 4, 5, 6, 1), (9, 9, 9), (8, 8, 8, 1)]
    prompts = [Prompt(i, (5, 6), completion_ids=ids) for i, ids in enumerate(completions)]
    rollouts = given(PromptBatch.collate(prompts, 0), SAMPLER)
    rows = [[7, 1, 2, 2], [3, 4, 5, 6], [9, 9, 9, 2], [8, 8, 8, 1]]
    assert rollouts.completion_ids.tolist() == rows
    assert rollouts.lengths.tolist() == [2, 4, 3, 4]
    assert rollouts.finished.tolist() == [True, False, False, True]
    assert rollouts.keep_sampled(rollouts.tokens).tolist() == []
    assert len(given(PromptBatch.collate([], 0), SAMPLER)) == 0


def mixed_batch(module, own=(True, False, True, True)):
    """Prompts of which the first, third and fourth hold a completion of 3, 5 and 6 tokens."""
    batch = batch_of(module)
    end = module.sampler.eos_token_ids[0]
    for i, (prompt, has) in enumerate(zip(batch.prompts, own, strict=True)):
        ids = (*range(20 + i, 24 + 2 * i), end) if has else None
        batch.prompts[i] = dataclasses.replace(prompt, completion_ids=ids)
    return batch


def module_with(tiny, fixed, **options):
    return module_of(tiny, mixture=Mixture(fixed), rollouts_per_prompt=2, **options)


def test_loss_and_gradient_are_those_of_both_kinds_together(tiny):
    """The mean over all tokens of the JSD, of given and of sampled completions, written out."""
    module = module_with(tiny, 1.0, objective=GeneralizedJSD(0.25))
    rollouts = sample(module, mixed_batch(module), 1)
    module.train_metrics.reset()
    assert rollouts.columns["sampled"].tolist() == [False] * 2 + [True] * 2 + [False] * 4
    prompts = rollouts.prompts.prompts
    assert [prompt.row for prompt in prompts] == [0, 0, 1, 1, 2, 2, 3, 3]
    for i, prompt in enumerate(prompts):
        own = rollouts.completion_ids[i, : rollouts.lengths[i]]
        assert (prompt.completion_ids == tuple(own.tolist())) is (prompt.row != 1)
    loss, grads = gradients(module, rollouts, 60)
    module.zero_grad()
    total, count = torch.zeros(()), 0
    for i, prompt in enumerate(prompts):
        y = rollouts.completion_ids[i, : rollouts.lengths[i]].tolist()
        ids, start = torch.tensor([[*prompt.token_ids, *y]]), len(prompt.token_ids) - 1
        p, q = (
            model(ids).logits[0, start:-1].softmax(-1)
            for model in (module.student, module.teachers["default"].model)
        )
        m = 0.25 * q + 0.75 * p
        jsd = 0.25 * (q * (q / m).log()).sum(-1) + 0.75 * (p * (p / m).log()).sum(-1)
        total, count = total + jsd.sum(), count + len(y)
    (total / count).backward()
    assert loss == pytest.approx((total / count).item(), rel=1e-4)
    for ours, parameter in zip(grads, module.student.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-6)


def test_what_nobody_has_sampled_counts_for_the_loss_alone(tiny):
    module = module_with(tiny, 1.0)
    rollouts = sample(module, mixed_batch(module), 1)
    sampled = rollouts.lengths[2:4].sum().item()
    module.ledger.synchronize(module.world.sum, module.world.size)
    counted = module.ledger.totals["rollout_tokens"]
    found = module.train_metrics.compute()
    assert found["rollout/tokens"] == sampled == counted
    assert found["rollout/length_max"] == rollouts.lengths[2:4].max()
    metrics = module.train_metrics
    metrics.reset()
    for micro in stages.micro_batches(module, rollouts):
        reading = stages.read(module, micro)
        values = stages.compare(module, reading, None, token_metrics).values
        stages.count_tokens(module, metrics, micro, values)
    found = metrics.compute()
    assert found["rollout/engine_logprob_gap"] < 1e-4  # not log p of what was given
    share = 1 - sampled / rollouts.num_tokens
    assert found["opd/fixed_fraction"] == pytest.approx(share)
    assert found["opd/reverse_kl"] > 0


def test_prefixes_that_were_given_weigh_one_where_rollouts_are_reused(tiny):
    module = module_with(tiny, 1.0)
    rollouts = sample(module, mixed_batch(module), 1)
    logp_y = rollouts.engine_logprobs[rollouts.mask] - 0.5
    weights = importance_weights(logp_y, rollouts, "previous")
    fixed = ~rollouts.columns["sampled"]
    assert torch.equal(weights[fixed], rollouts.mask[fixed].float())
    of_sampled = weights[~fixed][rollouts.mask[~fixed]]
    firsts = torch.zeros_like(rollouts.mask)
    firsts[:, 0] = True
    others = weights[~fixed][(rollouts.mask & ~firsts)[~fixed]]
    torch.testing.assert_close(others, torch.full_like(others, 0.6065), rtol=1e-3, atol=0)
    assert len(of_sampled) > len(others) > 0


def test_a_score_knows_of_no_move_away_from_what_was_given(tiny):
    module = module_with(tiny, 1.0)
    rollouts = sample(module, mixed_batch(module), 1)
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    readings = [stages.read(module, micro) for micro in stages.micro_batches(module, rollouts)]
    score = stages.judge(module, readings, "reverse_kl")
    micro_fixed = [
        fixed for r in readings for fixed in (~r.micro.columns["sampled"][r.micro.lengths > 0])
    ]
    for moved, fixed in zip(score.moved.tolist(), micro_fixed, strict=True):
        assert (moved == 0) is bool(fixed)
    assert sampled_kl(torch.tensor(-1.0), torch.tensor(0.0)) > 0.3  # what it would have been


ROWS = [
    {"prompt": "add 7", "solution": "it is 42"},
    {"prompt": "9", "solution": None},
    {"prompt": "9+9", "solution": "18</s>"},
    {"prompt": "7", "solution": ""},
]


def test_completions_of_rows_end_once(tiny):
    tokenizer = module_of(tiny).tokenizer
    fmt = PromptFormat(completion_field="solution")
    found = [prompt.completion_ids for prompt in tokenize_rows(ROWS, tokenizer, fmt)]
    assert found[1] is found[3] is None
    assert tokenizer.decode(found[0]) == "it is 42</s>"  # and no BOS
    assert tokenizer.decode(found[2]) == "18</s>"
    assert all(p.completion_ids is None for p in tokenize_rows(ROWS, tokenizer, PromptFormat()))


def test_a_chat_holds_its_last_turn(tiny):
    tokenizer = module_of(tiny).tokenizer
    fmt = PromptFormat(completion_field="messages")
    turns = [("user", "add 7"), ("assistant", "to what?"), ("user", "8"), ("assistant", "15")]
    chat = [{"role": role, "content": text} for role, text in turns]
    whole, open_ended = tokenize_rows([{"messages": chat}, {"messages": chat[:3]}], tokenizer, fmt)
    assert tokenizer.decode(whole.completion_ids) == "15</s>"
    assert whole.token_ids == open_ended.token_ids
    assert open_ended.completion_ids is None
    go_on = dataclasses.replace(fmt, last_assistant="continue")
    with pytest.raises(UserError, match=r"row 0: the last turn of 'messages' cannot be"):
        tokenize_rows([{"messages": chat}], tokenizer, go_on)
    for value, said in [(3, "it is a number"), ([3], "a turn is no object")]:
        with pytest.raises(UserError, match=f"'solution' must be text or a chat; {said}"):
            tokenize_rows(
                [{"prompt": "1", "solution": value}],
                tokenizer,
                PromptFormat(completion_field="solution"),
            )


class Replying(Environment):
    """Always says the same."""

    def __call__(self, prompt, messages):
        return [{"role": "user", "content": "and 9?"}]


def test_conversations_and_given_completions_mix(tiny):
    """Also where nothing was sampled, or nothing given: all parts know what was inserted."""
    engine = Conversations(Replying(), turn_tokens=8, turns=2)
    module = module_of(tiny, engine=engine, temperature=1.3, eos_token_ids=[1, *range(40, 200)])
    module.sampler = dataclasses.replace(module.sampler, max_new_tokens=40)
    for own in [(True, False, True, True), (True,) * 4, (False,) * 4]:
        rollouts = stages.mixed(module, Mixture(1.0), mixed_batch(module, own), 3, copies=2)
        inserted = rollouts.columns.get("inserted", torch.zeros_like(rollouts.engine_logprobs))
        given_rows = [i for i in range(8) if own[i // 2]]
        assert not inserted[given_rows].any()
        assert bool(inserted.any()) == (not all(own))
        for part in (rollouts, rollouts.select([5, 0, 2])):
            values = stages.compare(
                module, stages.read(module, part), GeneralizedJSD(), token_metrics
            ).values
            assert len(values["opd/loss"]) == part.num_tokens == len(part.tokens)


class Beginning(TransformersEngine):
    """Notes what it could begin with."""

    staleness = 1

    def ahead(self, prompts, sampler, seeds):
        self.begun = [prompt.row for prompt in prompts.prompts], list(seeds), sampler

    def __call__(self, prompts, sampler, seeds):
        self.asked = [prompt.row for prompt in prompts.prompts], list(seeds), sampler
        return super().__call__(prompts, sampler, seeds)


def test_what_is_begun_ahead_is_what_the_next_step_asks_for(tiny):
    engine = Beginning()
    module = module_of(tiny, engine=engine, mixture=Mixture(0.9), rollouts_per_prompt=2)
    batch = mixed_batch(module, (True, True, True, False))
    batch.upcoming = batch.prompts
    sample(module, batch, 1)
    begun = engine.begun
    sample(module, batch, 2)
    assert engine.asked == begun
    assert 0 < len(begun[0]) < 8


def test_what_does_not_go_together():
    pair = ("embedded:base", "embedded:teacher")
    with pytest.raises(UserError, match="PolicyGradient takes every token for one that"):
        OPDModule(*pair, mixture=Mixture(0.5), objective=PolicyGradient())
    with pytest.raises(UserError, match=r"model.mixture and model.reward"):
        OPDModule(
            *pair, mixture=Mixture(0.5), reward=RewardTerm(Correctness()), rollouts_per_prompt=2
        )
    with pytest.raises(UserError, match=r"no prompt of data.train has a completion"):
        Mixture(0.5).check([Prompt(0, (1,))])
    Mixture(0.5).check(prompts_of(5, every=4))
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="must be above 0 and at most 1"):
            Mixture(share)


@pytest.fixture
def mixture(tmp_path):
    """Options of a run on additions, two thirds of which hold their answer."""
    rows = (ROOT / "tests" / "additions.jsonl").read_text().splitlines()
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i, row in enumerate(map(json.loads, rows)):
            file.write(json.dumps({**row, "solution": row["answer"] if i % 3 else None}) + "\n")
    options = ["--data.train", str(path), "--data.format.completion_field", "solution"]
    return [*options, "--model.mixture.fixed", "0.7"]


def logged(folder):
    return [row for row in read_metrics(folder / "metrics.csv") if "opd/loss" in row]


def test_a_run_with_reuse_and_a_search(fit, mixture):
    """Neither the alarm of engines nor ratios see what nobody has sampled."""
    more = ["--trainer.callbacks+=callbacks.EffOPD", "--model.reuse.steps", "2"]
    more += ["--data.batch_size", "16", "--samples.every_n_steps", "1"]
    folder = fit("run", *mixture, *more)
    for row in logged(folder):
        assert 0 < float(row["opd/fixed_fraction"]) < 1
        assert float(row["rollout/engine_logprob_gap"]) < 1e-3
        assert 0.9 < float(row["reuse/ratio"]) < 1.1
    records = [json.loads(s) for s in (folder / "samples/step_000001.jsonl").open()]
    given_ones = [r for r in records if r["finish_reason"] == "given"]
    assert 0 < len(given_ones) < len(records)
    for record in given_ones:
        assert record["completion"] == record["answer"] + "<eos>"
        assert record["engine_logprob"] is None
        assert len(record["reverse_kl"]) == len(record["completion_ids"])


def test_all_may_be_given(fit, mixture):
    path = Path(mixture[1])
    held = [row for row in path.open() if json.loads(row)["solution"]]
    path.write_text("".join(held))
    folder = fit("run", *mixture[:-1], "1.0", steps=1)
    (row,) = logged(folder)
    assert float(row["opd/fixed_fraction"]) == 1
    assert "rollout/tokens" not in row or float(row["rollout/tokens"]) == 0


@pytest.mark.slow
def test_two_processes_mix_as_one_does(tmp_path, fit, mixture):
    own = [*mixture, "--data.batch_size", "6"]
    (one,), (two,) = (
        logged(fit("one", *own, steps=1)),
        logged(launch(2, tmp_path / "two", *DDP, *own, steps=1)),
    )
    for name in ("opd/fixed_fraction", "opd/loss", "optim/grad_norm", "rollout/tokens"):
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-4)
    assert 0 < float(one["opd/fixed_fraction"]) < 1
