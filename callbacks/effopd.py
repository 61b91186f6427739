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
candidate in ``opd/scores.py``; what it shares with other accelerators, in
``callbacks/accelerator.py``. It works on any LightningModule whose parameters require gradients,
given a score that knows the module (see :class:`opd.scores.CandidateScore`).

Where parameters are sharded, so are anchor and copy, and candidates are made shard by shard,
without communication.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from callbacks.accelerator import Accelerator
from opd import directions, extrapolation
from opd.errors import UserError
from opd.extrapolation import Score, SearchResult
from opd.module import OPDModule
from opd.randomness import derive_seed
from opd.scores import AnswerAccuracy, CandidateScore
from opd.step import StepRequest
from opd.weights import Device
from opd.world import World

log = logging.getLogger(__name__)


class EffOPD(Accelerator):
    """Searches along W - anchor after chosen steps and keeps the best candidate.

    The defaults are the paper's. All ranks take the same decision from the same global score. A
    search that refuses every candidate leaves weights, optimizer and random state bit-identical.

    Args:
        schedule: Steps after which to search: powers_of_two, 'every N', 'adaptive N' (less and less
            often while nothing is found, at most N steps apart), a step, or a list of these.
        coefficients: Candidates W + c (W - anchor): a list tried in order until one is refused,
            'doubling LIMIT'; 'two_sided LIMIT', which also goes back toward the anchor; or
            'bracket LIMIT', which multiplies or divides the displacement, the first one at will.
        score: What judges a candidate. None: AnswerAccuracy on 50 training prompts.
        accept: not_worse (paper), better (published code), or 'better M': by more than M standard
            errors of the difference.
        anchor: Weights at the previous search: raw, as the optimizer left them (the paper's
            W_{2^(n-1)}), or accepted, as the search left them (published code).
        proximal: Scores are compared less so many times KL(mu || candidate) per token, how far it
            has moved from mu, the weights that sampled what it is judged on; with 1 it must gain
            more than it moves. Not so where it lies behind mu, seen from W: that is no risk. Needs
            TeacherKL.
        parameters: all (paper), attention_and_mlp (published code), or glob patterns.
        optimizer_state: keep it, or reset it after an accepted candidate.
        learning_rate: keep it; or carry an accepted coefficient over into it: from then on it is
            multiplied, whatever a scheduler does to it, by 1 + c, or by 1 + c/n where W - anchor is
            made of n steps and was too short. Where the anchor has won (c = -1) the steps were too
            long: the rate becomes half of the shortest that was refused; and at the beginning of a
            run the optimizer forgets them. Needs an OPDModule.
        anchor_device: Where the anchor and the copy of W live: parameters (beside them), or cpu
            (pinned where there is a GPU).
        seed: Seed of the score's examples and random numbers, and of random directions.
        direction: displacement, W - anchor; or random, as a control: drawn anew for each search,
            as long in each tensor. It takes one more copy of the weights while it searches.
    """

    label: ClassVar[str] = "effopd"

    def __init__(
        self,
        schedule: str | int | list[str | int] = "powers_of_two",
        coefficients: str | list[float] = [2, 4, 6, 8, 10],  # noqa: B006 - never changed
        score: CandidateScore | None = None,
        accept: str = "not_worse",
        anchor: Literal["raw", "accepted"] = "raw",
        proximal: float = 0.0,
        parameters: str | list[str] = "all",
        optimizer_state: Literal["keep", "reset"] = "keep",
        learning_rate: Literal["keep", "carry"] = "keep",
        anchor_device: Device = "parameters",
        seed: int = 0,
        direction: Literal["displacement", "random"] = "displacement",
    ) -> None:
        super().__init__(parameters, anchor_device)
        self.schedule = extrapolation.parse_schedule(schedule)
        self.coefficients = extrapolation.parse_coefficients(coefficients)
        self.score: CandidateScore = score or AnswerAccuracy()
        self.accept = extrapolation.parse_accept(accept)
        self.anchor_kind = anchor
        if not 0 <= proximal < math.inf:
            raise UserError(f"EffOPD.proximal={proximal} must be 0 or more")
        if proximal and not self.score.knows_moved:
            raise UserError(
                f"EffOPD.proximal: {type(self.score).__name__} does not say how far a candidate "
                "has moved; TeacherKL does (--config effopd/label_free)"
            )
        self.proximal = proximal
        self.optimizer_state = optimizer_state
        self.learning_rate = learning_rate
        self.learning_rate_factor = 1.0
        self.seed = seed
        self.direction = direction
        self._warned = False
        self._anchor_step = 0  # the steps since then have led from the anchor to W
        self._settled = False  # whether any search has kept something other than the anchor

    def due(self, t: int) -> bool:
        return self.schedule.due(t)

    def step_request(self, t: int) -> StepRequest:
        asked = self.score.request() if self.due(t) else StepRequest()
        return dataclasses.replace(asked, learning_rate_factor=self.learning_rate_factor)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.learning_rate == "carry" and not isinstance(pl_module, OPDModule):
            raise UserError(
                "EffOPD.learning_rate=carry needs opd's module, which asks for its rate"
            )
        self.score.check(pl_module)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if self.optimizer_state == "reset" and not _can_forget(optimizer):
                raise UserError(
                    f"EffOPD.optimizer_state=reset: the state of {type(optimizer).__name__} may be "
                    "more than moments, and cannot be zeroed; keep it, or use one of torch.optim"
                )
        super().on_train_start(trainer, pl_module)
        if not self._resumed:
            self._anchor_step = trainer.global_step

    def accelerate(
        self, trainer: Trainer, pl_module: LightningModule, output: Any
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Search along W - anchor and leave the best weights there."""
        world = World(trainer.strategy)
        self.score.prepare(pl_module, output, self.seed)
        base = self.weights.copy(self.names, self.anchor_device)
        anchor = self.anchor.shards(self.names)
        over_shards = self.weights.over_shards(world)
        norm = extrapolation.direction_norm(self.weights.shards(self.names), anchor, over_shards)
        origin = anchor
        if self.direction == "random":
            origin = directions.random_anchor(
                self.weights.shards(self.names),
                anchor,
                [derive_seed(self.seed, trainer.global_step, "direction", n) for n in self.names],
                self.weights.starts(self.names, world),
                over_shards,
            )
        current = 0.0
        steps = trainer.global_step - self._anchor_step

        def move_to(coefficient: float) -> None:
            nonlocal current
            if coefficient != current:
                with self.weights.edit(self.names) as weights:
                    extrapolation.set_candidate(weights, base, origin, coefficient)
                current = coefficient

        def score_at(coefficient: float) -> Score:
            move_to(coefficient)
            return self.score(pl_module)

        try:
            candidates = self.coefficients(not self._settled)
            result = extrapolation.search(
                candidates,
                score_at,
                self.accept,
                world.sum,
                lambda coefficient: self.proximal if coefficient > -1 / steps else 0.0,
            )
        except BaseException:
            move_to(0.0)
            raise
        finally:
            self.score.release()
        move_to(result.coefficient)
        self._warn_if_blind(result, world.rank)
        kept: list[Tensor] = base if self.anchor_kind == "raw" else self.weights.shards(self.names)
        extrapolation.copy_weights(anchor, kept)
        diverged = self.learning_rate == "carry" and result.coefficient == -1 and not self._settled
        if diverged or (result.coefficient and self.optimizer_state == "reset"):
            for optimizer in filter(_can_forget, trainer.optimizers):
                _forget(optimizer)
        if self.learning_rate == "carry":
            self.learning_rate_factor *= result.learning_rate_factor(steps)
        self._anchor_step = trainer.global_step
        self.schedule.searched(trainer.global_step, result.coefficient)
        self._settled |= result.coefficient != -1
        record = {
            "candidates": [dataclasses.asdict(tried) for tried in result.tried],
            "coefficient": result.coefficient,
            "learning_rate_factor": self.learning_rate_factor,
        }
        return record, {
            "coefficient": result.coefficient,
            "score_before": result.score_before,
            "score_after": result.score_after,
            "candidates": float(len(result.tried)),
            "direction_norm": norm,
            "learning_rate_factor": self.learning_rate_factor,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from, beside the anchor."""
        return super().state_dict() | {
            "learning_rate_factor": self.learning_rate_factor,
            "interval": self.schedule.interval,
            "coming": self.schedule.coming,
            "anchor_step": self._anchor_step,
            "settled": self._settled,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's searches; one of before knows of no factor and no interval."""
        super().load_state_dict(state_dict)
        self.learning_rate_factor = state_dict.get("learning_rate_factor", 1.0)
        self.schedule.interval = state_dict.get("interval", 1)
        self.schedule.coming = state_dict.get("coming", 1)
        before = self.history[-1]["step"] if self.history else 0
        self._anchor_step = state_dict.get("anchor_step", before)
        self._settled = state_dict.get("settled", bool(self.history))

    def _warn_if_blind(self, result: SearchResult, rank: int) -> None:
        """Say, once, that a search has decided without evidence: all scores were the same."""
        if self._warned or rank or not result.tried:
            return
        name, scores = type(self.score).__name__, [result.score_before]
        scores += [tried.score for tried in result.tried]
        if all(map(math.isnan, scores)):
            self._warned = True
            log.warning(
                "EffOPD: %s had no completion to judge by, and so decides nothing; raise "
                "data.batch_size or the score's fraction",
                name,
            )
        elif len(result.tried) > 1 and len(set(scores)) == 1:
            self._warned = True
            log.warning(
                "EffOPD: %s gives W and all %d candidates the same score, %g, and so decides "
                "nothing; TeacherKL (--config effopd/label_free) tells weights apart",
                *(name, len(result.tried), result.score_before),
            )


def _can_forget(optimizer: Optimizer) -> bool:
    """Whether its state is zero at first; optimizers from elsewhere may keep weights there."""
    return type(optimizer).__module__.startswith("torch.optim")


def _forget(optimizer: Optimizer) -> None:
    """Make an optimizer forget its steps; an emptied state could not be saved in shards."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
