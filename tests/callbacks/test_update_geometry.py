"""The geometry of the update: its numbers, its budget, and that it only looks."""

import dataclasses
import math
from statistics import fmean

import pytest
import torch
from conftest import DDP, FSDP1, FSDP2, assert_same, launch, load, load_any, student_of
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from callbacks import UpdateGeometry
from opd import geometry
from opd.errors import UserError
from opd.geometry import Spectrum
from opd.geometry_rows import read_rows
from opd.metrics_csv import MetricsCSV
from opd.metrics_rows import read_metrics
from opd.models import load_model

GEOMETRY = ["--trainer.callbacks+=callbacks.UpdateGeometry", "--trainer.callbacks.share", "1"]
EFFOPD = ["--trainer.callbacks+=callbacks.EffOPD"]
EACH = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]
NO_TIME = "callbacks.geometry.perf_counter"  # patched: then each step is measured
QUIETLY = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def measured(folder) -> dict[int, dict[str, float]]:
    """What has been logged, by step; each step is there once."""
    rows = [row for row in read_metrics(folder / "metrics.csv") if "geometry/seconds" in row]
    found = {int(row["step"]): row for row in rows}
    assert len(found) == len(rows)
    return {
        step: {
            name.removeprefix("geometry/"): float(value)
            for name, value in row.items()
            if name.startswith("geometry/")
        }
        for step, row in found.items()
    }


def assert_measured(folder, t: int, trained: dict[str, torch.Tensor]) -> None:
    """Compare what is known of step t with W_t - W_0 of all weights, and of each matrix."""
    start = {f"student.{n}": p for n, p in load_model("embedded:base").named_parameters()}
    update = {name: (trained[name] - start[name]).detach().double() for name in start}
    logged = measured(folder)[t]
    norm = math.sqrt(sum(float(part.square().sum()) for part in update.values()))
    assert logged["update_norm"] == pytest.approx(norm, rel=1e-5)
    matrices = {
        name: Spectrum.of(torch.linalg.svdvals(part))
        for name, part in update.items()
        if part.ndim == 2 and ("self_attn" in name or "mlp" in name)
    }
    assert len(matrices) == 4 * 7
    for name in ("spectral_norm", "spectral_ratio", "effective_rank", "top_ratio"):
        mean = fmean(getattr(spectrum, name) for spectrum in matrices.values())
        assert logged[name] == pytest.approx(mean, rel=1e-5)
    rows = [row for row in read_rows(folder / "geometry.csv") if row.step == t]
    assert [row.name for row in rows] == list(matrices)
    for row in rows:
        expected = dataclasses.astuple(matrices[row.name])
        assert dataclasses.astuple(row)[2:] == pytest.approx(expected, rel=1e-5)


def listed(folder) -> list[int]:
    return sorted({row.step for row in read_rows(folder / "geometry.csv")})


# --- runs of the command line ---------------------------------------------------------------------


def test_numbers_are_those_of_the_saved_weights_and_the_run_is_the_one_without(
    fit, vanilla, monkeypatch
):
    monkeypatch.setattr(NO_TIME, lambda: 0.0)
    folder = fit("run", *GEOMETRY, *EACH, steps=3)
    for t in (1, 2, 3):
        ours, theirs = (load(run, f"step={t:06d}.ckpt") for run in (folder, vanilla))
        assert_same(student_of(ours), student_of(theirs))
        for part in ("optimizer_states", "random_state"):
            assert_same(ours[part], theirs[part], part)
        assert_measured(folder, t, student_of(ours))
    events = EventAccumulator(str(folder)).Reload()
    assert [image.step for image in events.Images("geometry/norm")] == [3]
    assert [scalar.step for scalar in events.Scalars("geometry/effective_rank")] == [1, 2, 3]


