"""Rewards: advantages by hand and as they are defined, and what becomes of them in a step."""

import dataclasses
import math
import statistics

import pytest
import torch
from conftest import DDP, launch
from test_step import StepRequest, batch_of, module_of, step_of

from opd.errors import UserError
from opd.metrics_rows import read_metrics
from opd.objectives import Distributions, PolicyGradient, SampledExOPD
from opd.prompts import Prompt, PromptBatch
from opd.rewards import (
    AsGiven,
    Centred,
    Correctness,
    GroupNormalized,
    Reward,
    RewardTerm,
)
from opd.rollouts import Rollouts, Tokens
from opd.step import sample

N, V = 5, 7


def logits(seed):
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Length(Reward):
    """Minus the number of characters, a hundredth each; none for empty ones."""

    def __call__(self, rollouts, texts):
        assert len(texts) == len(rollouts) > 0
        return [-len(text) / 100 if text else math.nan for text in texts]


class Twice(Reward):
    def __call__(self, rollouts, texts):
        return [0.0] * 2 * len(texts)


class Infinite(Reward):
    def __call__(self, rollouts, texts):
        return [math.inf] * len(texts)


GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 2])
REWARDS = torch.tensor([1, 0, 0, 1, 0.25, 0.75, 5]).double()


def test_advantages_by_hand():
    assert Centred()(REWARDS, GROUPS).tolist() == [0.5, -0.5, -0.5, 0.5, -0.25, 0.25, 0]
    half, root = 0.5 / math.sqrt(1 / 3), math.sqrt(0.5)
    expected = [half, -half, -half, half, -root, root, 0]
    assert GroupNormalized(0.0)(REWARDS, GROUPS).tolist() == pytest.approx(expected)
    smaller = 0.25 / (math.sqrt(0.125) + 0.1)
    assert GroupNormalized(0.1)(REWARDS, GROUPS)[5].item() == pytest.approx(smaller)
    assert AsGiven()(REWARDS, GROUPS).tolist() == REWARDS.tolist()


def test_group_normalised_advantages_are_those_of_their_definition():
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(30, generator=generator, dtype=torch.float64)
    group = torch.randint(0, 6, (30,), generator=generator)
    found = GroupNormalized()(reward, group).tolist()
    for i, g in enumerate(group.tolist()):
        members = [reward[j].item() for j in range(30) if group[j] == g]
        scale = statistics.stdev(members) + 1e-4
        assert found[i] == pytest.approx((reward[i].item() - statistics.mean(members)) / scale)


@pytest.mark.parametrize("advantage", [GroupNormalized(), GroupNormalized(0.0), Centred()])
def test_equal_rewards_and_none_give_no_advantage(advantage):
    reward = torch.full((4,), 0.1, dtype=torch.float64)
    same = advantage(reward, torch.tensor([0, 0, 0, 1]))
    assert same.tolist() == pytest.approx([0] * 4, abs=1e-12)  # 0.1 + 0.1 + 0.1 is not 0.3
    assert advantage(torch.zeros(0).double(), torch.zeros(0).long()).tolist() == []


@pytest.mark.parametrize("objective", [PolicyGradient(), SampledExOPD(scale=1.5)])
def test_it_is_added_to_the_advantage_of_the_teacher_and_has_no_gradient_of_its_own(objective):
    student, teacher, reference = logits(0), logits(1), logits(2)
    y = torch.tensor([3, 0, 6, 2, 2])
    added = torch.tensor([0.5, -2, 0, 1, 3]).double()
    log_p, log_q, log_r = (
        x.log_softmax(-1)[torch.arange(N), y] for x in (student, teacher, reference)
    )
    logmu = log_p - torch.tensor([0, 0.3, 0, -0.2, 0])
    scale = 1.5 if isinstance(objective, SampledExOPD) else 1.0
    total = log_q - log_p + (scale - 1) * (log_q - log_r) + added
    ratio = (log_p - logmu).exp()
    names = {"teacher": log_q, "reference": log_r}
    opinions = {name: names[name] for name in objective.needs}
    both = Distributions(student.log_softmax(-1), opinions)
    loss, slope = objective.with_slope(both, Tokens(y, logmu, added))
    torch.testing.assert_close(loss, -ratio * total)
    onehot = torch.nn.functional.one_hot(y, V).double()
    expected = -(ratio * total)[:, None] * (onehot - student.softmax(-1))
    torch.testing.assert_close(slope, expected)


def rollouts_of(answers, copies):
    prompts = [Prompt(i, (5, 6), answer) for i, answer in enumerate(answers)]
    batch = PromptBatch.collate(prompts, 0).repeat(copies)
    ones = torch.ones(len(batch), 1)
    return Rollouts(batch, ones.long(), ones[:, 0].long(), ones[:, 0].bool(), ones)


def test_completions_without_a_reward_have_no_advantage_and_count_for_no_other():
    rollouts = rollouts_of(["1", None, "3"], 2)
    rollouts.columns["right"] = torch.tensor([1, 0, math.nan, math.nan, 1, 1]).double()
    columns = RewardTerm(Correctness(), weight=0.5).columns(rollouts, [""] * 6, 2, 9)
    scale = 0.5 * 0.5 / (math.sqrt(0.5) + 1e-4)
    assert columns["advantage"].tolist() == pytest.approx([scale, -scale, 0, 0, 0, 0])
    assert columns["reward"].isnan().tolist() == [False, False, True, True, False, False]
    texts = ["", "ab", "abcd", "", "abc", "abcde"]
    found = RewardTerm(Length(), Centred(), 10.0).columns(rollouts, texts, 3, 9)["advantage"]
    assert found.tolist() == pytest.approx([0, 0.1, -0.1, 0, 0.1, -0.1])


