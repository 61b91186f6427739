"""Several optimizer steps on a batch of rollouts, against a plain loop; and what is undone."""

import copy
import itertools
import json

import pytest
import torch
from conftest import (
    CPU,
    ROOT,
    STRATEGIES,
    assert_same,
    launch,
    load,
    load_any,
    run_fit,
    slow_but,
    student_of,
)
from test_distributed import dealt, largest_difference, summary  # noqa: F401 - a fixture
from test_numbers import louden
from test_step import batch_of, module_of, rollouts_of

from opd import reuse, stages
from opd.errors import OutOfMemoryError, UserError
from opd.extrapolation import Score
from opd.metrics_rows import read_metrics
from opd.objectives import FixedNegativeAdvantage, ForwardKL, PolicyGradient, ReverseKL, reverse_kl
from opd.randomness import derive_seed
from opd.reuse import Reuse, Reused, further_steps, importance_weights
from opd.rollouts import TransformersEngine
from opd.scores import TeacherKL
from opd.step import StepRequest, take_step
from opd.weights import Weights

TEMPERATURE = 1.3
ALWAYS = 1e9  # a margin that undoes nothing


@pytest.fixture(scope="module")
def loud(tiny, tmp_path_factory):
    """Two Llamas that are far from flat, and disagree."""
    folder = tmp_path_factory.mktemp("loud")
    for role, factor in [("student", 6.0), ("teacher", 8.0)]:
        louden(tiny / f"llama-{role}", folder / f"llama-{role}", factor)
    return folder


def module_with(tiny, again, **options):
    options = {"rollouts_per_prompt": 2, "temperature": TEMPERATURE, **options}
    return module_of(tiny, reuse=again, micro_batch_tokens=60, **options)


def adam(module, rate=0.01):
    return torch.optim.AdamW(module.student.parameters(), lr=rate, weight_decay=0.1)


def step_with(module, optimizer, request=StepRequest(), scheduler=None):  # noqa: B008 - frozen
    return take_step(module, batch_of(module), request, optimizer, scheduler)


def everything(module, optimizer):
    return dict(module.student.state_dict()), optimizer.state_dict()


# --- importance weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["sampled", "previous"])
def test_importance_weights_by_hand(tiny, of):
    """p / mu of the token or of the one before, at most 5; 1 before the first; 0 at padding."""
    rollouts = rollouts_of(module_of(tiny))
    ratios = [[0.5, 2.0, 100.0, 4.0], [3.0], [], [1.5, 0.25]]
    lengths = [len(row) for row in ratios]
    four = rollouts.select(range(4))
    four.lengths[:] = torch.tensor(lengths)
    mu = torch.rand(four.engine_logprobs.shape).add(0.1).log()
    four.engine_logprobs[:] = mu * four.mask
    logp_y = (
        four.engine_logprobs[four.mask] + torch.tensor([*ratios[0], *ratios[1], *ratios[3]]).log()
    )
    expected = {
        "sampled": [[0.5, 2, 5, 4], [3, 0, 0, 0], [0, 0, 0, 0], [1.5, 0.25, 0, 0]],
        "previous": [[1, 0.5, 2, 5], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1.5, 0, 0]],
    }[of]
    found = importance_weights(logp_y, four, of)
    torch.testing.assert_close(found[:, :4], torch.tensor(expected))
    assert not found[:, 4:].any()


def test_a_loss_is_weighed_by_the_last_token_that_it_depends_on():
    assert ReverseKL().ratio_of == ForwardKL().ratio_of == "previous"
    assert FixedNegativeAdvantage().ratio_of == "sampled"
    assert PolicyGradient(importance_cap=None).ratio_of == "sampled"
    assert PolicyGradient().ratio_of is None  # it weighs its loss itself


# --- steps ----------------------------------------------------------------------------------------


def loss_of(student, teacher, trained, objective):
    """Mean over all tokens of the weighed loss; each row by itself, unpadded. And the ratios."""
    total, ratios = torch.zeros(()), []
    for micro in trained:
        for i, prompt in enumerate(micro.prompts.prompts):
            y = micro.completion_ids[i, : micro.lengths[i]]
            ids = torch.cat([torch.tensor(prompt.token_ids), y])[None]
            log_p, log_q = (
                (model(ids).logits[0, len(prompt.token_ids) - 1 : -1] / TEMPERATURE).log_softmax(-1)
                for model in (student, teacher)
            )
            logp_y, logq_y = (x.gather(1, y[:, None]).squeeze(1) for x in (log_p, log_q))
            ratio = (logp_y.detach() - micro.engine_logprobs[i, : len(y)]).exp().clamp(max=5)
            if isinstance(objective, ReverseKL):
                loss, weight = reverse_kl(log_p, log_q), torch.cat([torch.ones(1), ratio[:-1]])
            else:
                loss, weight = -(logq_y - logp_y).detach() * logp_y, ratio
            total = total + (weight * loss).sum()
            ratios.append(ratio)
    return total / sum(len(ratio) for ratio in ratios), torch.cat(ratios)