@pytest.mark.parametrize("options", [[*GEOMETRY, *EFFOPD], [*EFFOPD, *GEOMETRY]])
def test_with_a_search_it_sees_what_the_search_has_left_wherever_it_stands(
    fit, searched, options, monkeypatch
):
    monkeypatch.setattr(NO_TIME, lambda: 0.0)
    folder = fit("run", *options, steps=2)
    after = load(folder)
    assert_same(student_of(after), student_of(load(searched)))
    assert_same(after["random_state"], load(searched)["random_state"])
    assert list(measured(folder)) == [1, 2]
    assert_measured(folder, 2, student_of(after))


def test_a_resumed_run_keeps_w_0_and_the_rows_until_then_and_compares_displacements_anew(
    fit, monkeypatch
):
    monkeypatch.setattr(NO_TIME, lambda: 0.0)
    folder = fit("run", *GEOMETRY, *EACH, steps=3)
    assert listed(folder) == [1, 2, 3]
    back = ["--ckpt_path", str(folder / "checkpoints" / "step=000002.ckpt"), "--overwrite", "true"]
    fit("run", *GEOMETRY, *EACH, *back, steps=5)
    assert listed(folder) == [1, 2, 4, 5]
    assert_measured(folder, 5, student_of(load(folder)))
    found = measured(folder)
    has = {
        name: [t for t in found if f"cosine_{name}" in found[t]] for name in ("previous", "first")
    }
    assert has == {"previous": [2, 4, 5], "first": [2]}


