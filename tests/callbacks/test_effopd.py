"""The callback on a plain LightningModule, with coefficients worked out by hand, and on OPD."""

import pytest
import torch
from conftest import AUTO, assert_same, load, slow_but, student_of
from lightning.pytorch import LightningModule, Trainer

from callbacks import Accelerator, EffOPD, Lookahead
from opd import weights
from opd.errors import UserError
from opd.extrapolation import Score
from opd.metrics_rows import read_metrics
from opd.models import load_model
from opd.scores import CandidateScore


class Line(LightningModule):
    """One weight that every step of SGD moves by exactly 1; its validation loss is a quadratic."""

    def __init__(self, optimum: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.optimum = optimum

    def training_step(self, batch, batch_idx):
        return -self.weight.sum()

    def validation_loss(self):
        return (self.weight.detach() - self.optimum).square()

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=1.0)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(64, 1))


class MinusValidationLoss(CandidateScore):
    def __call__(self, module):
        return Score(-module.validation_loss(), torch.ones(1))


def trainer_of(callback, steps, **options):
    return Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=callback if isinstance(callback, list) else [callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def run(callback, optimum, steps, ckpt_path=None, checkpoint=None):
    module, trainer = Line(optimum), trainer_of(callback, steps)
    trainer.fit(module, ckpt_path=ckpt_path)
    if checkpoint:
        trainer.save_checkpoint(checkpoint)
    return module.weight.item()


def effopd(**options):
    return EffOPD(score=MinusValidationLoss(), **options)


def coefficients(callback):
    return [(search["step"], search["coefficient"]) for search in callback.history]


def test_accept_rules_on_a_quadratic():
    """W_1 = 1, D = 1, optimum 8: candidates 3, 5, 7, 9, 11 are 5, 3, 1, 1, 3 away."""
    paper, code = effopd(accept="not_worse"), effopd(accept="better")
    assert run(paper, optimum=8, steps=1) == 9  # 9 is as good as 7
    assert run(code, optimum=8, steps=1) == 7
    assert coefficients(paper) == [(1, 8)]
    assert coefficients(code) == [(1, 6)]


def test_anchors_on_a_quadratic():
    """Optimum 60. Both jump from 1 by 10 to 11; then W_2 = 12.

    raw: D = 12 - W_1 = 11, candidates 34, 56, 78: keeps 56. W_4 = 58, D = 58 - W_2 = 46: refused.
    accepted: D = 12 - 11 = 1: 22. W_4 = 24, D = 24 - 22 = 2: 44.
    """
    raw, accepted = effopd(anchor="raw"), effopd(anchor="accepted")
    assert run(raw, optimum=60, steps=4) == 58
    assert coefficients(raw) == [(1, 10), (2, 4), (4, 0)]
    assert run(accepted, optimum=60, steps=4) == 44
    assert coefficients(accepted) == [(1, 10), (2, 10), (4, 10)]


def test_two_sided_goes_back_toward_the_anchor():
    """W_1 = 1, optimum 0.2: 2 is worse; then 0.5, 0.25 (0.05 away), 0.125 (0.075 away)."""
    callback = effopd(coefficients="two_sided")
    assert run(callback, optimum=0.2, steps=1) == 0.25
    assert coefficients(callback) == [(1, -0.75)]


class Far(MinusValidationLoss):
    """Knows how far it is, squared, from where the last step began."""

    knows_moved = True

    def prepare(self, module, output, seed):
        self.sampled_by = module.weight.item() - 1

    def __call__(self, module):
        far = (module.weight.detach() - self.sampled_by).square()
        return Score(super().__call__(module).values, torch.ones(1), far)


@pytest.mark.parametrize(
    ("proximal", "step", "coefficients", "optimum", "kept"),
    [
        (0, 1, [1, 2, 3, 4, 5], 8, 6),  # W_1 = 1, sampled by 0: as far as one may
        (1, 1, [1, 2, 3, 4, 5], 8, 4),  # half-way
        (3, 1, [1, 2, 3, 4, 5], 8, 2),  # a quarter
        (0, 1, [-0.5, -0.75], 0.5, 0.5),  # and back: 0.25 is worse
        (1, 1, [-0.5, -0.75], 0.5, 0.25),  # but nearer to 0
        (1, 2, [-0.5, -0.75], 0.6, 0.5),  # W_2 = 2, sampled by 1, and 0.5 lies behind
        (1, 2, [-0.5], 1.55, 2),  # W has moved, but 1 is worse: the last step was no mistake
    ],
)
def test_a_candidate_must_gain_more_than_it_moves(proximal, step, coefficients, optimum, kept):
    callback = EffOPD(step, coefficients, Far(), "better", proximal=proximal)
    assert run(callback, optimum, steps=step) == kept


def test_steps_are_counted_from_where_the_anchor_was_taken(tmp_path):
    """A run without searches until W_3 = 3: the anchor. Then as above, from 3 instead of 0."""

    def proximal(step):
        return EffOPD(step, [-0.5, -0.75], Far(), "better", proximal=1)

    three, four = tmp_path / "three.ckpt", tmp_path / "four.ckpt"
    run([], optimum=0, steps=3, checkpoint=three)
    assert run(proximal(4), optimum=3.5, steps=4, ckpt_path=three) == 3.25
    run(proximal(5), optimum=0, steps=4, ckpt_path=three, checkpoint=four)
    assert run(proximal(5), optimum=3.6, steps=5, ckpt_path=four) == 3.5


def test_what_does_not_know_how_far_it_has_moved_cannot_be_proximal():
    with pytest.raises(UserError, match=r"EffOPD.proximal: MinusValidationLoss does not say how"):
        effopd(proximal=1.0)
    for proximal in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"EffOPD.proximal=(-1.0|nan|inf) must be 0 or more"):
            effopd(proximal=proximal)


