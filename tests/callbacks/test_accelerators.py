"""The accelerators beside EffOPD: on a line, where a step moves the weight by 1; on a plane."""

import logging

import pytest
import torch
from conftest import assert_same
from lightning.pytorch import Callback, LightningModule
from test_effopd import coefficients, run, trainer_of

from callbacks import RELEX, SNOO, AlphaOPD, Lookahead, TwoPoint
from callbacks.snoo import outer_step
from opd.errors import UserError
from opd.extrapolation import Score
from opd.scores import CandidateScore

# --- SNOO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["parameters", "cpu"])
def test_snoo_on_a_line(device):
    """W_2 = 2: s = b = -2, W = 0.5 (1 + 2) = 1.5. Then 3.5: s = -2, b = -3, 1.5 + 0.5 (1.5 + 2)."""
    callback = SNOO(k=2, learning_rate=0.5, momentum=0.5, anchor_device=device)
    assert run(callback, optimum=0, steps=5) == 4.25
    assert coefficients(callback) == [(2, -0.25), (4, -0.125)]
    assert callback.anchor["weight"].item() == 3.25
    assert callback.companions["momentum"]["weight"].item() == -3


def test_an_outer_step_is_that_of_sgd_with_nesterovs_momentum():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, generator=generator))
    sgd = torch.optim.SGD([weight], lr=0.7, momentum=0.9, nesterov=True)
    slow, buffer = weight.detach().clone(), torch.zeros(5)
    for _ in range(4):
        fast = slow + torch.randn(5, generator=generator)
        weight.grad = weight.detach() - fast
        sgd.step()
        (slow,) = outer_step([slow], [fast], [buffer], 0.7, 0.9)
        torch.testing.assert_close(slow, weight.detach())


def test_snoo_without_momentum_is_lookahead():
    snoo, lookahead = SNOO(k=2, learning_rate=0.25, momentum=0), Lookahead(k=2, alpha=0.25)
    assert run(snoo, optimum=0, steps=5) == run(lookahead, optimum=0, steps=5)
    assert coefficients(snoo) == coefficients(lookahead)


# --- two points, and a line through more ----------------------------------------------------------


@pytest.mark.parametrize("device", ["parameters", "cpu"])
@pytest.mark.parametrize("first", [0, 2])
def test_two_points_on_a_line_lead_to_the_weights_of_the_target(first, device):
    """W_4 becomes W_10; then a step."""
    callback = TwoPoint(first, 4, 10, anchor_device=device)
    assert run(callback, optimum=0, steps=5) == 11
    coefficient = 6 / (4 - first)
    assert callback.history[-1]["coefficient"] == coefficient
    assert [entry["step"] for entry in callback.history] == ([2, 4] if first else [4])


@pytest.mark.parametrize("device", ["parameters", "cpu"])
def test_relex_on_a_line_leads_to_the_weights_of_the_target(device):
    callback = RELEX(every=2, at=6, target=10, anchor_device=device)
    assert run(callback, optimum=0, steps=7) == pytest.approx(11)
    assert [entry["step"] for entry in callback.history] == [2, 4, 6]
    assert "coefficient" not in callback.history[1]
    assert callback.history[2]["coefficient"] == pytest.approx(4 / 6)


ONCE = {
    "TwoPoint": lambda: TwoPoint(1, 4, 9),
    "RELEX": lambda: RELEX(every=1, at=4, target=9),
}


@pytest.mark.parametrize("name", ONCE)
def test_what_is_applied_once_goes_on_from_a_checkpoint_before_and_after(name, tmp_path):
    straight, path = ONCE[name](), tmp_path / "some.ckpt"
    expected = run(straight, optimum=0, steps=6)
    assert expected == pytest.approx(11)
    for steps in (2, 5):
        run(ONCE[name](), optimum=0, steps=steps, checkpoint=path)
        resumed = ONCE[name]()
        assert run(resumed, optimum=0, steps=6, ckpt_path=path) == expected
        assert [entry["step"] for entry in resumed.history] == straight.observed
        assert not list(resumed.anchor.buffers())  # let go
    state = torch.load(path, weights_only=True)["state_dict"]
    assert set(state) == {"weight", "frozen"}


