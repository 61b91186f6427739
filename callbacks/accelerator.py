"""What all callbacks share that have tensors beside the weights, or move them between steps.

An accelerator acts in ``on_train_batch_end``, after the optimizer's step and before checkpoints. It
has tensors of its own beside the weights (an anchor, an average), which are part of the module, so
that every strategy's checkpoint holds them; and a history, which becomes ``extrapolation`` in
summary.json. It works on any LightningModule whose parameters require gradients.

To write one: derive from :class:`Accelerator`, name it (``label``), say when (``due``), and move
the weights (``accelerate``) inside of ``self.weights.edit(self.names)``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from opd import extrapolation, logs, memory
from opd.compatibility import callbacks_of
from opd.errors import UserError
from opd.ledger import Ledger
from opd.step import StepRequest
from opd.weights import Companion, Device, Weights, copy_of
from opd.world import World


class WatchesAccelerators:
    """A callback that wants to know when weights are moved, wherever it stands among the others."""

    def before_acceleration(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the optimizer's step, before an accelerator moves the weights."""

    def after_acceleration(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when it has."""


class HoldsWeights(Callback):
    """Has tensors of its own beside the weights.

    Args:
        parameters: Which weights: all, attention_and_mlp, or glob patterns.
        anchor_device: Where its tensors beside the weights live: parameters (beside them), or cpu
            (pinned where there is a GPU).
        beside: What it has beside the anchor, a tensor for each weight; zero at first.

    Attributes:
        label: Its tensors are ``label_anchor``, and likewise of ``beside``, in the module.
        names: Names of the weights that it has them beside.
        companions: Its tensors: ``anchor``, and those of ``beside``.
    """

    label: ClassVar[str]

    def __init__(
        self,
        parameters: str | list[str] = "all",
        anchor_device: Device = "parameters",
        beside: Sequence[str] = (),
    ) -> None:
        self.parameters = parameters
        self.anchor_device: Device = anchor_device
        self.names: list[str] = []
        self.weights: Weights
        self.companions: dict[str, Companion] = {}
        self._beside = beside
        self._resumed = False

    @property
    def anchor(self) -> Companion:
        """Where the weights have been before."""
        return self.companions["anchor"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make its tensors a part of the module, before a strategy restores them."""
        own = getattr(pl_module, "weights", None)
        self.weights = own if isinstance(own, Weights) else Weights(pl_module)
        self.companions = {
            name: self.weights.companion(f"{self.label}_{name}")
            for name in ("anchor", *self._beside)
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take W_0 as the anchor, or the one that a checkpoint has brought; and so of the others.

        Raises:
            UserError: ``parameters`` matches nothing, or the checkpoint's tensors belong to others.
        """
        self.weights.shards()  # whatever is gathered is let go
        parameters = self.weights.parameters()
        self.names = extrapolation.select_parameters(
            list(parameters), self.parameters, type(self).__name__
        )
        wrapper = trainer.strategy.model
        for kind, companion in self.companions.items():
            self._begin(kind, parameters)
            if isinstance(wrapper, DistributedDataParallel):  # which sends buffers around
                keys = [key for _, key in companion.keys_by_parameter()]
                wrapper.parameters_to_ignore.update(f"{self.label}_{kind}.{key}" for key in keys)

    def _begin(self, kind: str, parameters: Mapping[str, Tensor]) -> None:
        """Fill the tensors of one kind, where no checkpoint has."""
        companion = self.companions[kind]
        restored = {name: companion[name] for name, _ in companion.keys_by_parameter()}
        if missing := sorted(set(self.names) - restored.keys() if restored else ()):
            raise UserError(
                f"the checkpoint's {kind} of {type(self).__name__} lacks {missing[0]}: resume with "
                f"the same {type(self).__name__}.parameters"
            )
        tensors = {}
        for name in self.names:
            weight = parameters[name].detach()
            first = weight if kind == "anchor" else torch.zeros_like(weight)
            tensors[name] = copy_of(restored.get(name, first), weight, self.anchor_device)
        companion.replace(tensors)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take W as the anchor if the checkpoint that was resumed knows of this callback not."""
        if trainer.ckpt_path is not None and not self._resumed:
            shards = self.weights.shards(self.names)
            extrapolation.copy_weights(self.anchor.shards(self.names), shards)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note that a checkpoint has been resumed; the anchor comes with the module's weights."""
        self._resumed = True


class MovesWeights(HoldsWeights):
    """Moves the weights; there is one such callback in a run at most."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make its tensors a part of the module.

        Raises:
            UserError: Another one would move the same weights.
        """
        names = [type(c).__name__ for c in callbacks_of(trainer) if isinstance(c, MovesWeights)]
        if len(names) > 1:
            raise UserError(
                f"trainer.callbacks: {' and '.join(names)} would both move the weights, each "
                "unaware of the other; keep one of them"
            )
        super().setup(trainer, pl_module, stage)


class Accelerator(MovesWeights, ABC):
    """Moves the weights between steps.

    Args:
        parameters: As of HoldsWeights.
        anchor_device: As of HoldsWeights.
        beside: As of HoldsWeights.

    Attributes:
        label: Its metrics are ``label/...``; its tensors are ``label_anchor`` in the module.
        history: What it has done, a mapping per time. One that has a ``coefficient`` c has moved
            the weights, by c (W - anchor) along that direction, or has refused to (0).
    """

    def __init__(
        self,
        parameters: str | list[str] = "all",
        anchor_device: Device = "parameters",
        beside: Sequence[str] = (),
    ) -> None:
        super().__init__(parameters, anchor_device, beside)
        self.history: list[dict[str, Any]] = []

    # --- what an accelerator says ---------------------------------------------------------------

    @abstractmethod
    def due(self, t: int) -> bool:
        """Whether to act after step t."""

    @abstractmethod
    def accelerate(
        self, trainer: Trainer, pl_module: LightningModule, output: Any
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Move the weights; all ranks together.

        Args:
            trainer: The trainer; its ``global_step`` is t.
            pl_module: The module.
            output: What the step has left behind; of an OPDModule, an :class:`opd.step.StepOutput`.

        Returns:
            What to remember in ``history``, and metrics to log.
        """

    def acts_after(self, t: int) -> bool:
        """Whether it acts, or has just acted, after step t: whatever order callbacks have."""
        return self.due(t) or (bool(self.history) and self.history[-1]["step"] == t)

    @staticmethod
    def any_acts_after(trainer: Trainer) -> bool:
        """Whether an accelerator of a run acts, or has just acted, after the step it has taken."""
        found = [c for c in callbacks_of(trainer) if isinstance(c, Accelerator)]
        return any(callback.acts_after(trainer.global_step) for callback in found)

    def step_request(self, t: int) -> StepRequest:
        """Say what is needed of step t, before it is taken."""
        return StepRequest()

    # --- hooks ----------------------------------------------------------------------------------

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self.due(trainer.global_step):
            return
        watching = [c for c in callbacks_of(trainer) if isinstance(c, WatchesAccelerators)]
        for callback in watching:
            callback.before_acceleration(trainer, pl_module)
        start, world = time.perf_counter(), World(trainer.strategy)
        ledger: Ledger = getattr(pl_module, "ledger", Ledger())
        tokens_before = ledger.totals["search_tokens"]
        output = outputs["step"] if isinstance(outputs, Mapping) and "step" in outputs else outputs
        with (
            ledger.phase("search"),
            memory.needed_for(f"the search of {type(self).__name__}"),
            # Lightning opens the context of the precision for training_step alone
            trainer.precision_plugin.train_step_context(),
        ):
            record, metrics = self.accelerate(trainer, pl_module, output)
        ledger.synchronize(world.sum, world.size)
        seconds = time.perf_counter() - start
        tokens = ledger.totals["search_tokens"] - tokens_before
        cost = {"seconds": seconds, "tokens": int(tokens)}
        self.history.append({"step": trainer.global_step, **record, **cost})
        logged = {**metrics, "seconds": seconds, "tokens": tokens}
        named = {f"{self.label}/{name}": value for name, value in logged.items()}
        logs.log(trainer, named)
        for callback in watching:
            callback.after_acceleration(trainer, pl_module)

    # --- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the history; Lightning saves it in every checkpoint."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's history."""
        super().load_state_dict(state_dict)
        self.history = list(state_dict["history"])