def test_what_a_reward_gives_is_looked_at():
    rollouts = rollouts_of(["1", "2"], 2)
    with pytest.raises(UserError, match=r"Twice: gives numbers of shape \[8\] for 4 completions"):
        RewardTerm(Twice()).columns(rollouts, [""] * 4, 2, 9)
    with pytest.raises(UserError, match="Infinite: gives an infinite reward to prompt row 0"):
        RewardTerm(Infinite()).columns(rollouts, [""] * 4, 2, 9)
    empty = RewardTerm(Length()).columns(Rollouts.empty(rollouts.prompts.select([])), [], 2, 9)
    assert {name: column.shape for name, column in empty.items()} == dict.fromkeys(
        ("outcome", "reward", "advantage"), (0,)
    )


def test_a_step_adds_the_gradient_of_the_rewards(tiny):
    """Of the same rollouts: with the reward, less without, is -A p's slope of each token."""
    term = RewardTerm(Length(), Centred(), 7.0)
    options = {"objective": PolicyGradient(), "rollouts_per_prompt": 3}
    gradients = {}
    for name, reward in [("with", term), ("without", None)]:
        module = module_of(tiny, reward=reward, max_grad_norm=1e9, **options)
        module.student.eval()
        start = [p.detach().clone() for p in module.student.parameters()]
        step_of(module, StepRequest(), rate=1.0)
        after = module.student.parameters()
        gradients[name] = [a - b.detach() for a, b in zip(start, after, strict=True)]
    module = module_of(tiny, reward=term, **options)
    rollouts = sample(module, batch_of(module), 1)
    advantage = rollouts.columns["advantage"]
    assert advantage.abs().max() > 0.1
    torch.testing.assert_close(advantage.view(-1, 3).sum(1), torch.zeros(4), atol=1e-5, rtol=0)
    total = torch.zeros(())
    for i, prompt in enumerate(rollouts.prompts.prompts):
        y = rollouts.completion_ids[i, : rollouts.lengths[i]]
        ids, start = torch.cat([torch.tensor(prompt.token_ids), y])[None], len(prompt.token_ids) - 1
        log_p = module.student(ids).logits[0, start:-1].log_softmax(-1)
        total = total - advantage[i] * log_p.gather(1, y[:, None]).sum()
    (total / rollouts.num_tokens).backward()
    for a, b, p in zip(
        gradients["with"], gradients["without"], module.student.parameters(), strict=True
    ):
        torch.testing.assert_close(a - b, p.grad, rtol=1e-3, atol=2e-5)


REWARDED = ["--model.objective", "opd.objectives.PolicyGradient", "--model.rollouts_per_prompt"]
REWARDED += ["4", "--model.reward.of"]
CORRECT = "opd.rewards.Correctness"


def rows(folder):
    return [row for row in read_metrics(folder / "metrics.csv") if "opd/loss" in row]


def test_a_run_logs_the_reward_and_learns_from_it(fit):
    plain = rows(fit("plain", *REWARDED[:-1]))
    rewarded = rows(fit("run", *REWARDED, CORRECT, "--model.reward.weight", "3"))
    for row in rewarded:
        assert float(row["rollout/reward"]) == pytest.approx(float(row["rollout/accuracy"]))
        assert 0 < float(row["rollout/reward"]) < 1
    assert rewarded[0]["rollout/accuracy"] == plain[0]["rollout/accuracy"]
    # In the loss, advantages of completions of one length cancel
    ours, theirs = (float(row["optim/grad_norm"]) for row in (rewarded[0], plain[0]))
    assert ours != pytest.approx(theirs, rel=0.01)
    assert "rollout/reward" not in plain[0]


def share_of_digits(texts, prompts):
    """A reward as many write it: from texts and answers alone."""
    assert all(prompt.answer for prompt in prompts)
    return [sum(c.isdigit() for c in t) / len(t) if t else math.nan for t in texts]


def test_a_function_is_a_reward(fit):
    own = ["opd.rewards.FromFunction", "--model.reward.of.function", "test_reward.share_of_digits"]
    (row,) = rows(fit("run", *REWARDED, *own, steps=1))
    assert 0.5 < float(row["rollout/reward"]) < 1.0  # 369c0;257c0;145c0=0579


@pytest.mark.slow
def test_two_processes_give_the_rewards_that_one_gives(tmp_path, fit):
    own = [*REWARDED, "test_reward.Length", "--model.reward.advantage", "opd.rewards.Centred"]
    own += ["--data.batch_size", "6", "--trainer.log_every_n_steps", "1"]
    one, two = (
        rows(fit("one", *own, steps=1)),
        rows(launch(2, tmp_path / "two", *DDP, *own, steps=1)),
    )
    for name in ("rollout/reward", "opd/loss", "optim/grad_norm"):
        ours, theirs = ([float(row[name]) for row in of] for of in (two, one))
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_nothing_that_would_come_to_nothing():
    with pytest.raises(UserError, match=r"reward.weight=0.0 must be above 0"):
        RewardTerm(Correctness(), weight=0.0)
    for advantage in (GroupNormalized(), Centred()):
        with pytest.raises(UserError, match=r"and model.rollouts_per_prompt is 1"):
            RewardTerm(Correctness(), advantage).check_copies(1)
    RewardTerm(Correctness(), AsGiven()).check_copies(1)
    unanswered = [Prompt(0, (1,))]
    with pytest.raises(UserError, match=r"no prompt of data.train has an answer"):
        Correctness().check(unanswered)
    Correctness().check([*unanswered, dataclasses.replace(unanswered[0], answer="1")])
