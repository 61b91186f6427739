"""RL in the step of distillation: GRPO and DAPO as they are defined, on one process and on two."""

import copy
import json
import math

import pytest
import torch
from conftest import (
    DDP,
    FSDP2,
    QUICKSTART,
    ROOT,
    SHRUNK,
    assert_same,
    launch,
    load,
    slow_but,
    student_of,
)
from test_step import StepRequest, batch_of

from opd.cli import main
from opd.errors import UserError
from opd.metrics_rows import read_metrics
from opd.module import OPDModule
from opd.objectives import ClippedPolicyGradient
from opd.prompts import Prompt, PromptBatch
from opd.reuse import Reuse
from opd.rewards import Centred, Overlong, Reward, RewardTerm
from opd.rewards.reward import differing, equal_shares
from opd.rollouts import Rollouts
from opd.step import sample, sample_until, take_step
from opd.world import World

COPIES = 3
NAN = math.nan


class Length(Reward):
    """Minus the number of characters, a tenth each."""

    def __call__(self, rollouts, texts):
        return [-len(text) / 10 for text in texts]


class Rows(Reward):
    """1 and 0 and 0 for the completions of some prompts, 0 for all others."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, rollouts, texts):
        prompts = rollouts.prompts.prompts
        return [float(i % COPIES == 0 and p.row in self.rows) for i, p in enumerate(prompts)]


def module_of(tiny, reward, **options):
    options = {"objective": ClippedPolicyGradient(0.1, 0.15), "max_new_tokens": 16, **options}
    options["eos_token_ids"] = list(range(20, 60))  # so that lengths differ
    student = str(tiny / "llama-student")
    module = OPDModule(student, None, reward=reward, rollouts_per_prompt=COPIES, **options)
    module.configure_model()
    return module


def step_of(module, rate):
    optimizer = torch.optim.SGD(module.student.parameters(), lr=rate)
    return take_step(module, batch_of(module), StepRequest(), optimizer, None)


# --- the loss -------------------------------------------------------------------------------------


def written_out(student, rollouts, per):
    """GRPO's or DAPO's loss of all completions, each by itself, and the share that is clipped."""
    losses, clipped = [], []
    for i, prompt in enumerate(rollouts.prompts.prompts):
        y = rollouts.completion_ids[i, : rollouts.lengths[i]]
        group = slice(i // COPIES * COPIES, i // COPIES * COPIES + COPIES)
        reward = rollouts.columns["reward"].double()
        advantage = (reward[i] - reward[group].mean()).item()
        ids, start = torch.cat([torch.tensor(prompt.token_ids), y])[None], len(prompt.token_ids) - 1
        log_p = student(ids).logits[0, start:-1].log_softmax(-1).gather(1, y[:, None])[:, 0]
        rho = (log_p - rollouts.engine_logprobs[i, : len(y)]).exp()
        bounded = rho.clamp(max=1.15) if advantage > 0 else rho.clamp(min=0.9)
        losses.append(-torch.minimum(rho * advantage, bounded * advantage))
        clipped.append((bounded != rho) & (advantage != 0))
    share = torch.cat(clipped).double().mean().item()
    if per == "completion":
        return torch.stack([loss.mean() for loss in losses]).mean(), share
    return torch.cat(losses).mean(), share


@pytest.mark.parametrize("per", ["token", "completion"])
def test_three_steps_on_a_batch_are_those_of_the_loss_written_out(tiny, per):
    """A mean over tokens, or over completions of such means; from the second on, with clips."""
    term = RewardTerm(Length(), Centred(), per=per)
    module = module_of(tiny, term, max_grad_norm=1e9, reuse=Reuse(3, held_out=0.0))
    student = copy.deepcopy(module.student)
    rollouts = sample(module, batch_of(module), 1)
    assert len(set(rollouts.lengths.tolist())) > 1
    module.train_metrics.reset()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
    losses, shares = [], []
    for _ in range(3):
        loss, share = written_out(student, rollouts, per)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        shares.append(share)
    output = step_of(module, 0.3)
    for ours, theirs in zip(module.student.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    found = module.train_metrics.compute()
    assert found["opd/loss"] == pytest.approx(losses[0], abs=1e-5)
    assert (shares[0], found["rl/clip_fraction"]) == (0, 0)
    assert output.update["reuse/clip_fraction"] == pytest.approx(sum(shares[1:]) / 2, abs=0.01)
    assert output.update["reuse/clip_fraction"] > 0.05
    assert output.update["reuse/steps"] == 3


def test_completions_of_all_ranks_have_equal_shares():
    """f_i / T sum_t l_it is 1/N of the mean of l_it over t; the other rank has 2 of 9 tokens."""
    counts = torch.tensor([2, 5, 4])
    shares = equal_shares(counts, lambda mine: mine + torch.tensor([9.0, 2.0]))
    assert shares.dtype == torch.float64
    loss = [torch.randn(n, dtype=torch.float64) for n in counts]
    found = sum(share * of.sum() for share, of in zip(shares, loss, strict=True)) / (11 + 9)
    torch.testing.assert_close(found, sum(of.mean() for of in loss) / (3 + 2))


# --- overlong completions -------------------------------------------------------------------------


class Given(Reward):
    def __call__(self, rollouts, texts):
        return [1.0, 0.0, 1.0, 1.0, NAN, 1.0]


def of_lengths(*lengths):
    counts = torch.tensor(lengths)
    batch = PromptBatch.collate([Prompt(0, (5, 6))], 0).repeat(len(counts))
    zeros = torch.zeros(len(counts), max(lengths))
    return Rollouts(batch, zeros.long(), counts, counts > 0, zeros)


@pytest.mark.parametrize("overlong", [Overlong(8, longest=20), Overlong(8)])
def test_the_penalty_of_overlong_completions_by_hand(overlong):
    """Equation 13 of 2503.14476, from 20 - 8 to 20 tokens: 0, 0, -1/8, -1/2, ., -1."""
    limit = 25 if overlong.longest else 20  # what is not named is the run's
    term = RewardTerm(Given(), Centred(), overlong=overlong)
    found = term.columns(of_lengths(3, 12, 13, 16, 20, 25), [""] * 6, 3, limit)
    reward = [1, 0, 0.875, 0.5, NAN, 0]
    torch.testing.assert_close(found["reward"], torch.tensor(reward), equal_nan=True)
    expected = [0.375, -0.625, 0.25, 0.25, 0, -0.25]
    torch.testing.assert_close(found["advantage"], torch.tensor(expected))
    outcome = torch.tensor([1.0, 0, 1, 1, NAN, 1])
    torch.testing.assert_close(found["outcome"], outcome, equal_nan=True)


@pytest.mark.parametrize("overlong", [Overlong(0), Overlong(25), Overlong(8, 7), Overlong(8, 25)])
def test_a_penalty_that_is_always_there_or_never_is_refused(overlong):
    Overlong(1, 1).check(24)
    Overlong(24).check(24)
    with pytest.raises(UserError, match=r"overlong: buffer=\d+ must be at least 1"):
        overlong.check(24)


# --- dynamic sampling -----------------------------------------------------------------------------


def test_prompts_whose_completions_have_different_rewards():
    rows = [[1, 1, 1], [0, 1, 0], [NAN, 1, 0], [NAN, 1, 1], [NAN, NAN, NAN], [-3, -3, -2]]
    assert differing(torch.tensor(rows).flatten(), 3) == [1, 2, 5]
    assert differing(torch.zeros(0), 3) == []


@pytest.mark.parametrize(
    ("fewest", "rows", "sampled", "kept"),
    [
        (1, {1, 3}, 2, [1]),  # row 0, then row 1
        (2, {1, 3}, 4, [1, 3]),  # rows 0 and 1, then 2 and 3
        (2, {0, 1}, 2, [0, 1]),
        (3, {1, 3}, 4, [1, 3]),  # one of rows 0 to 2, then row 3: the batch is used up
        (3, {0, 1, 2, 3}, 3, [0, 1, 2]),
        (3, {0, 1, 3}, 4, [0, 1, 3]),
        (2, {0, 2, 3}, 4, [0, 2, 3]),  # one more than was asked for is not thrown away
        (2, {}, 4, []),
    ],
)
def test_sampling_goes_on_until_enough_prompts_differ(tiny, fewest, rows, sampled, kept):
    module = module_of(tiny, RewardTerm(Rows(rows), dynamic=fewest))
    found = sample(module, batch_of(module), 1)
    metrics = module.train_metrics.compute()
    every = sample(module_of(tiny, RewardTerm(Rows(rows))), batch_of(module), 1)
    mine = [row * COPIES + i for row in kept for i in range(COPIES)]
    assert [p.row for p in found.prompts.prompts] == [row for row in kept for _ in range(COPIES)]
    for name in ("completion_ids", "engine_logprobs", "lengths", "finished"):
        torch.testing.assert_close(getattr(found, name), getattr(every.select(mine), name))
    for name in ("advantage", "reward", "right", "lot"):
        ours, theirs = found.columns[name], every.columns[name][mine]
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert metrics["rollout/dropped_fraction"] == pytest.approx(1 - len(kept) / sampled)
    tokens = every.lengths[: sampled * COPIES].sum().item()
    assert metrics["rollout/tokens"] == tokens
    module.ledger.synchronize(lambda value: value, 1)
    assert module.ledger.totals["rollout_tokens"] == tokens


def test_prompts_that_differ_by_their_lengths_alone_are_left_out(tiny):
    """Accuracy is what DAPO asks: 2503.14476, equation 11."""
    term = RewardTerm(Rows({1}), overlong=Overlong(buffer=9, longest=9), dynamic=4)
    found = sample(module_of(tiny, term), batch_of(module_of(tiny, term)), 1)
    assert {prompt.row for prompt in found.prompts.prompts} == {1}
    every = sample(module_of(tiny, RewardTerm(Length())), batch_of(module_of(tiny, term)), 1)
    assert len(differing(every.columns["reward"], COPIES)) > 1


class SecondOfTwo(World):
    """Rank 1 of 2; the other rank finds as many prompts as it is said to."""

    def __init__(self, found):
        super().__init__()
        self.rank, self.size, self.others = 1, 2, iter(found)

    def sum(self, value):
        return value + next(self.others)


def test_prompts_are_taken_in_the_order_of_all_ranks(tiny, monkeypatch):
    """This rank's prompts are the 2nd, 4th, 6th and 8th; rounds of three: 1 2 3, 4 5 6."""
    module = module_of(tiny, RewardTerm(Rows({2}), dynamic=3))
    ranks = SecondOfTwo([4, 1, 1])  # it has four prompts, and finds one in each round
    monkeypatch.setattr(OPDModule, "world", property(lambda _: ranks))
    found, rows = sample_until(module, batch_of(module), 1, None, 3)
    assert rows == [2]  # 1 + 0, then 1 + 1, so that its last prompt is not sampled
    assert [p.row for p in found.prompts.prompts] == [2] * COPIES
    assert module.train_metrics.compute()["rollout/dropped_fraction"] == pytest.approx(2 / 3)