def test_resume_keeps_the_anchor(tmp_path):
    straight = effopd()
    expected = run(straight, optimum=60, steps=4)
    run(effopd(), optimum=60, steps=3, checkpoint=tmp_path / "three.ckpt")
    resumed = effopd()
    assert run(resumed, optimum=60, steps=4, ckpt_path=tmp_path / "three.ckpt") == expected
    assert coefficients(resumed) == coefficients(straight)


def test_resume_with_other_parameters_is_refused(tmp_path):
    run(effopd(), optimum=60, steps=1, checkpoint=tmp_path / "one.ckpt")
    callback = effopd()
    callback.parameters = ["*"]
    run(callback, optimum=60, steps=2, ckpt_path=tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)
    state["state_dict"]["effopd_anchor.other"] = state["state_dict"].pop("effopd_anchor.weight")
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"anchor of EffOPD lacks weight: resume with the same"):
        run(effopd(), optimum=60, steps=2, ckpt_path=tmp_path / "other.ckpt")


class Average(Accelerator):
    """Another accelerator."""

    label = "average"

    def __init__(self):
        super().__init__("all", "parameters")

    def due(self, t):
        return False

    def accelerate(self, trainer, pl_module, output):
        return {}, {}


def test_who_comes_after_a_search_is_told_of_it_and_who_comes_before():
    """An adaptive search is not due any more once it has been made; the next is after step 3."""
    callback = effopd(schedule="adaptive 4", coefficients=[2])
    assert callback.acts_after(1)
    run(callback, optimum=0, steps=2)
    assert coefficients(callback) == [(1, 0)]
    assert not callback.due(1)
    assert [t for t in (1, 2, 3) if callback.acts_after(t)] == [1, 3]


def test_two_accelerators_in_one_run_are_refused():
    with pytest.raises(UserError, match="EffOPD and Average would both move the weights"):
        run([effopd(), Average()], optimum=60, steps=1)