@pytest.mark.parametrize(
    "objective", [ReverseKL(), PolicyGradient(), PolicyGradient(importance_cap=None)]
)
def test_steps_are_those_of_a_plain_loop_on_the_same_tokens(loud, objective):
    """SGD with momentum, a clip that bites, a factor of the rate; a scheduler that waits."""
    module = module_with(loud, Reuse(3, 0.25, ALWAYS), objective=objective, max_grad_norm=0.05)
    plain, teacher = copy.deepcopy(module.student), module.teachers["default"].model
    optimizer, ours = (
        torch.optim.SGD(student.parameters(), lr=4.0, momentum=0.9)
        for student in (module.student, plain)
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    request = StepRequest(learning_rate_factor=0.5)
    output = step_with(module, optimizer, request, scheduler)
    norms, ratios = [], []
    for group in ours.param_groups:
        group["lr"] = 2.0
    for _ in range(3):
        loss, ratio = loss_of(plain, teacher, output.micro_batches, objective)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)))
        ratios.append(ratio)
        ours.step()
        ours.zero_grad()
    assert min(norms) > 0.05
    assert (ratios[2] - 1).abs().mean() > 0.02  # the student is another by then
    for found, expected in zip(module.student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
    assert output.update["reuse/steps"] == 3
    assert output.update["reuse/undone"] == 0
    assert output.update["reuse/ratio"] == pytest.approx(
        float(torch.cat(ratios[1:]).mean()), rel=1e-4
    )
    assert output.update["optim/grad_norm"] == pytest.approx(norms[0], rel=1e-4)
    assert output.update["optim/lr"] == pytest.approx(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)


class Behind(TransformersEngine):
    """Says that weights of a step before have sampled, and so how likely they found each token."""

    staleness = 1

    def __call__(self, prompts, sampler, seeds):
        rollouts = super().__call__(prompts, sampler, seeds)
        noise = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(3))
        rollouts.engine_logprobs += noise * rollouts.mask
        return rollouts


@pytest.mark.parametrize("objective", [ReverseKL(), PolicyGradient()])
def test_completions_of_a_step_before_are_weighed_too(loud, objective):
    module = module_with(loud, None, objective=objective, engine=Behind(), max_grad_norm=1e9)
    plain, teacher = copy.deepcopy(module.student), module.teachers["default"].model
    optimizer = torch.optim.SGD(module.student.parameters(), lr=1.0)
    output = step_with(module, optimizer)
    loss, ratio = loss_of(plain, teacher, output.micro_batches, objective)
    loss.backward()
    assert ratio.min() < 0.5
    assert ratio.max() == 5
    for found, before in zip(module.student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, before - before.grad, rtol=1e-4, atol=2e-6)
    if isinstance(objective, ReverseKL):  # of the other, the gradient is the definition
        ours = torch.cat([values["opd/loss"] for values in output.values]).mean()
        assert float(ours) == pytest.approx(float(loss), rel=1e-4)


def test_steps_without_a_guard_are_trained_on_everything(tiny):
    module = module_with(tiny, Reuse(2, 0.0))
    output = step_with(module, adam(module))
    assert sum(map(len, output.micro_batches)) == 8
    assert (output.held_out, output.update["reuse/steps"]) == ([], 2)


def test_one_step_is_ordinary_opd(tiny):
    module, other = module_with(tiny, Reuse(1)), module_with(tiny, None)
    found, expected = (everything(m, o) for m, o in map(stepped, (module, other)))
    assert_same(found, expected)


def stepped(module, request=StepRequest()):  # noqa: B008 - frozen
    optimizer = adam(module)
    step_with(module, optimizer, request)
    return module, optimizer