def test_a_run_that_goes_on_from_one_without_it_begins_where_that_has_ended(fit):
    before = student_of(load(fit("run", steps=1)))
    folder = fit("run", *GEOMETRY, "--ckpt_path", "last", steps=2)
    after = student_of(load(folder))
    squares = sum(float((after[n] - before[n]).double().square().sum()) for n in after)
    assert measured(folder)[2]["update_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "device"),
    [
        (FSDP2, "cpu"),
        pytest.param(FSDP1, "parameters", marks=pytest.mark.slow),
        pytest.param(DDP, "parameters", marks=pytest.mark.slow),
    ],
    ids=["fsdp2", "fsdp1", "ddp"],
)
def test_two_ranks_measure_their_whole_update_since_w_0_resumed_or_not(tmp_path, strategy, device):
    options = [*GEOMETRY, "--trainer.callbacks.anchor_device", device, *strategy]
    folder = launch(2, tmp_path / "run", *options, steps=2)
    assert_measured(folder, 2, student_of(load_any(folder)))
    launch(2, folder, *options, "--ckpt_path", "last", steps=3)
    assert_measured(folder, 3, student_of(load_any(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [FSDP2, FSDP1, DDP], ids=["fsdp2", "fsdp1", "ddp"])
def test_two_ranks_find_the_directions_of_one(fit, tmp_path, strategy):
    """After the first step and the last, whatever it takes."""
    runs = [
        fit("one", *GEOMETRY, steps=2),
        launch(2, tmp_path / "two", *GEOMETRY, *strategy, steps=2),
    ]
    one, two = (measured(run)[2] for run in runs)
    for found in (one, two):
        found.pop("seconds")
    assert two == pytest.approx(one, rel=1e-2)
    assert 0 < two["cosine_previous"] < 1


def test_the_folder_of_a_run_is_guarded_and_taken_over(fit, tmp_path):
    folder = fit("run", *GEOMETRY, steps=1)
    assert listed(folder) == [1]
    (folder / "table.csv").write_text("mine")
    fit("run", *GEOMETRY, "--overwrite", "true", steps=2)
    assert listed(folder) == [1, 2]
    fit("run", "--overwrite", "true", steps=1)
    assert not (folder / "geometry.csv").exists()
    assert (folder / "table.csv").exists()


# --- trajectories by hand -------------------------------------------------------------------------


class Guided(LightningModule):
    """Moves its weights as it is told: SGD at rate 1, whose gradients are minus displacements.

    Args:
        displacements: By step, of each of its parameters that is to move.
        seconds: Called in each step.
    """

    def __init__(self, displacements: list[dict[str, list]], seconds=lambda: None) -> None:
        super().__init__()
        self.mlp = nn.ParameterDict({name: torch.full((2, 2), 8.0) for name in ("up", "down")})
        self.mlp["scale"] = nn.Parameter(torch.zeros(2))  # no matrix
        self.displacements = displacements
        self.seconds = seconds

    def training_step(self, batch, batch_idx):
        self.seconds()
        parameters = dict(self.named_parameters())
        moved = self.displacements[batch_idx].items()
        return -sum((parameters[name] * torch.tensor(d)).sum() for name, d in moved)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def run_by_hand(folder, module, *callbacks, loggers=(), **options):
    """Train it for as many steps as it has displacements; returns what was measured, by step."""
    count = len(module.displacements)
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=1,
        logger=[MetricsCSV(folder), *loggers],
        enable_checkpointing=False,
        callbacks=[UpdateGeometry(**options), *callbacks],
        **QUIETLY,
    )
    trainer.fit(module, torch.utils.data.DataLoader(range(count), batch_size=1))
    return measured(folder)


def test_spectra_and_cosines_of_a_trajectory_by_hand(tmp_path, monkeypatch):
    """W - W_0 of mlp.up is [[1, 0], [0, 0]], [[4, 4], [0, 0]], [[4, 4], [0, 3]].

    Of the last one, A A^T = [[32, 12], [12, 9]] has the eigenvalues (41 +- sqrt(1105)) / 2.
    """
    monkeypatch.setattr(NO_TIME, lambda: 0.0)
    steps = [
        {"mlp.up": [[1.0, 0.0], [0.0, 0.0]], "mlp.scale": [2.0, 2.0]},
        {"mlp.up": [[3.0, 4.0], [0.0, 0.0]], "mlp.scale": [-7.0, 0.0]},
        {"mlp.up": [[0.0, 0.0], [0.0, 3.0]], "mlp.down": [[-4.0, 0.0], [0.0, 0.0]]},
    ]
    one, two, three = run_by_hand(tmp_path, Guided(steps)).values()
    assert one.keys().isdisjoint({"cosine_previous", "cosine_first"})
    assert one["update_norm"] == pytest.approx(3.0)
    assert one["spectral_norm"] == pytest.approx(0.5)  # mlp.down has not moved
    for found in (one, two):
        assert [found[n] for n in ("spectral_ratio", "effective_rank", "top_ratio")] == [1.0] * 3
    assert (two["cosine_previous"], two["cosine_first"]) == (pytest.approx(0.6), pytest.approx(0.6))
    assert two["update_norm"] == pytest.approx(math.sqrt(32 + 25 + 4))
    assert (three["cosine_previous"], three["cosine_first"]) == (0.0, 0.0)
    large, small = (math.sqrt((41 + sign * math.sqrt(1105)) / 2) for sign in (1, -1))
    assert three["spectral_norm"] == pytest.approx((large + 4) / 2)
    assert three["spectral_ratio"] == pytest.approx((large / math.sqrt(41) + 1) / 2)
    p = [large / (large + small), small / (large + small)]
    rank = math.exp(-sum(x * math.log(x) for x in p))
    assert three["effective_rank"] == pytest.approx((rank + 1) / 2)


def test_each_expert_is_a_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr(NO_TIME, lambda: 0.0)
    module = Guided([{"mlp.experts": [[[3.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [4.0, 0.0]]]}])
    module.mlp["experts"] = nn.Parameter(torch.zeros(2, 2, 2))
    (found,) = run_by_hand(tmp_path, module).values()
    assert found["spectral_norm"] == pytest.approx((3 + 4) / 4)  # mlp.up and mlp.down: 0
    assert found["effective_rank"] == pytest.approx((1 + 2) / 2)
    rows = {row.name: row.norm for row in read_rows(tmp_path / "geometry.csv")}
    assert list(rows)[-2:] == ["mlp.experts[0]", "mlp.experts[1]"]
    assert list(rows.values()) == pytest.approx([0, 0, 3, 32**0.5])


def test_cosines_are_with_the_displacement_before_and_with_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(NO_TIME, lambda: 0.0)
    places = [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]], [[-3.0, -4.0], [0.0, 0.0]]]
    found = run_by_hand(tmp_path, Guided([{"mlp.down": d} for d in places]))
    assert found[2]["cosine_first"] == found[2]["cosine_previous"] == 0.0
    assert found[3]["cosine_previous"] == pytest.approx(-0.8)
    assert found[3]["cosine_first"] == pytest.approx(-0.6)


