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
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from opd import extrapolation
from opd.errors import UserError
from opd.extrapolation import Score, SearchResult
from opd.ledger import Ledger
from opd.scores import AnswerAccuracy, CandidateScore


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
        anchor_device: Where the anchor and the copy of W live: parameters (beside them), or cpu.
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
        self.anchor: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []

    # --- hooks ----------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take W_0 as the anchor, unless a checkpoint has brought one.

        Raises:
            UserError: ``parameters`` matches nothing, or the checkpoint's anchor belongs to others.
        """
        moved = self._moved(pl_module)
        if not self.anchor:
            self.anchor = self._copy(moved)
        elif self.anchor.keys() != moved.keys():
            raise UserError(
                "the checkpoint's EffOPD anchor belongs to other parameters: resume with the same "
                "EffOPD.parameters"
            )
        else:
            self.anchor = {name: self._place(self.anchor[name], moved[name]) for name in moved}

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

        moved = self._moved(pl_module)
        weights, anchor = list(moved.values()), [self.anchor[name] for name in moved]
        tokens_before = ledger.totals["search_tokens"]
        with ledger.phase("search"):
            self.score.prepare(pl_module, step, self.seed)
            base = list(self._copy(moved).values())
            norm = extrapolation.direction_norm(weights, anchor, reduce_sum)
            placed = 0.0

            def score_at(coefficient: float) -> Score:
                nonlocal placed
                if coefficient != placed:
                    extrapolation.set_candidate(weights, base, anchor, coefficient)
                    placed = coefficient
                return self.score(pl_module)

            result = extrapolation.search(self.coefficients, score_at, self.accept, reduce_sum)
            if placed != result.coefficient:
                extrapolation.set_candidate(weights, base, anchor, result.coefficient)
            extrapolation.copy_weights(anchor, base if self.anchor_kind == "raw" else weights)
            if result.coefficient and self.optimizer_state == "reset":
                for optimizer in trainer.optimizers:
                    optimizer.state.clear()
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
        trainable = {n: p.detach() for n, p in pl_module.named_parameters() if p.requires_grad}
        names = extrapolation.select_parameters(list(trainable), self.parameters)
        return {name: trainable[name] for name in names}

    def _copy(self, moved: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._place(weight.clone(), weight) for name, weight in moved.items()}

    def _place(self, copy: Tensor, weight: Tensor) -> Tensor:
        return copy.to("cpu" if self.anchor_device == "cpu" else weight.device)

    # --- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return anchor and history; Lightning saves them in every checkpoint."""
        return {"anchor": self.anchor, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's anchor and history."""
        self.anchor = dict(state_dict["anchor"])
        self.history = list(state_dict["history"])