# --- the guard ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "margin", "expected"),
    [
        ([[0.0, 0.0], [1.0, 3.0]], 0.0, Reused(3, undone=False)),  # equal is not worse
        ([[1.0, 2.0], [-0.1, -0.1]], 0.0, Reused(2, undone=True)),
        ([[-1.9, 0.0], [0.0, 0.0]], 1.0, Reused(3, undone=False)),  # -0.95 +- 0.95
        ([[-2.1, -0.1], [0.0, 0.0]], 1.0, Reused(1, undone=True)),  # -1.1 +- 1.0
        ([[-2.1, -0.1], [2.1, 0.1]], 1.2, Reused(3, undone=False)),
        ([[4.0, 4.0], [-2.0, -2.0]], 1.0, Reused(2, undone=True)),  # worse than the last, not W
        ([[torch.nan, 0.0], [0.0, 0.0]], 99.0, Reused(1, undone=True)),
        ([[], []], 99.0, Reused(1, undone=True)),  # nothing to go by
    ],
)
def test_a_step_that_is_worse_by_more_than_the_margin_is_undone(changes, margin, expected):
    state, taken = {"score": torch.zeros(len(changes[0]))}, []

    class Copied:
        def __init__(self):
            self.score = state["score"]

        def restore(self):
            state["score"] = self.score

    def attempt(k):
        taken.append(k)
        state["score"] = state["score"] + torch.tensor(changes[k - 2])

    def score():
        scored.append(state["score"])
        return Score(state["score"], torch.ones(len(changes[0])))

    scored = []
    found = further_steps(Reuse(3, 0.5, margin), attempt, score, Copied, lambda tensor: tensor)
    assert found == expected
    assert taken == list(range(2, found.steps + found.undone + 1))
    assert len(scored) == 1 + len(taken)  # none twice
    kept = torch.tensor(changes[: found.steps - 1]).sum(dim=0)
    torch.testing.assert_close(state["score"], torch.zeros(len(changes[0])) + kept)


@pytest.mark.parametrize("undone", [2, 3])
def test_an_undone_step_leaves_all_bit_for_bit_as_without_it(tiny, monkeypatch, undone):
    fewer = module_with(tiny, Reuse(2, 0.25, ALWAYS) if undone == 3 else None)
    expected = everything(*stepped(fewer, StepRequest(held_out=0.25)))
    scores = iter([*[torch.ones(2)] * (undone - 1), torch.tensor([torch.nan, 1.0])])
    monkeypatch.setattr(stages, "judge", lambda *_: Score(next(scores), torch.ones(2)))
    module = module_with(tiny, Reuse(4, 0.25, 1.0))
    optimizer = adam(module)
    update = step_with(module, optimizer).update
    assert (update["reuse/steps"], update["reuse/undone"]) == (undone - 1, 1)
    assert_same(everything(module, optimizer), expected)
    assert module.weights.version == undone + 1  # whoever has a copy notices
    assert all(p.grad is None for p in module.student.parameters())


class Inventive(torch.optim.SGD):
    """Keeps numbers and tensors in its groups, and mappings in its state."""

    def step(self, closure=None):
        super().step(closure)
        (group,) = self.param_groups
        if "distance" in group:
            group["late"] = 1
        group["distance"] = group.get("distance", torch.ones(1)).mul_(2)
        for p in group["params"]:
            self.state[p].setdefault("nested", {"sum": torch.zeros(2)})["sum"].add_(1)


def test_all_that_an_optimizer_keeps_is_put_back():
    weights = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2)) for _ in range(2)])
    optimizer = Inventive(weights.parameters(), lr=0.1, momentum=0.9)
    weights[0].grad = torch.ones(2)
    optimizer.step()
    before = copy.deepcopy((weights.state_dict(), optimizer.state_dict()))
    saved = reuse.Saved(Weights(weights), optimizer)
    weights[1].grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(weights[0], before[0]["0"])
    saved.restore()
    assert_same((dict(weights.state_dict()), optimizer.state_dict()), (dict(before[0]), before[1]))


@pytest.mark.parametrize(("rate", "undone"), [(20.0, 0), (500.0, 1)])
def test_the_guard_judges_by_the_reverse_kl_of_what_is_held_out(loud, monkeypatch, rate, undone):
    """At a rate at which a further step goes astray, and at one at which none does."""
    scores, judge = [], stages.judge

    def noted(module, readings, divergence):
        assert divergence == "reverse_kl"
        score = judge(module, readings, divergence)
        scores.append(score.mean(lambda tensor: tensor))
        return score

    monkeypatch.setattr(stages, "judge", noted)
    module = module_with(loud, Reuse(4, 0.25, 0.0))
    output = step_with(module, torch.optim.SGD(module.student.parameters(), lr=rate))
    kept = int(output.update["reuse/steps"])
    assert output.update["reuse/undone"] == undone
    assert undone or kept == 4
    assert len(scores) == kept + undone
    assert scores[:kept] == sorted(scores[:kept])
    assert all(score < scores[kept - 1] for score in scores[kept:])
    assert judge(module, output.held_out_readings, "reverse_kl").mean(
        lambda tensor: tensor
    ) == pytest.approx(scores[kept - 1])
    lots = [lot for part in output.held_out for lot in part.columns["lot"].tolist()]
    assert len(lots) == 2
    assert max(lots) < 0.25