def test_other_steps_than_the_checkpoints_are_refused(tmp_path):
    path, late, alpha = (tmp_path / f"{name}.ckpt" for name in ("three", "late", "alpha"))
    run(RELEX(every=1, at=4, target=9), optimum=0, steps=3, checkpoint=path)
    with pytest.raises(UserError, match=r"RELEX: .* after steps \[1, 2, 3\], .* after \[2\]; resu"):
        run(RELEX(every=2, at=8, target=9), optimum=0, steps=4, ckpt_path=path)
    run([], optimum=0, steps=3, checkpoint=late)
    with pytest.raises(UserError, match=r"RELEX: moves the weights after step 2, .* from step 3"):
        run(RELEX(every=1, at=2, target=9), optimum=0, steps=4, ckpt_path=late)
    for first in (0, 2):
        with pytest.raises(UserError, match=f"TwoPoint.first={first}: the run goes on from step 3"):
            run(TwoPoint(first, 4, 6), optimum=0, steps=4, ckpt_path=late)
    on_a_plane(AlphaOPD(every=1, at=4, score=Tenths()), steps=3, checkpoint=alpha)
    with pytest.raises(UserError, match=r"AlphaOPD: moves the weights after step 3, .* step 3"):
        on_a_plane(AlphaOPD(every=1, at=3, score=Tenths()), steps=4, ckpt_path=alpha)


def test_a_first_point_that_was_passed_unseen_is_refused(tmp_path):
    """W_0 would be taken for it."""
    run(TwoPoint(0, 8, 16), optimum=0, steps=6, checkpoint=tmp_path / "six.ckpt")
    with pytest.raises(UserError, match=r"TwoPoint.first=4: the run goes on from step 6"):
        run(TwoPoint(4, 8, 16), optimum=0, steps=9, ckpt_path=tmp_path / "six.ckpt")
    callback = TwoPoint(0, 8, 16)
    assert run(callback, optimum=0, steps=9, ckpt_path=tmp_path / "six.ckpt") == 17