def test_a_step_from_which_nothing_can_be_learnt_leaves_the_weights(tiny):
    module = module_of(tiny, RewardTerm(Rows({}), dynamic=2))
    before = copy.deepcopy(module.student.state_dict())
    output = step_of(module, 1.0)
    assert output.update["optim/grad_norm"] == 0
    assert_same(dict(module.student.state_dict()), dict(before))


# --- runs -----------------------------------------------------------------------------------------

GRPO, DAPO = (["--config", str(ROOT / "configs" / "rl" / f"{n}.yaml")] for n in ("grpo", "dapo"))
SMALL = [*SHRUNK, "--data.batch_size", "12", "--model.rollouts_per_prompt", "4"]
SMALL += ["--data.validation_limit", "8"]
FEWEST = ["--model.reward.dynamic", "4"]


def steps_of(folder):
    return [row for row in read_metrics(folder / "metrics.csv") if "opd/loss" in row]


@pytest.mark.parametrize(("recipe", "options"), [(GRPO, SMALL), (DAPO, [*SMALL, *FEWEST])])
def test_a_recipe_runs_without_a_teacher(fit_recipe, recipe, options):
    folder = fit_recipe("run", *recipe, *options)
    rows, summary = steps_of(folder), json.loads((folder / "summary.json").read_text())
    assert summary["cost"]["teacher_tokens"] == 0
    assert 0 < summary["accuracy"]["final"] < 1
    assert summary["reverse_kl"] == {"initial": None, "final": None}
    names = set().union(*read_metrics(folder / "metrics.csv"))
    assert {"opd/student_entropy", "val/student_entropy", "rl/ratio", "rollout/reward"} <= names
    assert not [n for n in names if "teacher_" in n and not n.startswith("cost/")]
    assert not {"opd/reverse_kl", "val/reverse_kl", "opd/overlap_at_16"} & names
    for row in rows:
        assert float(row["optim/grad_norm"]) > 0
        assert float(row["rl/ratio"]) == pytest.approx(1, abs=1e-5)
        trained = 1 - float(row.get("rollout/dropped_fraction", 0))
        assert trained == 1 if recipe is GRPO else 0 < trained <= 1