class NaNAtLast(ReverseKL):
    """Not a number from the second pass on, in the loss or in its gradient alone."""

    where = 0

    def with_slope(self, both, tokens):
        loss, slope = super().with_slope(both, tokens)
        if tokens.weight is None:
            return loss, slope
        broken = [loss * torch.nan, slope] if self.where == 0 else [loss, slope * torch.nan]
        return broken[0], broken[1]


@pytest.mark.parametrize("where", [0, 1], ids=["loss", "gradient"])
@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_a_further_loss_that_is_not_a_number_takes_no_step(tiny, where, held_out, monkeypatch):
    monkeypatch.setattr(NaNAtLast, "where", where)
    module = module_with(tiny, Reuse(4, held_out), objective=NaNAtLast())
    optimizer = adam(module)
    update = step_with(module, optimizer).update
    assert (update["reuse/steps"], update["reuse/undone"]) == (1, 1)
    assert "reuse/ratio" not in update
    plain = stepped(module_with(tiny, None), StepRequest(held_out=held_out))
    assert_same(everything(module, optimizer), everything(*plain))
    assert all(p.grad is None for p in module.student.parameters())


def test_a_held_out_part_is_shared_and_read_once(tiny):
    """EffOPD asks for a half, reuse for a quarter: there is one part, the half."""
    module = module_with(tiny, Reuse(2, 0.25, ALWAYS))
    score = TeacherKL("held_out", fraction=0.5)
    output = step_with(module, adam(module), score.request())
    assert sum(map(len, output.micro_batches)) == sum(map(len, output.held_out)) == 4
    score.prepare(module, output, seed=0)
    assert score._readings == output.held_out_readings
    module.ledger.synchronize(lambda tensor: tensor, world_size=1)
    totals = module.ledger.totals
    trained, aside = (
        sum(micro.num_tokens for micro in part) for part in (output.micro_batches, output.held_out)
    )
    assert totals["teacher_tokens"] == totals["rollout_tokens"] == trained + aside
    assert totals["train_tokens"] == 2 * trained
    assert totals["search_tokens"] == 2 * aside
    assert output.readings == []  # nobody has asked


class Seeds(ReverseKL):
    """Notes what the dropout of each pass is drawn from."""

    def with_slope(self, both, tokens):
        Seeds.seen.append(torch.default_generator.initial_seed())
        return super().with_slope(both, tokens)


def test_each_pass_has_dropout_of_its_own_and_no_judgement_has_any(tiny, monkeypatch):
    monkeypatch.setattr(Seeds, "seen", [], raising=False)
    module = module_with(tiny, Reuse(3, 0.25, ALWAYS), family="gpt2", objective=Seeds())
    output = step_with(module, adam(module))
    expected = [derive_seed(0, 1, 0, "dropout", *k) for k in ([], [2], [3])]
    assert list(dict.fromkeys(Seeds.seen)) == expected
    assert module.student.training
    (reading, *_) = output.held_out_readings
    weights, scores = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights.append(stages.weighed(module, reading).micro.columns["weight"])
        scores.append(stages.judge(module, [reading], "reverse_kl").values)
    assert torch.equal(*weights)
    assert torch.equal(*scores)
    assert "weight" not in reading.micro.columns


def test_what_a_further_step_lacks_does_not_harm_the_one_that_is_counted(tiny, monkeypatch):
    """Without memory for a second step, the first is whole: a run can go on from it."""
    module = module_with(tiny, Reuse(2))
    optimizer = adam(module)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    def weighed(*_):
        raise OutOfMemoryError("out of memory")

    monkeypatch.setattr(stages, "weighed", weighed)
    with pytest.raises(OutOfMemoryError):
        step_with(module, optimizer, scheduler=scheduler)
    assert scheduler.last_epoch == 1
    plain = module_with(tiny, None)
    other = adam(plain)
    other_scheduler = torch.optim.lr_scheduler.StepLR(other, 1, gamma=0.1)
    step_with(plain, other, StepRequest(held_out=0.25), other_scheduler)
    assert_same(everything(module, optimizer), everything(plain, other))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"held_out": 1.0}, "held_out=1.0 must be at least 0 and below 1"),
        ({"held_out": -0.1}, "held_out=-0.1 must be"),
        ({"margin": -0.1}, "margin=-0.1 must be a number of standard errors, at least 0"),
        ({"margin": float("nan")}, "margin=nan must be"),
        ({"margin": float("inf")}, "margin=inf must be"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UserError, match=f"model.reuse.{said}"):
        Reuse(**options)


