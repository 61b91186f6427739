"""AlphaOPD: AlphaRL (arXiv 2510.00553) within on-policy distillation, as 2605.11739 compares with.

In a configuration::

    trainer:
      callbacks+:
        class_path: callbacks.AlphaOPD
        init_args: {every: 2, at: 8}

How a matrix's first left singular vector moves is regressed on the score, and solved for the score
that is aimed at; a rank-1 matrix takes the place of all that has been learnt. A comparison for
EffOPD, which moves along the whole displacement and asks for a score there. The maths stands in
``opd/linear.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.once import Once, evenly
from opd import linear
from opd.errors import UserError
from opd.scores import AnswerAccuracy, CandidateScore, TeacherKL
from opd.step import StepRequest
from opd.weights import Device
from opd.world import World

log = logging.getLogger(__name__)


class AlphaOPD(Once):
    """After step ``at``, once: W = W_0 + x* v_1^T in every matrix.

    At each observed step, with dW_t = sum_i s_i u_i v_i^T, it keeps x_t = a_t s_1 u_1, a_t =
    ||dW_t||_F / s_1 (so x_t = ||dW_t||_F u_1), its sign aligned with those before, and the score
    y_t. Partial least squares with one component of x on y, solved for y*, gives x*; v_1 is that of
    the last step. The paper's y is accuracy relative to that of the model trained to the end, which
    nobody has: ours is the score itself, and where it should arrive is an option.

    Training goes on from there, with the optimizer's state as it was. Without two scores that
    differ it does nothing, and says so.

    Args:
        every: Steps between two observations, each of which costs a score.
        at: The last one, a multiple of ``every``.
        score: What is y. None: AnswerAccuracy on 50 training prompts.
        target: y*; 1 is all answers right, 0 the teacher itself (TeacherKL).
        parameters: all, attention_and_mlp, or glob patterns; of them, what has two dimensions.
        anchor_device: Where W_0 lives: parameters (beside W), or cpu.
        seed: Of the score's examples and random numbers.

    Raises:
        UserError: ``at`` is no multiple of ``every``, or no score can be as high as ``target``.
    """

    label: ClassVar[str] = "alphaopd"

    def __init__(
        self,
        at: int,
        every: int = 1,
        score: CandidateScore | None = None,
        target: float = 1.0,
        parameters: str | list[str] = "attention_and_mlp",
        anchor_device: Device = "parameters",
        seed: int = 0,
    ) -> None:
        super().__init__(evenly("AlphaOPD", every, at), parameters, anchor_device)
        self.at = at
        self.score: CandidateScore = score or AnswerAccuracy()
        if isinstance(self.score, TeacherKL) and target > 0:
            raise UserError(
                f"AlphaOPD.target={target}: TeacherKL is minus a divergence, and at most 0; name "
                "what to aim at, as --trainer.callbacks.target 0"
            )
        self.target = target
        self.seed = seed
        self._points: dict[str, list[Tensor]] = {}  # x_t of each matrix, on the CPU

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.score.check(pl_module)
        super().on_fit_start(trainer, pl_module)

    def step_request(self, t: int) -> StepRequest:
        return self.score.request() if self.due(t) else StepRequest()

    def accelerate(
        self, trainer: Trainer, pl_module: LightningModule, output: Any
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Remember x_t and y_t; at last, go to x*."""
        world = World(trainer.strategy)
        self.score.prepare(pl_module, output, self.seed)
        try:
            score = self.score(pl_module).mean(world.sum)
        finally:
            self.score.release()
        right = self._observe(world)
        if trainer.global_step < self.at:
            return {"score": score}, {"score": score}
        scores = torch.tensor([*(entry["score"] for entry in self.history), score])
        aims = {
            name: linear.where_score_is(torch.stack(points), scores, self.target)
            for name, points in self._points.items()
        }
        move = self._move(aims, right, world)
        if not any(aim is not None for aim in aims.values()) and not world.rank:
            log.warning("AlphaOPD: moves nothing, as no two scores differ: %s", scores.tolist())
        self._points = {}
        self.let_go(self.at)
        record = {"score": score, "coefficient": move.coefficient}
        return record, {"score": score, **move.metrics()}

    def _observe(self, world: World) -> dict[str, Tensor]:
        """Keep x_t of every matrix, and return v_1; the ranks share the decompositions."""
        shapes = self.weights.shapes()
        names = [name for name in self.names if len(shapes[name]) == 2]
        anchor = self.anchor.shards(names)
        displacements = (
            w - a.to(w.device) for w, a in zip(self.weights.shards(names), anchor, strict=True)
        )
        mine: dict[str, tuple[Tensor, Tensor]] = {}
        for i, (displacement, _) in enumerate(self.weights.whole(names, displacements, world)):
            if i % world.size == world.rank:
                before = self._points.get(names[i], [None])[-1]
                mine[names[i]] = linear.first_component(displacement, before)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for part in world.gather(mine):
            found |= part
        for name in names:
            self._points.setdefault(name, []).append(found[name][0])
        return {name: found[name][1] for name in names}

    def _move(
        self, aims: dict[str, Tensor | None], right: dict[str, Tensor], world: World
    ) -> linear.Move:
        """Put x* v_1^T beside W_0, where there is an x*."""
        names = list(aims)
        starts, anchor = self.weights.starts(names, world), self.anchor.shards(names)

        def targets(weights: list[Tensor]) -> Iterator[Tensor]:
            for name, start, w, a in zip(names, starts, weights, anchor, strict=True):
                aim = aims[name]
                if aim is None:
                    yield w
                    continue
                rank_one = torch.outer(aim, right[name].double()).flatten()
                part = rank_one[start : start + w.numel()].view_as(w)
                yield a.to(w.device) + part.to(w)

        reduce_sum = self.weights.over_shards(world)
        with self.weights.edit(names) as weights:
            return linear.move_to(weights, anchor, targets(weights), reduce_sum)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from, beside W_0."""
        return super().state_dict() | {"points": self._points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._points = dict(state_dict["points"])
