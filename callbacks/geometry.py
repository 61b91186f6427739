"""The geometry of the update W_t - W_0 while a run goes on: how large, of what rank, where to.

In a configuration::

    trainer:
      callbacks+: callbacks.UpdateGeometry

or ``--trainer.callbacks+=callbacks.UpdateGeometry`` on the command line. Scalars are logged as
``geometry/*``; ``geometry.csv`` has a row for each matrix, from the first measurement after or at
each of the steps 1, 2, 4, 8, ... and from the last; ``opd report`` draws both. What is computed
stands in ``opd/geometry.py``: the spectra of arXiv 2605.11739, section 4.5, and angles between the
run's own displacements.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks.accelerator import Accelerator, HoldsWeights, WatchesAccelerators
from callbacks.earlier_run import refuse_to_replace
from opd import extrapolation, geometry, logs, memory
from opd.errors import UserError
from opd.geometry import Spectrum
from opd.geometry_rows import FILE, MatrixRow, parameter_of, read_rows, write_rows
from opd.weights import Device, copy_of
from opd.world import World

MEANS = ("spectral_norm", "spectral_ratio", "effective_rank", "top_ratio")
DRAWING = 0.5  # seconds that a heat map may take
DRAWING_SHARE = 0.1  # of what the run has had for measuring, before a heat map is drawn on the way


class UpdateGeometry(HoldsWeights, WatchesAccelerators):
    """Measures the update dW_t = W_t - W_0 after steps, and after the last one; it only looks.

    Logged are: ``geometry/update_norm``, the Frobenius norm over all trained weights; means over
    the chosen matrices of what :class:`opd.geometry.Spectrum` says of each one's update,
    ``geometry/spectral_norm``, ``spectral_ratio``, ``effective_rank`` and ``top_ratio`` (ratios and
    rank: of those that have moved); the cosine of the matrices' displacement since the measurement
    before with the displacement before that, ``geometry/cosine_previous``, and with the run's
    first, ``geometry/cosine_first``; and what it took, ``geometry/seconds``. The norms of the
    matrices go to TensorBoard as a heat map: at the end, and, where drawing takes no time worth
    mentioning, whenever geometry.csv grows.

    After a search it sees the weights that the search has left. Ranks share the matrices out, and
    gather one at a time if they are sharded. Of an adapter, the matrices are its two factors.

    It holds W_0, a copy of all trained weights, which is in every checkpoint; of the chosen
    matrices one more copy, and two displacements in bfloat16, which are in none: three copies in
    all, and half of one more while it measures. So a resumed run goes on with the same W_0, but its
    displacements begin anew, and it logs no cosine_first. Resumed from a run without this callback,
    W_0 are the weights it begins with.

    Args:
        share: The most that it takes of the seconds of the run's steps: after a measurement it
            waits until its own, with those of one more, are again below share x theirs. The first
            one and that of the end are always made.
        every_n_steps: It measures after multiples of so many steps.
        parameters: Which matrices: attention_and_mlp, all, or glob patterns.
        anchor_device: Where its copies live: parameters (beside them), or cpu (pinned where there
            is a GPU).

    Attributes:
        overwrite: Whether the file of an earlier run may go; the command line guards its folder.
        matrices: Names of the parameters that are chosen matrices, or hold those of experts, those
            that take longest first.

    Raises:
        UserError: A number is out of range.
    """

    label: ClassVar[str] = "geometry"
    overwrite = False

    def __init__(
        self,
        share: float = 0.02,
        every_n_steps: int = 1,
        parameters: str | list[str] = "attention_and_mlp",
        anchor_device: Device = "parameters",
    ) -> None:
        if not 0 < share <= 1:
            raise UserError(f"UpdateGeometry.share={share} must be above 0 and at most 1")
        if every_n_steps < 1:
            raise UserError(f"UpdateGeometry.every_n_steps={every_n_steps} must be at least 1")
        super().__init__("all", anchor_device)
        self.share = share
        self.every_n_steps = every_n_steps
        self.chosen = parameters
        self.matrices: list[str] = []
        self._measured_step = 0
        self._spectra: dict[str, Spectrum] = {}  # of that step
        self._rows: list[MatrixRow] = []  # of geometry.csv, on rank 0
        self._listed_step = 0  # the last of them
        self._step_began = 0.0
        self._seconds_of_steps = 0.0
        self._own_seconds = 0.0
        self._last_seconds = 0.0  # of these, what the last measurement has taken
        # Of the matrices, this rank's shards: weights at the measurement before, displacements
        self._before: list[Tensor] = []
        self._previous: list[Tensor] | None = None
        self._first: list[Tensor] | None = None

    # --- hooks ----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take W_0, or the one that a checkpoint has brought, and choose the matrices.

        Raises:
            UserError: There are none, or there is an earlier run's file.
        """
        super().on_fit_start(trainer, pl_module)
        if not self.overwrite:
            refuse_to_replace(trainer, [FILE])
        shapes = self.weights.shapes()
        chosen = extrapolation.select_parameters(self.names, self.chosen, type(self).__name__)
        matrices = [name for name in chosen if geometry.has_matrices(name, shapes[name])]
        if not matrices:
            raise UserError(
                f"UpdateGeometry.parameters {self.chosen!r} matches no matrix: {chosen[0]} has "
                f"shape {list(shapes[chosen[0]])}"
            )
        cost = {name: math.prod(shapes[name]) * min(shapes[name][-2:]) for name in matrices}
        # Ranks that decompose matrices at the same time should need the same time
        self.matrices = sorted(matrices, key=lambda name: cost[name], reverse=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin where the run begins.

        Raises:
            UserError: The geometry.csv that a resumed run goes on with is damaged.
        """
        super().on_train_start(trainer, pl_module)
        t, path = trainer.global_step, self._path(trainer)
        reads = trainer.is_global_zero and path.is_file()
        found = World(trainer.strategy).together(lambda: read_rows(path) if reads else [])
        self._rows = [row for row in found if row.step <= t]  # what comes after is done again
        self._listed_step = t
        self._before = self.weights.copy(self.matrices, self.anchor_device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_began = perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not Accelerator.any_acts_after(trainer):
            self._after_step(trainer)

    def after_acceleration(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._after_step(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the run has come to, if the last step has not been measured."""
        if self._measured_step != trainer.global_step:
            self._measure(trainer)
        if self._spectra and trainer.is_global_zero:
            self._list(trainer)
            self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the step that was measured last; W_0 is part of the module."""
        return {"measured_step": self._measured_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._measured_step = int(state_dict["measured_step"])

    # --- measuring ------------------------------------------------------------------------------

    def _after_step(self, trainer: Trainer) -> None:
        self._seconds_of_steps += perf_counter() - self._step_began
        if trainer.global_step % self.every_n_steps:
            return
        due = self._own_seconds + self._last_seconds <= self.share * self._seconds_of_steps
        if World(trainer.strategy).broadcast(due):  # ranks' clocks differ
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        """Measure, log, and let geometry.csv grow if t has passed a power of two; a collective."""
        start, world = perf_counter(), World(trainer.strategy)
        with memory.needed_for("UpdateGeometry"):
            self._spectra = self._decompose(world)
            metrics = {
                "update_norm": extrapolation.direction_norm(
                    self.weights.shards(self.names),
                    self.anchor.shards(self.names),
                    self.weights.over_shards(world),
                ),
                **means(list(self._spectra.values())),
                **self._cosines(world),
            }
        self._measured_step = trainer.global_step
        passed = self._listed_step.bit_length() < self._measured_step.bit_length()
        if passed and trainer.is_global_zero:
            self._list(trainer)
            if DRAWING_SHARE * self.share * self._seconds_of_steps > DRAWING:
                self._draw(trainer)
        self._last_seconds = metrics["seconds"] = perf_counter() - start
        self._own_seconds += self._last_seconds
        logs.log(trainer, {f"geometry/{name}": value for name, value in metrics.items()})

    def _decompose(self, world: World) -> dict[str, Spectrum]:
        """Decompose the update of each matrix; in a round, every rank decomposes one."""
        shapes, count = self.weights.shapes(), len(self.matrices)
        names = [geometry.names_of(name, shapes[name]) for name in self.matrices]
        numbers = [
            torch.zeros(len(of), len(dataclasses.fields(Spectrum)), dtype=torch.float64)
            for of in names
        ]
        own: dict[int, Tensor] = {}
        update = self._since(self.anchor.shards(self.matrices))
        whole = self.weights.whole(self.matrices, update, world)
        for i, (matrix, _) in enumerate(whole):
            if i % world.size == world.rank:
                own[i] = matrix
            # Only now that all have theirs: the next is gathered when nobody is decomposing
            if (i + 1) % world.size == 0 or i + 1 == count:
                for j, mine in own.items():
                    for row, (_, one) in enumerate(geometry.matrices_of("", mine)):
                        spectrum = Spectrum.of(geometry.singular_values(one))
                        numbers[j][row] = torch.tensor(dataclasses.astuple(spectrum))
                own.clear()
        rows = world.sum(torch.cat(numbers)).tolist()
        flat = itertools.chain.from_iterable(names)
        return {name: Spectrum(*row) for name, row in zip(flat, rows, strict=True)}

    def _cosines(self, world: World) -> dict[str, float]:
        """Compare the last displacement with earlier ones, and remember it."""
        weights = self.weights.shards(self.matrices)
        # In bfloat16, whose errors are independent: of the cosine of n numbers, 2^-9 / sqrt(n)
        displacement = [
            copy_of(moved.bfloat16(), weight, self.anchor_device)
            for moved, weight in zip(self._since(self._before), weights, strict=True)
        ]
        others = {"cosine_previous": self._previous, "cosine_first": self._first}
        found = {
            name: geometry.cosine(
                (d.to(w.device) for d, w in zip(displacement, weights, strict=True)),
                (d.to(w.device) for d, w in zip(other, weights, strict=True)),
                self.weights.over_shards(world),
            )
            for name, other in others.items()
            if other is not None
        }
        if self._previous is None and not self._resumed:
            self._first = displacement
        self._previous = displacement
        extrapolation.copy_weights(self._before, weights)
        return found

    def _since(self, earlier: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield how far this rank's shards of the matrices have moved, one at a time."""
        for weight, before in zip(self.weights.shards(self.matrices), earlier, strict=True):
            yield weight - before.to(weight.device)

    # --- the file and the picture, on rank 0 ----------------------------------------------------

    @staticmethod
    def _path(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / FILE

    def _list(self, trainer: Trainer) -> None:
        t = self._listed_step = trainer.global_step
        place = {name: i for i, name in enumerate(self.names)}
        found = sorted(self._spectra, key=lambda name: place[parameter_of(name)])
        new = [MatrixRow(t, name, *dataclasses.astuple(self._spectra[name])) for name in found]
        self._rows = [row for row in self._rows if row.step < t] + new
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_rows(self._path(trainer), self._rows)

    def _draw(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                from eval.geometry import heat_maps  # loads matplotlib: only where it is used

                figure = heat_maps({"": [r for r in self._rows if r.step == self._listed_step]})
                logger.experiment.add_figure("geometry/norm", figure, self._listed_step)


def means(spectra: Sequence[Spectrum]) -> dict[str, float]:
    """Average over matrices; ratios and rank over those that have moved, NaN if none has."""
    numbers = {name: [getattr(spectrum, name) for spectrum in spectra] for name in MEANS}
    return {
        name: float(torch.tensor(values, dtype=torch.float64).nanmean())
        for name, values in numbers.items()
    }
