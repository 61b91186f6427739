"""Reuse of rollouts: several optimizer steps on one batch, each undone where it clearly harms.

In a configuration, or ``--model.reuse.steps 4`` on the command line; a preset: ``configs/reuse``::

    model:
      reuse: {steps: 4, held_out: 0.25, margin: 1.0}

To generate a batch of rollouts takes longer than to learn from it, so one may learn from it more
than once. t still counts batches: whatever the number of optimizer steps on a batch, it is one step
of ``trainer.global_step``, with one learning rate, followed by one advance of the scheduler, one
search of EffOPD, one checkpoint. The teachers read a batch once.

**The first step** is ordinary OPD, on the completions that are not held out, and is never undone.
All metrics of tokens, ``optim/lr`` and ``optim/grad_norm`` are its own; ``optim/update_norm`` is of
all steps together, and what an objective measures is logged of further steps as ``reuse/...`` too.

**Further steps** are off-policy: mu has sampled, and the student p is another by now. A token's
loss is weighed by the ratio p / mu, as it is before the step and truncated at 5 (:data:`CAP`), of
the last token that this loss depends on:

- a full-vocabulary objective's loss belongs to a prefix and is exact given it, whatever has been
  sampled after it. So the token *before* counts; the first prefix, the prompt, weighs 1
- a sampled-token objective's loss is of the token itself, and so is the ratio; an objective that
  has this weight in it, as PolicyGradient, gets no other

Exact, but for the truncation: the expectation over that token, given all that precedes it.
Approximated: what precedes it is as likely as mu has made it. (The product of the ratios of all
tokens before would be exact, and of no use: of thousands of them it is 0 or huge.) Where a sampler
leaves out tokens (top_p, top_k), the ratio includes the mass that it has kept.

**The guard**: a share of the completions, by their lots, never gets into the gradient; where a
callback has asked for a held-out part too, both share the larger of the two. The student's reverse
KL on it is taken after every step. A further step after which it is worse by more than ``margin``
standard errors of the paired difference, or not finite, or has nothing to go by, is undone: weights
and optimizer are what they were, bit for bit, and the batch is done with. So it is where a further
step's loss or gradient is not finite, which takes no step at all: the weights are those of the step
before, and if they have diverged, the next batch says so. All ranks decide alike. ``held_out: 0``
guards nothing.

The guard takes memory for a copy of weights and optimizer state; reuse, for the teachers' hidden
states of a whole batch. In ``cost/*``, every pass over a batch counts its ``train_tokens`` again,
and the guard's work is that of a search.

Shapes: B completions, C completion tokens (padded right), N tokens of all completions together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from opd.errors import NonFiniteError, UserError
from opd.extrapolation import Score, copy_weights
from opd.objectives import Distributions, of_sampled
from opd.objectives.policy_gradient import importance_weight
from opd.rollouts import SAMPLED, Rollouts, Tokens
from opd.weights import Weights

CAP = 5.0  # of the ratio p / mu, as that of PolicyGradient


@dataclass(frozen=True)
class Reuse:
    """How often a batch of rollouts is used; see :mod:`opd.reuse`.

    Args:
        steps: Most optimizer steps on a batch; 1 is ordinary OPD, and holds nothing out.
        held_out: Share of the completions that further steps are judged by, and that no step is
            trained on, below 1; 0: further steps are never undone.
        margin: A further step is undone if it is worse by more than so many standard errors.
    """

    steps: int = 4
    held_out: float = 0.25
    margin: float = 1.0

    def __post_init__(self) -> None:
        for name, value, valid, wanted in [
            ("steps", self.steps, self.steps >= 1, "at least 1, which is ordinary OPD"),
            ("held_out", self.held_out, 0 <= self.held_out < 1, "at least 0 and below 1"),
            (
                *("margin", self.margin, 0 <= self.margin < math.inf),
                "a number of standard errors, at least 0",
            ),
        ]:
            if not valid:
                raise UserError(f"model.reuse.{name}={value} must be {wanted}")


# --- importance weights ---------------------------------------------------------------------------


def sampled_logprobs(both: Distributions, tokens: Tokens) -> Mapping[str, Tensor]:
    """Measure ``logp_y`` = log p(y), [n]."""
    return {"logp_y": of_sampled(both.log_p, tokens.y)}


def ratios(both: Distributions, tokens: Tokens) -> Mapping[str, Tensor]:
    """Measure ``ratio`` = min(p(y) / mu(y), CAP), [n]."""
    return {"ratio": importance_weight(of_sampled(both.log_p, tokens.y), tokens.logmu_y, CAP)}


def reuse_name(metric: str) -> str:
    """Say what a metric of an objective is called where it is of further steps."""
    return f"reuse/{metric.partition('/')[2]}"


def importance_weights(
    logp_y: Tensor, rollouts: Rollouts, of: Literal["sampled", "previous"]
) -> Tensor:
    """Return what the losses of tokens are to be multiplied by, 0 at padding, [B, C].

    Args:
        logp_y: log p(y) of the student that is to be trained, [N].
        rollouts: What mu has sampled.
        of: Whose ratio p / mu it is: that of the token sampled, or of the one before it, which is 1
            for the first.
    """
    ratio = importance_weight(rollouts.spread(logp_y), rollouts.engine_logprobs, CAP)
    if of == "previous":
        ratio = torch.cat([torch.ones_like(ratio[:, :1]), ratio[:, :-1]], dim=1)
    if SAMPLED in rollouts.columns:  # what nobody has sampled is as likely as ever
        ratio = torch.where(rollouts.columns[SAMPLED][:, None], ratio, torch.ones_like(ratio))
    return ratio * rollouts.mask


# --- undoing --------------------------------------------------------------------------------------


class Saved:
    """A copy of the weights, and of all that their optimizer knows, on this rank.

    Args:
        weights: The weights.
        optimizer: Lightning's or torch's optimizer of them.
    """

    def __init__(self, weights: Weights, optimizer: Any) -> None:
        self._weights, self._optimizer = weights, optimizer
        self._copies = weights.copy(list(weights.parameters()))
        self._state = {parameter: _copy(state) for parameter, state in optimizer.state.items()}
        self._groups = [
            {name: _copy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    def restore(self) -> None:
        """Put both back, bit for bit; once."""
        with self._weights.edit() as shards:
            copy_weights(shards, self._copies)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for group, saved in zip(self._optimizer.param_groups, self._groups, strict=True):
            for name in group.keys() - saved.keys() - {"params"}:
                del group[name]
            group.update(saved)


def _copy(value: Any) -> Any:
    """Copy what an optimizer holds: tensors, whole or sharded, numbers, and mappings of these."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copy(part) for name, part in value.items()}
    return copy.deepcopy(value)


