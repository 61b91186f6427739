"""Writes summary.json: the run in one page, for scripts, the report and the study."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.accelerator import Accelerator
from callbacks.earlier_run import refuse_to_replace
from opd.compatibility import callbacks_of

PACKAGES = ("opd", "lightning", "torch", "transformers", "lm-eval")


class RunSummary(Callback):
    """Writes ``summary.json`` after every validation and at the end of the fit.

    The first validation is that of the untrained student (the Trainer's sanity check, over all
    validation prompts), the last one is repeated at the end of the fit if steps came after it.

    Attributes:
        overwrite: Whether the file of an earlier run may go; the command line guards its folder.
    """

    overwrite = False

    def __init__(self) -> None:
        self.initial: dict[str, float] = {}
        self.final: dict[str, float] = {}
        self.validated_step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for an earlier run's file.

        Raises:
            UserError: There is one.
        """
        if not self.overwrite:
            refuse_to_replace(trainer, ["summary.json"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        results = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        if trainer.sanity_checking:
            self.initial = results
            for logger in trainer.loggers:  # Lightning logs nothing of a sanity check
                logger.log_metrics({f"val/{k}": v for k, v in results.items()}, step=0)
        self.final = results
        self.validated_step = trainer.global_step
        self.write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validating = bool(trainer.num_val_batches) and trainer.enable_validation
        if validating and self.validated_step != trainer.global_step:
            trainer.fit_loop.epoch_loop.val_loop.run()
        self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, in one go, on rank 0."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        ledger = getattr(pl_module, "ledger", None)
        costs = ledger.metrics() if ledger is not None else {}
        searches = [c.history for c in callbacks_of(trainer) if isinstance(c, Accelerator)]
        summary = {
            "steps": trainer.global_step,
            "seed": getattr(pl_module, "seed", None),
            "accuracy": self._change("accuracy"),
            "reverse_kl": self._change("reverse_kl"),
            "cost": {name.removeprefix("cost/"): value for name, value in costs.items()},
            "extrapolation": [search for history in searches for search in history],
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        path = Path(trainer.default_root_dir) / "summary.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def _change(self, name: str) -> dict[str, float | None]:
        return {"initial": self.initial.get(name), "final": self.final.get(name)}

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self.initial, "final": self.final}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.initial, self.final = state_dict["initial"], state_dict["final"]