def test_a_teacher_that_is_named_is_measured_and_not_trained_on(fit_recipe):
    alone = fit_recipe("alone", *GRPO, *SMALL)
    watched = fit_recipe("watched", *GRPO, *SMALL, "--model.teacher", "embedded:teacher")
    assert_same(student_of(load(watched)), student_of(load(alone)))
    assert all(float(row["opd/reverse_kl"]) > 0.01 for row in steps_of(watched))


@pytest.mark.parametrize("strategy", slow_but("reuse", "dynamic"))
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(fit_recipe, strategy):
    several = ["--model.reuse.steps", "3", "--model.reuse.held_out", "0"]
    options = [*DAPO, *SMALL, *FEWEST, *(several if strategy == "reuse" else [])]
    fit_recipe("resumed", *options, steps=1)
    resumed = fit_recipe("resumed", *options, "--ckpt_path", "last", steps=3)
    straight = fit_recipe("straight", *options, steps=3)
    for key in ("state_dict", "optimizer_states", "random_state"):
        assert_same(load(resumed)[key], load(straight)[key])
    assert [row["step"] for row in steps_of(resumed)] == ["1", "2", "3"]
    assert load(straight)["global_step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("recipe", [GRPO, DAPO], ids=["grpo", "dapo"])
def test_two_processes_give_the_numbers_of_one(tmp_path, fit_recipe, strategy, recipe):
    """A reward that depends on the length, a reference, several steps: sums over ranks of all."""
    options = [*recipe, *SMALL, "--model.objective.kl", "0.5", "--model.temperature", "2"]
    options += ["--model.reuse.steps", "2", "--model.reuse.held_out", "0"]
    options += ["--model.optimizer.lr", "1e-3", *(FEWEST if recipe is DAPO else [])]
    one = steps_of(fit_recipe("one", *options))
    two = steps_of(launch(2, tmp_path / "two", *strategy, *options))
    names = ["opd/loss", "optim/grad_norm", "rollout/reward", "rollout/tokens", "rl/kl"]
    names += ["cost/rollout_tokens", "cost/train_tokens", "reuse/ratio", "reuse/clip_fraction"]
    names += ["rollout/dropped_fraction"] if recipe is DAPO else []
    for name in names:
        ours, theirs = ([float(row[name]) for row in of] for of in (two, one))
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6), name