# --- the steps ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reused:
    """What has become of a batch.

    Attributes:
        steps: Optimizer steps that hold, the first one too.
        undone: Whether a further one was undone, or could not be taken.
    """

    steps: int
    undone: bool


def further_steps(
    reuse: Reuse,
    attempt: Callable[[int], None],
    score: Callable[[], Score],
    save: Callable[[], Saved],
    reduce_sum: Callable[[Tensor], Tensor],
) -> Reused:
    """Take the second to the last step on a batch, until one of them is undone.

    Args:
        reuse: How many, and when one is undone.
        attempt: Takes step k; a NonFiniteError says that it has not, on any rank.
        score: Judges the weights by the held-out part; higher is better.
        save: Copies what a step changes.
        reduce_sum: Sums a tensor over ranks, so that all ranks decide alike.
    """
    best = score() if reuse.held_out else None
    for k in range(2, reuse.steps + 1):
        saved = None if best is None else save()
        try:
            attempt(k)
        except NonFiniteError:
            return Reused(k - 1, undone=True)
        if best is not None and saved is not None:
            after = score()
            change = after.compare(best, reduce_sum)
            if not change.difference >= -reuse.margin * change.standard_error:  # nor if it is NaN
                saved.restore()
                return Reused(k - 1, undone=True)
            best = after
    return Reused(reuse.steps, undone=False)
