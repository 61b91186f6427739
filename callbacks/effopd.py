"""EffOPD (arXiv 2605.11739): after some optimizer steps, jump ahead along the last displacement.

In a configuration::

    trainer:
      callbacks+:
        class_path: callbacks.EffOPD
        init_args:
          schedule: powers_of_two
          coefficients: [2, 4, 6, 8, 10]

or ``--trainer.callbacks+=callbacks.EffOPD`` on the command line. Presets: ``configs/effopd/``.

What is searched, and how, stands as pure functions in ``opd/extrapolation.py``; what judges a
candidate in ``opd/scores.py``. This file holds the weights: the anchor, the exact copy of W during
a search, and the decision. It works on any LightningModule whose parameters require gradients,
given a score that knows the module (see :class:`opd.scores.CandidateScore`).

Where parameters are sharded, so are anchor and copy, and candidates are made shard by shard,
without communication. The anchor is part of the module, so every strategy's checkpoint holds it.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from opd import extrapolation
from opd.errors import UserError
from opd.extrapolation import Score, SearchResult
from opd.ledger import Ledger
from opd.scores import AnswerAccuracy, CandidateScore
from opd.sharding import (
    Companion,
    discard_gathered,
    is_sharded,
    local_shards,
    to_host,
    trainable_parameters,
)

ANCHOR = "effopd_anchor"  # name of the anchor within the module


class EffOPD(Callback):
    """Searches along W - anchor after chosen steps and keeps the best candidate.

    The defaults are the paper's. All ranks take the same decision from the same global score. A
    search that refuses every candidate leaves weights, optimizer and random state bit-identical.

    Args:
        schedule: Steps after which to search: powers_of_two, 'every N', a step, or a list of these.
        coefficients: Candidates W + c (W - anchor): a list tried in order until one is refused,
            'doubling LIMIT', or 'two_sided LIMIT', which also goes back toward the anchor.
        score: What judges a candidate. None: AnswerAccuracy on 50 training prompts.
        accept: not_worse (paper), better (published code), or 'better M': by more than M standard
            errors of the difference.
        anchor: Weights at the previous search: raw, as the optimizer left them (the paper's
            W_{2^(n-1)}), or accepted, as the search left them (published code).
        parameters: all (paper), attention_and_mlp (published code), or glob patterns.
        optimizer_state: keep it, or reset it after an accepted candidate.
        anchor_device: Where the anchor and the copy of W live: parameters (beside them), or cpu
            (pinned where there is a GPU).
        seed: Seed of the score's examples and random numbers.
    """

    def __init__(
        self,
        schedule: str | int | list[str | int] = "powers_of_two",
        coefficients: str | list[float] = [2, 4, 6, 8, 10],  # noqa: B006 - never changed
        score: CandidateScore | None = None,
        accept: str = "not_worse",
        anchor: Literal["raw", "accepted"] = "raw",
        parameters: str | list[str] = "all",
        optimizer_state: Literal["keep", "reset"] = "keep",
        anchor_device: Literal["parameters", "cpu"] = "parameters",
        seed: int = 0,
    ) -> None:
        self.due = extrapolation.parse_schedule(schedule)
        self.coefficients = extrapolation.parse_coefficients(coefficients)
        self.score: CandidateScore = score or AnswerAccuracy()
        self.accept = extrapolation.parse_accept(accept)
        self.anchor_kind = anchor
        self.parameters = parameters
        self.optimizer_state = optimizer_state
        self.anchor_device = anchor_device
        self.seed = seed
        self.anchor = Companion()
        self.history: list[dict[str, Any]] = []
        self._resumed = False

    # --- hooks ----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the anchor a part of the module; not every strategy restores before on_fit_start."""
        pl_module.add_module(ANCHOR, self.anchor)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take W_0 as the anchor, or the one that a checkpoint has brought.

        Raises:
            UserError: ``parameters`` matches nothing, or the checkpoint's anchor belongs to others.
        """
        discard_gathered(pl_module)
        moved = self._moved(pl_module)
        restored = {name: self.anchor[name] for name, _ in self.anchor.keys_by_parameter()}
        if missing := sorted(moved.keys() - restored.keys() if restored else ()):
            raise UserError(
                f"the checkpoint's EffOPD anchor lacks {missing[0]}: resume with the same "
                "EffOPD.parameters"
            )
        self.anchor.clear()
        for name, weight in moved.items():
            self.anchor[name] = self._place(restored.get(name, weight).clone(), weight)
        wrapper = trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):  # which sends buffers around
            keys = [key for _, key in self.anchor.keys_by_parameter()]
            wrapper.parameters_to_ignore.update(f"{ANCHOR}.{key}" for key in keys)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take W as the anchor if the checkpoint that was resumed knows of no search."""
        if trainer.ckpt_path is not None and not self._resumed:
            discard_gathered(pl_module)
            weights, anchor = self._shards(pl_module)
            extrapolation.copy_weights(anchor, weights)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.due(trainer.global_step + 1):
            self.score.before_step(pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.due(trainer.global_step):
            self.search(trainer, pl_module)

    # --- the search -----------------------------------------------------------------------------

    def search(self, trainer: Trainer, pl_module: LightningModule) -> SearchResult:
        """Search along W - anchor and leave the best weights in place."""
        step, start = trainer.global_step, time.perf_counter()
        ledger: Ledger = getattr(pl_module, "ledger", Ledger())
        world_size = trainer.world_size

        def reduce_sum(tensor: Tensor) -> Tensor:
            return trainer.strategy.reduce(tensor.to(pl_module.device), reduce_op="sum")

        discard_gathered(pl_module)
        weights, anchor = self._shards(pl_module)
        tokens_before = ledger.totals["search_tokens"]
        with ledger.phase("search"):
            self.score.prepare(pl_module, step, self.seed)
            base = [self._place(weight.clone(), weight) for weight in weights]
            norm = extrapolation.direction_norm(
                weights, anchor, reduce_sum if is_sharded(pl_module) else lambda square: square
            )
            placed = 0.0

            def place(coefficient: float) -> None:
                nonlocal placed
                if coefficient != placed:
                    discard_gathered(pl_module)
                    extrapolation.set_candidate(weights, base, anchor, coefficient)
                    placed = coefficient

            def score_at(coefficient: float) -> Score:
                place(coefficient)
                return self.score(pl_module)

            result = extrapolation.search(self.coefficients, score_at, self.accept, reduce_sum)
            place(result.coefficient)
            extrapolation.copy_weights(anchor, base if self.anchor_kind == "raw" else weights)
            if result.coefficient and self.optimizer_state == "reset":
                for optimizer in trainer.optimizers:
                    _zero_state(optimizer)
        ledger.synchronize(reduce_sum, world_size)
        seconds = time.perf_counter() - start
        tokens = ledger.totals["search_tokens"] - tokens_before
        self._record(pl_module, step, result, norm, seconds, tokens)
        return result

    def _record(
        self,
        pl_module: LightningModule,
        step: int,
        result: SearchResult,
        norm: float,
        seconds: float,
        tokens: float,
    ) -> None:
        """Log a search and keep it for summary.json."""
        self.history.append(
            {
                "step": step,
                "candidates": [dataclasses.asdict(tried) for tried in result.tried],
                "coefficient": result.coefficient,
                "seconds": seconds,
                "tokens": int(tokens),
            }
        )
        pl_module.log_dict(
            {
                "effopd/coefficient": result.coefficient,
                "effopd/score_before": result.score_before,
                "effopd/score_after": result.score_after,
                "effopd/candidates": float(len(result.tried)),
                "effopd/direction_norm": norm,
                "effopd/seconds": seconds,
                "effopd/tokens": tokens,
            }
        )

    # --- weights --------------------------------------------------------------------------------

    def _moved(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the parameters that a search moves, by name."""
        trainable = trainable_parameters(pl_module)
        names = extrapolation.select_parameters(list(trainable), self.parameters)
        return {name: trainable[name].detach() for name in names}

    def _shards(self, pl_module: LightningModule) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's shards of the weights and of the anchor."""
        moved = self._moved(pl_module)
        return local_shards(list(moved.values())), local_shards([self.anchor[n] for n in moved])

    def _place(self, copy: Tensor, weight: Tensor) -> Tensor:
        if self.anchor_device == "parameters":
            return copy.to(weight.device)
        return to_host(copy)

    # --- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the history; Lightning saves it in every checkpoint."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's history; its anchor comes with the module's weights."""
        self.history = list(state_dict["history"])
        self._resumed = True


def _zero_state(optimizer: Optimizer) -> None:
    """Make an optimizer forget its steps; an emptied state could not be saved in shards."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