class Nothing(Reward):
    """The same for all: nothing can be learnt."""

    def __call__(self, rollouts, texts):
        return [0.5] * len(texts)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_take_a_step_from_which_nothing_can_be_learnt(tmp_path, strategy):
    nothing = [*FEWEST, "--model.reward.of", "test_rl.Nothing"]
    folder = launch(2, tmp_path / "two", *strategy, *DAPO, *SMALL, *nothing)
    rows = [row for row in read_metrics(folder / "metrics.csv") if "optim/grad_norm" in row]
    assert [float(row["rollout/dropped_fraction"]) for row in rows] == [1, 1]
    assert [float(row["optim/grad_norm"]) for row in rows] == [0, 0]


def test_predictions_and_validation_need_no_teacher(tmp_path, capsys):
    options = ["--config", QUICKSTART, *GRPO, "--data.validation_limit", "4"]
    output = tmp_path / "predictions"
    assert main(["predict", *options, "--output", str(output)]) == 0
    records = map(json.loads, (output / "predictions.jsonl").read_text().splitlines())
    for record in records:
        assert len(record["student_logprob"]) == len(record["completion_ids"])
        assert not {"teacher_logprob", "reverse_kl"} & set(record)
    assert main(["validate", *options]) == 0
    printed = capsys.readouterr().out
    assert "val/accuracy" in printed
    assert "val/reverse_kl" not in printed