def test_a_run_that_diverges_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(NO_TIME, lambda: 0.0)
    steps = [{"mlp.up": [[math.inf, 0.0], [0.0, 0.0]]}, {"mlp.up": [[math.nan] * 2] * 2}]
    found = run_by_hand(tmp_path, Guided(steps))
    assert list(found) == [1, 2]
    assert math.isnan(found[2]["update_norm"])


class Clock:
    """Goes on by what it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Idle(Callback):
    """Time that is of no step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: object) -> None:
        self.clock.wait(1000.0)


@pytest.mark.parametrize(
    ("every", "steps", "rows"),
    [(1, [1, 5, 8, 10, 11], [1, 5, 8, 11]), (3, [3, 6, 9, 11], [3, 6, 9, 11])],
)
def test_it_takes_the_share_of_the_steps_that_it_may(tmp_path, monkeypatch, every, steps, rows):
    """A step takes ten seconds, a measurement one, of which a share of 0.04 has 25 s of steps.

    With it, 2 s of the 2.0 of five steps; 3 of the 3.2 of eight; 4 of the 4.0 of ten.
    """
    clock, values = Clock(), geometry.singular_values

    def slowly(matrix):
        clock.wait(0.5)  # there are two
        return values(matrix)

    monkeypatch.setattr(NO_TIME, clock)
    monkeypatch.setattr(geometry, "singular_values", slowly)
    module = Guided([{"mlp.up": [[1.0, 0.0], [0.0, 0.0]]}] * 11, lambda: clock.wait(10.0))
    events = TensorBoardLogger(tmp_path, name="", version="")
    options = {"share": 0.04, "every_n_steps": every, "loggers": [events]}
    found = run_by_hand(tmp_path, module, Idle(clock), **options)
    assert list(found) == steps
    assert {measurement["seconds"] for measurement in found.values()} == {1.0}
    assert listed(tmp_path) == rows
    pictures = EventAccumulator(str(tmp_path)).Reload().Images("geometry/norm")
    assert [picture.step for picture in pictures] == [11]  # earlier ones would take too long


def test_a_long_run_shows_its_heat_map_on_the_way(tmp_path, monkeypatch):
    """From half a second in a tenth of the share on: 250 s of steps."""
    clock = Clock()
    monkeypatch.setattr(NO_TIME, clock)
    steps = [{"mlp.up": [[1.0, 0.0], [0.0, 0.0]]}] * 9
    events = TensorBoardLogger(tmp_path, name="", version="")
    run_by_hand(tmp_path, Guided(steps, lambda: clock.wait(100.0)), loggers=[events])
    pictures = EventAccumulator(str(tmp_path)).Reload().Images("geometry/norm")
    assert [picture.step for picture in pictures] == [4, 8, 9]
    assert listed(tmp_path) == [1, 2, 4, 8, 9]


def test_an_earlier_runs_file_is_not_replaced(tmp_path):
    steps = [{"mlp.up": [[1.0, 0.0], [0.0, 0.0]]}]
    run_by_hand(tmp_path, Guided(steps))
    before = (tmp_path / "geometry.csv").read_bytes()
    with pytest.raises(
        UserError, match=r"geometry\.csv is there from an earlier run; move it away"
    ):
        run_by_hand(tmp_path, Guided(steps))
    assert (tmp_path / "geometry.csv").read_bytes() == before
