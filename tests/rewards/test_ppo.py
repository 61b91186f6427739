"""PPO in the step of distillation: GAE by hand, the value head's fit, and runs."""

import json
import math

import pytest
import torch
from conftest import DDP, FSDP1, FSDP2, ROOT, SHRUNK, assert_same, launch, load, load_any
from test_rl import GRPO, module_of, steps_of
from test_step import batch_of

from opd import stages
from opd.rewards import GAE, Reward, RewardTerm
from opd.rewards.critic import Critic, Moments, generalized_advantages
from opd.step import sample

# --- generalized advantage estimation -------------------------------------------------------------

VALUES = [0.2, 0.4, 0.6]  # and a reward of 1 at the last token


@pytest.mark.parametrize(
    ("gamma", "gae_lambda", "expected"),
    [
        (1.0, 0.0, [0.2, 0.2, 0.4]),  # delta: 0.4 - 0.2, 0.6 - 0.4, 1 - 0.6
        (1.0, 1.0, [0.8, 0.6, 0.4]),  # the return less the value
        (1.0, 0.5, [0.4, 0.4, 0.4]),  # 0.2 + 0.5 * 0.4
        (0.5, 0.5, [0.0, 0.0, 0.4]),  # delta: 0, -0.1, 0.4
        (0.5, 1.0, [0.05, 0.1, 0.4]),  # 0.25 - 0.2, 0.5 - 0.4
    ],
)
def test_generalized_advantages_by_hand(gamma, gae_lambda, expected):
    """Of three tokens; of the same with one between them that nobody has sampled; and of one."""
    values = [[*VALUES, 9.0], [0.2, 9.0, 0.4, 0.6], [0.3, 9.0, 9.0, 9.0]]
    mask = [[1, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 0]]
    found = generalized_advantages(
        torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(mask).bool(),
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    a, b, c = expected
    wanted = torch.tensor([[a, b, c, 0], [a, 0, b, c], [-1.3, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)


# --- the value head -------------------------------------------------------------------------------


def batch(tokens=200, width=5, seed=0):
    """Hidden states of unlike scales, and returns that are linear in them but for some noise."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator) * torch.logspace(-1, 1, width) + 0.5
    returns = hidden @ torch.arange(1.0, width + 1) - 2.0
    return hidden, returns, 0.3 * torch.randn(tokens, generator=generator)


def moments_of(hidden, returns):
    moments = Moments.none(hidden.shape[1] + 1, torch.device("cpu"))
    for some in torch.arange(len(hidden)).chunk(3):
        moments.add(Critic.features(hidden[some]), returns[some])
    return moments


def test_a_fit_is_where_the_gradient_of_its_objective_is_zero():
    hidden, returns, noise = batch()
    critic = Critic(5)
    critic.weight.copy_(torch.randn(6, generator=torch.Generator().manual_seed(1)))
    old = critic.weight.clone().double()
    critic.fit(moments_of(hidden, returns + noise), damping=0.3)
    x = torch.cat([hidden, torch.ones(200, 1)], dim=1).double()
    w = critic.weight.double().requires_grad_()
    spread = (x - x.mean(dim=0)).square().sum(dim=0)  # 0 of the constant, which is free
    held_back = 0.3 * (spread * (w - old).square()).sum()
    objective = (x @ w - returns - noise).square().sum() + held_back
    (slope,) = torch.autograd.grad(objective, w)
    (at_first,) = torch.autograd.grad(
        (x @ old.requires_grad_() - returns - noise).square().sum(), old
    )
    assert slope.norm() < 1e-4 * at_first.norm()


def test_the_value_head_converges_to_linear_returns():
    critic, errors = Critic(5), []
    for seed in range(20):
        hidden, returns, _ = batch(seed=seed)
        errors.append((critic(Critic.features(hidden)) - returns).square().mean().item())
        critic.fit(moments_of(hidden, returns), damping=0.1)
    assert errors[0] > 100
    assert errors[-1] < 1e-6
    torch.testing.assert_close(
        critic.weight, torch.tensor([1.0, 2, 3, 4, 5, -2]), rtol=0, atol=1e-3
    )


def test_scale_and_mean_of_a_feature_do_not_matter_and_one_that_is_always_0_keeps_its_weight():
    hidden, returns, _ = batch()
    first, second = Critic(5), Critic(6)
    first.fit(moments_of(hidden, returns), damping=0.1)
    scaled = torch.cat([hidden * 100 + 50, torch.zeros(200, 1)], dim=1)
    second.weight[5] = 7.0
    second.fit(moments_of(scaled, returns), damping=0.1)
    assert second.weight[5] == 7
    torch.testing.assert_close(second.weight[:5] * 100, first.weight[:5], rtol=1e-3, atol=1e-4)
    before = first.weight.clone()
    first.fit(moments_of(hidden[:0], returns[:0]), damping=0.1)
    assert torch.equal(first.weight, before)


# --- a step ---------------------------------------------------------------------------------------


class SomeRewards(Reward):
    """By the number of characters, and none for the second completion."""

    def __call__(self, rollouts, texts):
        return [math.nan if i == 1 else len(text) / 10 for i, text in enumerate(texts)]


def written_out(module, weight, rollouts, gamma, gae_lambda):
    """Features, advantages and returns of each completion with a reward, token by token."""
    found = []
    for i, prompt in enumerate(rollouts.prompts.prompts):
        y = rollouts.completion_ids[i, : rollouts.lengths[i]]
        ids, start = torch.cat([torch.tensor(prompt.token_ids), y])[None], len(prompt.token_ids) - 1
        with torch.no_grad():
            hidden = module.student.model(ids).last_hidden_state[0, start:-1]
        x = torch.cat([hidden, torch.ones(len(y), 1)], dim=1).double()
        v = [*(x @ weight.double()).tolist(), 0.0]
        r = [0.0] * (len(y) - 1) + [rollouts.columns["reward"][i].item()]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(y))]
        a = [
            sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, len(y)))
            for t in range(len(y))
        ]
        found.append((x, torch.tensor(a).double(), torch.tensor(a).double() + x @ weight.double()))
    return found


@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_and_the_fit_are_those_written_out(tiny, normalize):
    """In several micro-batches; some completions end, others are cut off, and one has no reward."""
    term = RewardTerm(SomeRewards(), GAE(0.9, 0.8, normalize=normalize, damping=0.2), weight=2.0)
    module = module_of(tiny, term, micro_batch_tokens=64)
    generator = torch.Generator().manual_seed(0)
    module.critic.weight.copy_(0.1 * torch.randn(33, generator=generator))
    before = module.critic.weight.clone()
    rollouts = sample(module, batch_of(module), 1)
    assert 0 < rollouts.finished.sum() < len(rollouts)
    found = written_out(module, before, rollouts, 0.9, 0.8)
    known = [of for i, of in enumerate(found) if i != 1]
    x, advantage, returns = (torch.cat(parts) for parts in zip(*known, strict=True))
    shift, scale = (advantage.mean(), advantage.std(correction=0)) if normalize else (0.0, 1.0)
    for i, (_, a, _) in enumerate(found):
        wanted = torch.zeros(rollouts.completion_ids.shape[1])
        if i != 1:
            wanted[: len(a)] = (2 * (a - shift) / scale).float()
        torch.testing.assert_close(rollouts.columns["advantage"][i], wanted, rtol=1e-3, atol=1e-4)
    explained = module.train_metrics.compute()["rl/explained_variance"]
    assert explained == pytest.approx((1 - advantage.var() / returns.var()).item(), abs=1e-4)
    held = (0.2 * (x - x.mean(dim=0)).square().sum(dim=0)).sqrt().diag()
    rows, targets = torch.cat([x, held]), torch.cat([returns, held @ before.double()])
    wanted = torch.linalg.lstsq(rows, targets).solution
    torch.testing.assert_close(module.critic.weight.double(), wanted, rtol=1e-3, atol=1e-4)


def test_a_pass_that_is_made_for_other_ranks_changes_nothing(tiny, monkeypatch):
    own = stages.micro_batches
    found = []
    for extra in (False, True):
        if extra:
            monkeypatch.setattr(
                stages, "micro_batches", lambda m, r: [*own(m, r), r.placeholder(None)]
            )
        module = module_of(tiny, RewardTerm(SomeRewards(), GAE()))
        rollouts = sample(module, batch_of(module), 1)
        found.append([rollouts.columns["advantage"], module.critic.weight])
    assert_same(*found)


def test_completions_count_alike_where_they_should(tiny):
    """By the mean length over each one's own, after all."""
    found = [
        sample(module, batch_of(module), 1)
        for per in ("token", "completion")
        for module in [module_of(tiny, RewardTerm(SomeRewards(), GAE(), per=per))]
    ]
    lengths = found[0].lengths
    share = (lengths.float().mean() / lengths)[:, None]
    ours, plain = found[1].columns["advantage"], found[0].columns["advantage"]
    assert share.min() < 0.9
    torch.testing.assert_close(ours, plain * share)


# --- runs -----------------------------------------------------------------------------------------

PPO = ["--config", str(ROOT / "configs" / "rl" / "ppo.yaml"), *SHRUNK]
PPO += ["--data.batch_size", "24", "--data.validation_limit", "8"]


def test_the_recipe_runs_with_one_completion_of_each_prompt(fit_recipe):
    folder = fit_recipe("run", *PPO, steps=3)
    rows, summary = steps_of(folder), json.loads((folder / "summary.json").read_text())
    assert summary["cost"]["teacher_tokens"] == 0
    for row in rows:
        assert float(row["optim/grad_norm"]) > 0
        assert float(row["reuse/steps"]) == 4
        assert float(row["rl/ratio"]) == pytest.approx(1, abs=1e-5)
        assert abs(float(row["reuse/ratio"]) - 1) > 1e-6
    assert load(folder)["state_dict"]["critic.weight"].abs().max() > 0


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(fit_recipe):
    fit_recipe("resumed", *PPO, steps=1)
    resumed = fit_recipe("resumed", *PPO, "--ckpt_path", "last", steps=3)
    straight = fit_recipe("straight", *PPO, steps=3)
    for key in ("state_dict", "optimizer_states", "random_state"):
        assert_same(load(resumed)[key], load(straight)[key])


def test_a_run_without_a_value_head_goes_on_with_one_and_back(fit_recipe):
    several = ["--model.rollouts_per_prompt", "2"]
    fit_recipe("run", *GRPO, *SHRUNK, *several, steps=1)
    with_one = fit_recipe("run", *PPO, *several, "--ckpt_path", "last", steps=2)
    assert "critic.weight" in load(with_one)["state_dict"]
    without = fit_recipe("run", *GRPO, *SHRUNK, *several, "--ckpt_path", "last", steps=3)
    assert "critic.weight" not in load(without)["state_dict"]


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(DDP, id="ddp", marks=pytest.mark.slow),
        pytest.param(FSDP2, id="fsdp2", marks=pytest.mark.slow),
        pytest.param(FSDP1, id="fsdp1", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_numbers_of_one(tmp_path, fit_recipe, strategy):
    """Of 23 completions one rank has twelve, in several micro-batches."""
    options = [*PPO, "--data.batch_size", "23", "--model.micro_batch_tokens", "100"]
    options += ["--model.reward.of", "test_rl.Length"]
    one = fit_recipe("one", *options, steps=3)
    two = launch(2, tmp_path / "two", *strategy, *options, steps=3)
    names = ["opd/loss", "optim/grad_norm", "rl/explained_variance", "reuse/clip_fraction"]
    for name in names:
        ours, theirs = ([float(row[name]) for row in steps_of(folder)] for folder in (two, one))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6), name
    ours, theirs = (load_any(folder)["state_dict"]["critic.weight"] for folder in (two, one))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_shards_are_resumed_with_the_value_head(tmp_path):
    options = [*FSDP2, *PPO]
    launch(2, tmp_path / "resumed", *options, steps=1)
    launch(2, tmp_path / "resumed", *options, "--ckpt_path", "last", steps=3)
    launch(2, tmp_path / "straight", *options, steps=3)
    states = [load_any(tmp_path / name)["state_dict"] for name in ("resumed", "straight")]
    assert "critic.weight" in states[0]
    assert_same(*states)