def test_anchors_of_different_accelerators_are_different_tensors(tmp_path):
    """A run of one goes on from a checkpoint of another: it starts from W, not from its anchor."""
    run(effopd(), optimum=60, steps=2, checkpoint=tmp_path / "effopd.ckpt")
    state = torch.load(tmp_path / "effopd.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {"weight", "frozen", "effopd_anchor.weight"}
    assert (state["weight"].item(), state["effopd_anchor.weight"].item()) == (56, 12)


@pytest.mark.parametrize("device", ["parameters", "cpu"])
def test_anchor_and_copy_live_where_they_are_asked_to(monkeypatch, device):
    """Here all memory is the host's; so what counts is who is asked to put tensors there."""
    moved = []
    monkeypatch.setattr(
        weights, "to_host", lambda tensor: moved.append(float(tensor)) or tensor.clone()
    )
    assert run(effopd(anchor_device=device), optimum=60, steps=2) == 56
    # the anchor at the start, and the copy of W in each of two searches
    assert moved == ([0, 1, 12] if device == "cpu" else [])


def test_every_edit_of_the_weights_makes_a_new_version():
    """Two of a search that accepts 2 and refuses 4 (there and back), as an engine has to notice."""
    callback = effopd(coefficients=[2, 4])
    run(callback, optimum=3, steps=1)
    assert coefficients(callback) == [(1, 2)]
    assert callback.weights.version == 3


class Failing(MinusValidationLoss):
    """Fails at the second candidate."""

    released = False
    calls = 0

    def __call__(self, module):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("no more")
        return super().__call__(module)

    def release(self):
        self.released = True


def test_a_search_that_fails_leaves_w_and_lets_its_score_go():
    score, module = Failing(), Line(optimum=60)
    with pytest.raises(RuntimeError, match="no more"):
        trainer_of(EffOPD(score=score), steps=1).fit(module)
    assert module.weight.item() == 1
    assert score.released


class SeesAutocast(MinusValidationLoss):
    def __call__(self, module):
        self.seen = torch.is_autocast_enabled("cpu")
        return super().__call__(module)


def test_a_search_computes_in_the_precision_of_the_step():
    """Otherwise a float32 student is compared with what the teacher has said in bfloat16."""
    for precision, autocast in [("32-true", False), ("bf16-mixed", True)]:
        score = SeesAutocast()
        trainer_of(EffOPD(score=score), steps=1, precision=precision).fit(Line(optimum=60))
        assert score.seen == autocast


def moments_of(checkpoint):
    states = checkpoint["optimizer_states"][0]["state"].values()
    return [float(state[name].norm()) for state in states for name in ("step", "exp_avg_sq")]


class Foreign(torch.optim.SGD):
    """What it keeps only its author knows."""


def test_an_optimizer_from_elsewhere_cannot_be_made_to_forget():
    module = Line(optimum=60)
    module.configure_optimizers = lambda: Foreign([module.weight], lr=1.0)
    with pytest.raises(UserError, match="state of Foreign may be more than moments"):
        trainer_of(effopd(optimizer_state="reset"), steps=1).fit(module)
    trainer_of(effopd(), steps=1).fit(module)
    assert module.weight.item() == 11


def test_optimizer_state_is_reset_only_after_an_accepted_candidate(fit):
    options = ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.schedule", "2"]
    score = ["--trainer.callbacks.score", "opd.scores.TeacherKL"]
    reset = ["--trainer.callbacks.optimizer_state", "reset"]
    accepted = load(fit("accepted", *options, *score, *reset))
    assert not any(moments_of(accepted))
    refusing = ["--trainer.callbacks.accept", "better 1000"]
    refused = load(fit("refused", *options, *score, *reset, *refusing))
    assert all(moments_of(refused))


@pytest.mark.parametrize(
    "score",
    [
        ["opd.scores.AnswerAccuracy"],
        ["opd.scores.TeacherKL", "--trainer.callbacks.score.rollouts", "fresh"],
        *slow_but(
            ["opd.scores.TeacherKL"],
            ["opd.scores.TeacherKL", "--trainer.callbacks.score.rollouts", "part"],
            ["opd.scores.TeacherKL", "--trainer.callbacks.direction", "random"],
            ["opd.scores.AnswerAccuracy", "--trainer.callbacks.score.prompts", "validation"],
        ),
    ],
)
def test_a_search_that_refuses_everything_changes_nothing(fit, vanilla, score):
    """Weights, optimizer, random state and data order are bit-identical to a run without it."""
    undisturbed = load(vanilla)
    options = [
        "--trainer.callbacks.schedule",
        "every 1",
        "--trainer.callbacks.accept",
        "better 1000",
    ]
    refusing = [
        "--trainer.callbacks+=callbacks.EffOPD",
        *options,
        "--trainer.callbacks.score",
        *score,
    ]
    searched = load(fit("refusing", *refusing, steps=3))
    assert len(searched["callbacks"]["EffOPD"]["history"]) == 3
    assert_same(student_of(searched), student_of(undisturbed))
    for part in ("optimizer_states", "random_state"):
        assert_same(searched[part], undisturbed[part], part)
    positions = [c["loops"]["fit_loop"]["state_dict"] for c in (searched, undisturbed)]
    assert positions[0]["combined_loader"] == positions[1]["combined_loader"]


def test_held_out_rollouts_are_kept_out_of_the_gradient(fit):
    options = [
        "--trainer.callbacks.schedule",
        "1",
        "--trainer.callbacks.score",
        "opd.scores.TeacherKL",
    ]
    held_out = [
        "--trainer.callbacks.score.rollouts",
        "held_out",
        "--trainer.callbacks.score.fraction",
        "0.25",
    ]
    cost = load(fit("run", "--trainer.callbacks+=callbacks.EffOPD", *options, *held_out, steps=1))[
        "cost"
    ]
    assert 0.7 < cost["train_tokens"] / cost["rollout_tokens"] < 0.8
    assert cost["teacher_tokens"] == cost["rollout_tokens"]
    assert cost["search_generated_tokens"] == 0


def test_a_search_with_nothing_to_judge_by_says_so_once(fit, caplog):
    """Of a single completion none can be held out."""
    fit("run", *AUTO, "--data.batch_size", "1", steps=3)
    assert caplog.text.count("had no completion to judge by, and so decides nothing") == 1


@pytest.mark.parametrize(("score", "blind"), [("AnswerAccuracy", True), ("TeacherKL", False)])
def test_a_search_that_cannot_tell_weights_apart_says_so_once(fit, caplog, score, blind):
    """One token answers nothing: all candidates have an accuracy of 0."""
    search = ["--trainer.callbacks+=callbacks.EffOPD", f"--trainer.callbacks.score={score}"]
    fit("run", *search, "--model.max_new_tokens", "1", steps=2)
    assert caplog.text.count("gives W and all 5 candidates the same score, 0") == blind
    assert caplog.text.count("the same score") == blind


def scripted(scores, coefficients, *options):
    callback = ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.accept", "better"]
    callback += ["--trainer.callbacks.schedule", "1", "--trainer.callbacks.score=probes.Scripted"]
    callback += [f"--trainer.callbacks.score.scores={scores}"]
    return [*callback, f"--trainer.callbacks.coefficients={coefficients}", *options]


CARRY = ["--trainer.callbacks.learning_rate", "carry"]
HALVING = ["--model.scheduler.class_path", "torch.optim.lr_scheduler.ExponentialLR"]
HALVING += ["--model.scheduler.init_args.gamma", "0.5"]
SGD = ["--model.optimizer.class_path", "torch.optim.SGD", "--model.optimizer.init_args.lr", "0.01"]


def test_of_several_steps_less_is_carried_over_and_each_time_anew(fit):
    """1 + 3/2 where D is two steps long, and c = 3; and twice so."""
    search = scripted([0, 1, 0, 1], [3], *CARRY, "--trainer.callbacks.schedule", "[2, 4]")
    history = load(fit("run", *search, steps=4))["callbacks"]["EffOPD"]["history"]
    assert [found["learning_rate_factor"] for found in history] == [2.5, 6.25]


@pytest.mark.parametrize(("options", "factor"), [([], 1), (CARRY, 4)])
def test_an_accepted_coefficient_is_carried_over_into_the_learning_rate(fit, options, factor):
    """A step of 4 D was better: so are the coming ones, whatever the schedule makes of the rate.

    A step of SGD moves the weights by the rate times the gradient.
    """
    search = scripted([0, 1], [3], *options)
    run = fit("run", *search, *SGD, *HALVING, "--model.max_grad_norm", "1e9", steps=3)
    rows = [row for row in read_metrics(run / "metrics.csv") if "optim/lr" in row]
    rates = [float(row["optim/lr"]) for row in rows]
    assert rates == pytest.approx([0.01, 0.005 * factor, 0.0025 * factor])
    for row, rate in zip(rows, rates, strict=True):
        moved = rate * float(row["optim/grad_norm"])
        assert float(row["optim/update_norm"]) == pytest.approx(moved, rel=1e-4)
    (group,) = load(run)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(0.00125)  # the schedule's own


def test_a_step_that_has_diverged_is_undone_moments_included(fit):
    """The anchor is better than W, and only a quarter of the step than the anchor; then nothing."""
    a_quarter = load(fit("a_quarter", *scripted([0, 2, 1, 3], "bracket", *CARRY), steps=1))
    assert a_quarter["callbacks"]["EffOPD"]["history"][0]["coefficient"] == -0.75
    assert a_quarter["callbacks"]["EffOPD"]["learning_rate_factor"] == 0.25
    assert all(moments_of(a_quarter))

    undone = load(fit("undone", *scripted([0, 2, 1], "bracket", *CARRY), steps=1))
    assert undone["callbacks"]["EffOPD"]["history"][0]["coefficient"] == -1
    assert undone["callbacks"]["EffOPD"]["learning_rate_factor"] == 2.0**-21
    assert not any(moments_of(undone))
    for name, weight in load_model("embedded:base").state_dict().items():
        assert torch.equal(undone["state_dict"][f"student.{name}"], weight)


@pytest.mark.parametrize("device", ["parameters", "cpu"])
def test_lookahead_on_a_line(device):
    """Each step moves by 1: 1, 2 -> 2 - 0.75 * 2 = 0.5, 1.5, 2.5 -> 0.5 + 0.25 * 2 = 1; then 2."""
    callback = Lookahead(k=2, alpha=0.25, anchor_device=device)
    assert run(callback, optimum=0, steps=5) == 2
    assert coefficients(callback) == [(2, -0.75), (4, -0.75)]
    assert callback.anchor["weight"].item() == 1


def test_lookahead_is_a_line_search_that_always_goes_back():
    """EffOPD's candidate with c = alpha - 1, from the weights accepted before."""
    always = effopd(schedule="every 2", coefficients=[-0.75], anchor="accepted")
    assert run(always, optimum=-1e6, steps=5) == 2


def test_a_random_direction_on_a_line_is_there_or_back():
    """W_1 = 1, and a random direction as long as 1 - 0 is 1 or -1."""
    found = {
        run(effopd(direction="random", coefficients=[8], seed=seed), 1e6 * sign, steps=1)
        for seed in range(4)
        for sign in (1, -1)
    }
    assert found == {1, 9, -7}