class Stop(Callback):
    """After step 3."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 3


@pytest.mark.parametrize("name", ONCE)
def test_a_run_that_ends_too_early_says_that_nothing_was_moved(name, caplog):
    with caplog.at_level(logging.WARNING):
        assert run(ONCE[name](), optimum=0, steps=4) > 4
        assert run([ONCE[name](), Stop()], optimum=0, steps=9) == 3
        assert run(ONCE[name](), optimum=0, steps=3) == 3
    said = [r.getMessage() for r in caplog.records if r.name == "callbacks.once"]
    assert said == [
        f"{name} moves the weights after step 4, and {why}: so far it has moved nothing"
        for why in ("the run has ended after step 3", "trainer.max_steps=3")
    ]


def test_relex_that_has_seen_nothing_moves_nothing(tmp_path, caplog):
    """A run without it, until step 3, goes on with it: there is no observation before step 4."""
    run([], optimum=0, steps=3, checkpoint=tmp_path / "three.ckpt")
    callback = RELEX(every=2, at=4, target=9)
    with caplog.at_level(logging.WARNING):
        assert run(callback, optimum=0, steps=5, ckpt_path=tmp_path / "three.ckpt") == 5
    assert "RELEX: nothing was seen before step 4" in caplog.text
    assert coefficients(callback) == [(4, 0)]


def test_relex_that_comes_late_follows_what_it_has_seen(tmp_path):
    """From W_3: dW = 1, 2, 3 after steps 4, 5, 6, so 6 at step 9; then a step. Resumed again."""
    three, five = tmp_path / "three.ckpt", tmp_path / "five.ckpt"
    run([], optimum=0, steps=3, checkpoint=three)
    run(RELEX(at=6, target=9), optimum=0, steps=5, ckpt_path=three, checkpoint=five)
    callback = RELEX(at=6, target=9)
    assert run(callback, optimum=0, steps=7, ckpt_path=five) == pytest.approx(10)
    assert callback.observed == [4, 5, 6]


# --- AlphaOPD -------------------------------------------------------------------------------------

LEFT, RIGHT = torch.tensor([2.0, -1.0, 2.0]), torch.tensor([3.0, 4.0])


class Plane(LightningModule):
    """Each step of SGD moves a matrix by LEFT RIGHT^T, and a vector by 1."""

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Linear(2, 3)
        torch.nn.init.ones_(self.mlp.weight)
        torch.nn.init.zeros_(self.mlp.bias)

    def training_step(self, batch, batch_idx):
        return -(self.mlp.weight * torch.outer(LEFT, RIGHT)).sum() - self.mlp.bias.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(64, 1))


class Tenths(CandidateScore):
    """A tenth of the steps that the vector has moved by, or always the same."""

    def __init__(self, slope=0.1):
        self.slope = slope
        self.released = 0

    def __call__(self, module):
        return Score(self.slope * module.mlp.bias[:1].detach(), torch.ones(1))

    def release(self):
        self.released += 1


def on_a_plane(callback, steps, ckpt_path=None, checkpoint=None):
    module, trainer = Plane(), trainer_of(callback, steps)
    trainer.fit(module, ckpt_path=ckpt_path)
    if checkpoint:
        trainer.save_checkpoint(checkpoint)
    return module.mlp.weight.detach(), module.mlp.bias.detach()


def test_alphaopd_goes_where_the_score_is_that_is_wanted():
    """0.2 after step 2, 0.4 after step 4: 1 after step 10, where W = 1 + 10 LEFT RIGHT^T."""
    callback = AlphaOPD(every=2, at=4, score=Tenths(), target=1.0)
    weight, bias = on_a_plane(callback, steps=4)
    torch.testing.assert_close(weight, 1 + 10 * torch.outer(LEFT, RIGHT))
    assert bias.tolist() == [4, 4, 4]  # not a matrix
    scores = [(entry["step"], round(entry["score"], 6)) for entry in callback.history]
    assert scores == [(2, 0.2), (4, 0.4)]
    assert callback.history[-1]["coefficient"] == pytest.approx(6 / 4)
    assert callback.score.released == 2


def test_alphaopd_goes_on_from_a_checkpoint(tmp_path):
    straight = on_a_plane(AlphaOPD(every=1, at=4, score=Tenths()), steps=5)
    for steps in (2, 4):
        path = tmp_path / f"{steps}.ckpt"
        on_a_plane(AlphaOPD(every=1, at=4, score=Tenths()), steps, checkpoint=path)
        resumed = AlphaOPD(every=1, at=4, score=Tenths())
        assert_same(on_a_plane(resumed, steps=5, ckpt_path=path), straight)


def test_alphaopd_moves_nothing_if_scores_say_nothing(caplog):
    callback = AlphaOPD(every=1, at=2, score=Tenths(slope=0.0))
    with caplog.at_level(logging.WARNING):
        weight, _ = on_a_plane(callback, steps=2)
    torch.testing.assert_close(weight, 1 + 2 * torch.outer(LEFT, RIGHT))
    assert "AlphaOPD: moves nothing, as no two scores differ: [0.0, 0.0]" in caplog.text
    assert callback.history[-1]["coefficient"] == 0


def test_momentum_begins_with_nothing():
    """Weights are 1 at first: W_2 = 1 + 2 D, s = b = -2 D, and W = 1 + 0.5 (1 + 2) D."""
    weight, _ = on_a_plane(SNOO(k=2, learning_rate=0.5, momentum=0.5), steps=2)
    torch.testing.assert_close(weight, 1 + 1.5 * torch.outer(LEFT, RIGHT))


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SNOO(k=0), r"SNOO\(k=0, .*k must be at least 1"),
        (lambda: SNOO(learning_rate=0.0), r"learning_rate above 0"),
        (lambda: SNOO(momentum=1.0), r"momentum=1.0.*momentum from 0 and below 1"),
        (lambda: TwoPoint(4, 4, 8), r"TwoPoint\(first=4, second=4, target=8\): steps must ascend"),
        (lambda: TwoPoint(2, 4, 4), r"steps must ascend"),
        (lambda: TwoPoint(-1, 4, 8), r"the first from 0"),
        (lambda: RELEX(every=2, at=2, target=8), r"RELEX\(every=2, at=2\): .* twice as much"),
        (lambda: RELEX(every=0, at=2, target=8), r"every must be at least 1"),
        (lambda: RELEX(at=4, target=4), r"RELEX.target=4 must lie beyond at=4"),
        (lambda: AlphaOPD(every=2, at=5), r"AlphaOPD\(every=2, at=5\): .* a multiple"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make, said):
    with pytest.raises(UserError, match=said) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_parameters_that_match_nothing_name_whose_option_it_is():
    with pytest.raises(UserError, match=r"SNOO.parameters 'x' matches no parameter"):
        run(SNOO(k=1, parameters="x"), optimum=0, steps=1)