# --- runs -----------------------------------------------------------------------------------------

REUSE = ["--model.reuse.steps", "3", "--model.rollouts_per_prompt", "2"]
REUSE += ["--model.optimizer.lr", "1e-3"]
DECAY = ["--model.scheduler", "torch.optim.lr_scheduler.ExponentialLR"]
DECAY += ["--model.scheduler.gamma", "0.5"]


def column(folder, name):
    return [float(row[name]) for row in read_metrics(folder / "metrics.csv") if row.get(name)]


@pytest.fixture(scope="module")
def reused(tmp_path_factory):
    """Four steps, saved each. Copy it before you change it."""
    return run_fit(tmp_path_factory.mktemp("reused") / "run", *REUSE, *DECAY, *EVERY, steps=4)


EVERY = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]


def test_a_batch_is_one_step_of_a_run_however_often_it_is_used(reused):
    steps, undone = column(reused, "reuse/steps"), column(reused, "reuse/undone")
    assert len(steps) == 4 < sum(steps)
    last = load(reused)
    assert last["global_step"] == json.loads((reused / "summary.json").read_text())["steps"] == 4
    assert last["optimizer_states"][0]["state"][0]["step"] == sum(steps)
    assert column(reused, "optim/lr") == pytest.approx([1e-3 / 2**t for t in range(4)])
    sampled, read, trained, judged = (
        [b - a for a, b in itertools.pairwise([0, *column(reused, f"cost/{name}_tokens")])]
        for name in ("rollout", "teacher", "train", "search")
    )
    assert read == sampled  # once
    for t in range(4):  # each pass is of what is not held out, and after each comes a judgement
        passes = steps[t] + undone[t]
        assert trained[t] + judged[t] == passes * sampled[t]
        assert 2 < trained[t] / judged[t] < 4  # 12 completions to 4
    before, after = (load(reused, f"step=00000{t}.ckpt")["state_dict"] for t in (2, 3))
    change = torch.cat([(after[n] - before[n]).flatten().double() for n in before]).norm().item()
    assert column(reused, "optim/update_norm")[2] == pytest.approx(change, rel=1e-4)


def test_a_resumed_run_ends_bit_for_bit_alike(fit, reused):
    fit("again", *REUSE, *DECAY, steps=2)
    again = fit("again", *REUSE, *DECAY, "--ckpt_path", "last", steps=4)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(load(again)[part], load(reused)[part])


def test_the_preset_runs_with_searches(fit):
    options = ["--config", str(ROOT / "configs" / "reuse.yaml")]
    options += ["--config", str(ROOT / "configs" / "effopd" / "auto.yaml")]
    folder = fit("run", *options, steps=2)
    assert column(folder, "reuse/steps")
    assert column(folder, "cost/teacher_tokens") == column(folder, "cost/rollout_tokens")
    assert json.loads((folder / "summary.json").read_text())["extrapolation"]


@pytest.mark.parametrize("name", slow_but("fsdp2", *STRATEGIES))
def test_two_processes_reuse_alike(tmp_path, dealt, alone, name):  # noqa: F811 - the fixture
    """To float32 rounding; what is undone on one rank is undone on all."""
    two = launch(2, tmp_path / "two", *dealt, *REUSE, *MUCH, *STRATEGIES[name], steps=3)
    for ours, theirs in zip(rows_of(two), rows_of(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    assert {row["reuse/undone"] for row in rows_of(two)} == {0, 1}
    for tokens in ("train_tokens", "teacher_tokens", "search_tokens"):
        assert summary(two)["cost"][tokens] == summary(alone)["cost"][tokens]
    students = [student_of(load_any(folder)) for folder in (two, alone)]
    difference = largest_difference(*students)
    print(f"weights differ by at most {difference:.1e}")
    assert difference < 1e-4


MUCH = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
MUCH += ["--model.optimizer.momentum", "0.5", "--model.reuse.margin", "0"]


def rows_of(folder):
    names = ("reuse/steps", "reuse/undone", "reuse/ratio", "optim/update_norm")
    return [{name: row[name] for name in names} for row in steps_of(folder)]


def steps_of(folder):
    return [
        {name: float(value) for name, value in row.items()}
        for row in read_metrics(folder / "metrics.csv")
        if row.get("reuse/steps")
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, dealt):  # noqa: F811 - the fixture
    folder = tmp_path_factory.mktemp("alone") / "run"
    return launch(1, folder, *dealt, *REUSE, *MUCH, *CPU, steps=3)
