"""One step of on-policy distillation, t = ``trainer.global_step`` after it (paper: 2605.11739).

1. prompts, for the whole step on this rank
2. rollouts: the engine samples completions with the student as it is, as long as is asked for;
   with ``model.reward`` they are rewarded, and with ``model.reward.dynamic`` sampled in rounds;
   with a value head (PPO), each token then gets an advantage of its own
3. micro-batches: completions sorted by length, cut by a budget of positions
4. teachers, if there are any, read each micro-batch
5. the objective's loss per token is summed and divided by the token count of the *global* batch:
   all ranks, all micro-batches
6. one backward per micro-batch; then clip and optimizer; with ``model.reuse`` several times, for
   the same rollouts (``opd/reuse.py``); then the scheduler
7. callbacks act in ``on_train_batch_end``: EffOPD may move the weights there

What a callback needs of a step it asks for beforehand with a :class:`StepRequest`, and finds in the
:class:`StepOutput` that Lightning hands to ``on_train_batch_end`` as ``outputs["step"]``.

Shapes: B completions, N tokens of a micro-batch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from opd import memory, optimization, sharding, stages
from opd.errors import NonFiniteError
from opd.extrapolation import Score
from opd.metrics import DROPPED_FRACTION, ENGINE_GAP, token_metrics
from opd.prompts import PromptBatch
from opd.randomness import derive_seed, own_randomness
from opd.reuse import Reuse, Saved, further_steps, ratios, reuse_name
from opd.rewards.critic import GAE
from opd.rewards.reward import OUTCOME, differing
from opd.rollouts import Rollouts
from opd.rollouts.records import note_right
from opd.stages import Distillation, Reading
from opd.tokens import Compared, Measure
from opd.weights import Weights
from opd.world import World

ADVICE = "; lower the learning rate and go on from an earlier checkpoint, or look at that prompt"
LOT = "lot"  # column: a number in [0, 1] per completion, evenly spaced over the global batch


@dataclass(frozen=True)
class StepRequest:
    """What a callback asks of the coming step.

    Attributes:
        keep_opinions: Keep the micro-batches with what their teachers think of them.
        held_out: Share of the step's completions to keep out of the gradient.
        learning_rate_factor: What the step's learning rate is multiplied by, whatever the schedule.
        max_new_tokens: Longest completion of the step; None: as long as the module's sampler says,
            and never longer.
    """

    keep_opinions: bool = False
    held_out: float = 0.0
    learning_rate_factor: float = 1.0
    max_new_tokens: int | None = None

    @staticmethod
    def merged(requests: Iterable[StepRequest]) -> StepRequest:
        """Ask for all that somebody asks for, and for the shortest completions."""
        asked = list(requests)
        limits = [r.max_new_tokens for r in asked if r.max_new_tokens is not None]
        return StepRequest(
            keep_opinions=any(request.keep_opinions for request in asked),
            held_out=max((request.held_out for request in asked), default=0.0),
            learning_rate_factor=math.prod(request.learning_rate_factor for request in asked),
            max_new_tokens=min(limits, default=None),
        )


@runtime_checkable
class RequestsSteps(Protocol):
    """A callback that asks something of steps."""

    def step_request(self, t: int) -> StepRequest:
        """Say what is needed of step t, before it is taken."""
        ...


@runtime_checkable
class SurroundsSteps(Protocol):
    """A callback that has steps taken with other weights than those that are judged and saved."""

    def around_step(self) -> AbstractContextManager[None]:
        """Put those weights in place for a step, rollouts included; left if it fails, too."""
        ...


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves behind.

    Attributes:
        t: Number of the step, from 1.
        micro_batches: What was trained on; some may have no tokens.
        values: The metrics of each micro-batch, by name, [N].
        readings: The same micro-batches with their teachers' opinions, if they were asked for.
        held_out: Micro-batches that were kept out of the gradient.
        held_out_readings: The same with their teachers' opinions, if the step itself needed them.
        update: Metrics of the optimizer's step.
    """

    t: int
    micro_batches: list[Rollouts]
    values: list[dict[str, Tensor]]
    readings: list[Reading]
    held_out: list[Rollouts]
    held_out_readings: list[Reading]
    update: dict[str, float]


def take_step(
    module: Distillation, batch: PromptBatch, request: StepRequest, optimizer: Any, scheduler: Any
) -> StepOutput:
    """Take one step, top to bottom; all ranks together.

    Args:
        module: A student with its teachers.
        batch: This rank's prompts.
        request: What callbacks ask for.
        optimizer: Lightning's or torch's optimizer of the student's weights.
        scheduler: Of the learning rate; None: it is constant.

    Raises:
        StoppedBeforeStep: A loss, a teacher's opinion or the gradient is infinite or NaN, on
            whatever rank, or completions were sampled from something else than the student.
    """
    t, world = module.global_step + 1, module.world
    rollouts = sample(module, batch, t, request.max_new_tokens)
    reuse, share = module.reuse, request.held_out
    if reuse is not None:
        share = max(share, reuse.held_out)
    held_out, trained = split(rollouts, share)
    micro_batches = stages.micro_batches(module, trained)
    with own_randomness(module.device, module.seed, t, world.rank, "dropout"):
        values, readings = accumulate_gradients(
            module, micro_batches, request.keep_opinions or reuse is not None
        )
    # The teacher first: where it fails, the loss follows
    asked = [("teacher_logprob", "teacher's log-probability")] if module.teachers else []
    for name, what in [*asked, ("loss", "loss")]:
        check_finite(t, micro_batches, [v[f"opd/{name}"] for v in values], what, world)
    if not module.engine.staleness:  # other weights have sampled, as they should
        both = zip(micro_batches, values, strict=True)
        gap = _mean([micro.keep_sampled(v[ENGINE_GAP]) for micro, v in both], world)
        module.gap_alarm.check(t, gap, module.sampler)
    weights = module.weights
    apply = functools.partial(
        apply_gradients,
        weights,
        module.student,
        optimizer,
        max_grad_norm=module.max_grad_norm,
        learning_rate_factor=request.learning_rate_factor,
        t=t,
    )
    with module.ledger.phase("train"):
        before = weights.copy(list(weights.parameters())) if module.update_norm else None
        update = apply(optimizer.step)
    aside = stages.micro_batches(module, held_out) if share else []
    aside_readings: list[Reading] = []
    try:
        if reuse is not None:
            if reuse.held_out:
                with module.ledger.phase("teacher"):
                    aside_readings = [stages.read(module, micro) for micro in aside]
                    module.ledger.count("teacher_tokens", sum(m.num_tokens for m in aside))
            again = functools.partial(apply, functools.partial(world.step, optimizer))
            update |= reuse_rollouts(module, reuse, t, readings, aside_readings, optimizer, again)
    finally:  # whatever becomes of further steps, the one that is counted has been taken
        if scheduler is not None:
            scheduler.step()
    if before is not None:
        with module.ledger.phase("train"):
            update["optim/update_norm"] = _distance(before, weights, world)
    return StepOutput(
        t,
        micro_batches,
        values,
        readings=readings if request.keep_opinions else [],
        held_out=aside,
        held_out_readings=aside_readings,
        update=update,
    )


def reuse_rollouts(
    module: Distillation,
    reuse: Reuse,
    t: int,
    readings: Sequence[Reading],
    held_out: Sequence[Reading],
    optimizer: Any,
    apply: Callable[[], object],
) -> dict[str, float]:
    """Take further steps on what has been trained on once: :mod:`opd.reuse`; all ranks together.

    Args:
        module: A student with its teachers.
        reuse: How many.
        t: Number of the batch, from 1.
        readings: What was trained on.
        held_out: What judges further steps.
        optimizer: Lightning's or torch's optimizer of the student's weights.
        apply: Takes an uncounted step along the gradients.

    Returns:
        ``reuse/steps``, optimizer steps on this batch that hold; ``reuse/undone``, 1 if one was
        undone; and, of the tokens that further steps have seen, the mean ratio p / mu, truncated,
        and the means of what the objective measures: ``rl/clip_fraction`` as
        ``reuse/clip_fraction``.
    """
    world, own = module.world, [(name, reuse_name(name)) for name in module.objective.metrics]
    names = list(dict.fromkeys([*(name for _, name in own), "reuse/ratio"]))
    seen = torch.zeros(len(names), 2, dtype=torch.float64)

    def attempt(k: int) -> None:
        with own_randomness(module.device, module.seed, t, world.rank, "dropout", k):
            values = accumulate_again(module, readings)
        try:
            micro_batches = [reading.micro for reading in readings]
            check_finite(t, micro_batches, [v["opd/loss"] for v in values], "loss", world)
            with module.ledger.phase("train"):
                apply()
        except NonFiniteError:
            optimizer.zero_grad()
            raise
        for reading, v in zip(readings, values, strict=True):
            found = {name: v[measured] for measured, name in own}
            found["reuse/ratio"] = reading.micro.keep_sampled(v["ratio"])
            for name, value in found.items():
                seen[names.index(name)] += torch.stack(
                    [value.double().sum().cpu(), torch.tensor(float(len(value)))]
                )

    def score() -> Score:
        with module.ledger.phase("search"):
            return stages.judge(module, held_out, "reverse_kl")

    def save() -> Saved:
        with memory.needed_for("a copy of weights and optimizer state"):
            return Saved(module.weights, optimizer)

    reused = further_steps(reuse, attempt, score, save, world.sum)
    metrics = {"reuse/steps": float(reused.steps), "reuse/undone": float(reused.undone)}
    of_all = zip(names, world.sum(seen).tolist(), strict=True)
    return metrics | {name: total / count for name, (total, count) in of_all if count}


def sample(
    module: Distillation, batch: PromptBatch, t: int, max_new_tokens: int | None = None
) -> Rollouts:
    """Sample the step's completions, perhaps shorter than usual, and give each its lot.

    Args:
        module: A student; where it has a reward, they are rewarded.
        batch: This rank's prompts; with dynamic sampling, some may be left out.
        t: Number of the step, from 1.
        max_new_tokens: Longest completion; None: as the module's sampler says.
    """
    term, copies = module.reward, module.rollouts_per_prompt
    rows: Sequence[int] = range(len(batch))
    if term is None or term.dynamic is None:
        rollouts = sample_prompts(module, batch, t, max_new_tokens)
    else:
        rollouts, rows = sample_until(module, batch, t, max_new_tokens, term.dynamic)
    if term is not None and isinstance(gae := term.advantage, GAE):
        assert module.critic is not None
        with module.ledger.phase("train"):
            stages.estimate_advantages(module, module.critic, gae, term.weight, rollouts)
    if term is not None and term.per == "completion":
        stages.share_equally(module, rollouts)
    drawn = lots(len(batch) * copies, copies, module.world, module.seed, t, LOT)
    rollouts.columns[LOT] = drawn[_completions(rows, copies)].to(rollouts.lengths.device)
    return rollouts


def sample_until(
    module: Distillation, batch: PromptBatch, t: int, max_new_tokens: int | None, fewest: int
) -> tuple[Rollouts, list[int]]:
    """Sample until enough prompts have completions with different rewards: dynamic sampling.

    DAPO (2503.14476, section 3.2). The prompts of all ranks, in their order, ``fewest`` at a time;
    so what is sampled and kept does not depend on the number of ranks.

    Args:
        module: A student with a reward.
        batch: This rank's prompts.
        t: Number of the step, from 1.
        max_new_tokens: Longest completion; None: as the module's sampler says.
        fewest: Prompts to find, all ranks together.

    Returns:
        The completions of this rank's prompts that are kept, and the numbers of these prompts.
    """
    world, copies, metrics = module.world, module.rollouts_per_prompt, module.train_metrics
    total = int(world.sum(torch.tensor(float(len(batch)))))
    parts: list[Rollouts] = []
    rows: list[int] = []
    found = 0
    for start in range(0, total, fewest):
        places = [i * world.size + world.rank for i in range(len(batch))]  # dealt in turn
        some = [i for i, place in enumerate(places) if start <= place < start + fewest]
        prompts = batch.select(some)
        rollouts = sample_prompts(module, prompts, t, max_new_tokens)
        kept = differing(rollouts.columns[OUTCOME], copies)
        dropped = torch.ones(len(some))
        dropped[kept] = 0.0
        members = stages.members(module, metrics, prompts.prompts)
        metrics.update({DROPPED_FRACTION: dropped}, members)
        parts.append(rollouts.select(_completions(kept, copies)))
        rows += [some[i] for i in kept]
        found += int(world.sum(torch.tensor(float(len(kept)))))
        if found >= fewest:
            break
    filled = [part for part in parts if len(part)]
    return Rollouts.concatenate(filled or parts[:1], module.sampler.pad_token_id), rows


def _completions(rows: Iterable[int], copies: int) -> list[int]:
    """Number the completions of some prompts."""
    return [row * copies + copy for row in rows for copy in range(copies)]


def sample_prompts(
    module: Distillation, batch: PromptBatch, t: int, max_new_tokens: int | None
) -> Rollouts:
    """Sample, count, verify and, where there is a reward, reward the completions of prompts."""
    copies, seed = module.rollouts_per_prompt, derive_seed(module.seed, t, "rollout")
    with module.ledger.phase("rollout"):
        if module.mixture is None:
            generate = functools.partial(stages.generate, module)
        else:
            generate = functools.partial(stages.mixed, module, module.mixture)
        rollouts = generate(batch, seed, copies=copies, max_new_tokens=max_new_tokens)
        module.ledger.count("rollout_tokens", len(rollouts.keep_sampled(rollouts.tokens)))
        if batch.upcoming is not None:  # on all ranks alike
            stages.sample_ahead(
                module,
                PromptBatch.collate(batch.upcoming, module.sampler.pad_token_id),
                derive_seed(module.seed, t + 1, "rollout"),
                copies=copies,
                max_new_tokens=max_new_tokens,
            )
    right = stages.count_rollouts(module, module.train_metrics, rollouts)
    if module.reward is not None:
        note_right(rollouts, right)
        stages.reward(module, module.reward, rollouts)
    return rollouts


def lots(count: int, copies: int, world: World, *key: int | str) -> Tensor:
    """Put the completions of all ranks in a random order, and return where this rank's are.

    A collective. Whatever the number of ranks, a completion of the global batch has the same lot.

    Args:
        count: Completions on this rank, ``copies`` of each prompt side by side.
        copies: Completions per prompt. Prompts are dealt to the ranks in turn.
        world: The ranks.
        key: Of the random order.

    Returns:
        Numbers in [0, 1], evenly spaced over the global batch, [count]; 1 for a single completion.
    """
    total = int(world.sum(torch.tensor(float(count))))
    if total <= 1:
        return torch.ones(count)
    local = torch.arange(count)
    position = (local // copies * world.size + world.rank) * copies + local % copies
    shuffler = torch.Generator().manual_seed(derive_seed(*key))
    return torch.randperm(total, generator=shuffler)[position] / (total - 1)


def split(rollouts: Rollouts, held_out: float) -> tuple[Rollouts, Rollouts]:
    """Split completions into a share that is held out and the rest, by their lots."""
    if not held_out:
        return rollouts.select([]), rollouts
    out = rollouts.columns[LOT] < held_out
    rows, others = (part.nonzero().flatten().tolist() for part in (out, ~out))
    return rollouts.select(rows), rollouts.select(others)


def accumulate_gradients(
    module: Distillation, micro_batches: Sequence[Rollouts], keep_opinions: bool = False
) -> tuple[list[dict[str, Tensor]], list[Reading]]:
    """Let teachers read every micro-batch, and add up the gradient of all.

    Returns:
        The metrics of each micro-batch by name, [N]; and, if they are to be kept, the micro-batches
        with what their teachers think of them.
    """
    counts = [micro.num_tokens for micro in micro_batches]
    total = global_tokens(module.world, counts)
    values: list[dict[str, Tensor]] = []
    readings: list[Reading] = []
    for i, reading in enumerate(_read(module, micro_batches)):
        with module.ledger.phase("train"):
            last = i == len(micro_batches) - 1
            weighed = stages.weighed(module, reading) if module.engine.staleness else reading
            compared = add_gradient(module, weighed, token_metrics, total, last=last)
            module.ledger.count("train_tokens", counts[i])
            stages.count_tokens(module, module.train_metrics, reading.micro, compared.values)
        values.append(compared.values)
        readings += [reading] if keep_opinions else []
    return values, readings


def _read(module: Distillation, micro_batches: Sequence[Rollouts]) -> Iterator[Reading]:
    """Let teachers read micro-batches, one after the other; servers, one ahead of the student."""
    asked: deque[Reading] = deque()
    coming = iter(micro_batches)
    for _ in micro_batches:
        with module.ledger.phase("teacher"):
            for micro in itertools.islice(coming, module.teachers.ahead + 1 - len(asked)):
                asked.append(stages.read(module, micro, reference=True))
                count = micro.num_tokens * len(asked[-1].opinions)
                module.ledger.count("teacher_tokens", count)
            reading = stages.drifted(module, asked.popleft())
        yield reading


def accumulate_again(module: Distillation, readings: Sequence[Reading]) -> list[dict[str, Tensor]]:
    """Add up the gradient of what has been read, with importance weights.

    Returns:
        The loss and the ratio p / mu of each micro-batch, by name, [N].
    """
    counts = [reading.micro.num_tokens for reading in readings]
    total = global_tokens(module.world, counts)
    values: list[dict[str, Tensor]] = []
    for i, reading in enumerate(readings):
        with module.ledger.phase("train"):
            weighed = stages.weighed(module, reading)
            compared = add_gradient(module, weighed, ratios, total, last=i == len(readings) - 1)
            module.ledger.count("train_tokens", counts[i])
        values.append(compared.values)
    return values


def global_tokens(world: World, counts: Sequence[int]) -> float:
    """Add up the tokens of all micro-batches of all ranks, at least 1; a collective."""
    return max(world.sum(torch.tensor(float(sum(counts)))).item(), 1.0)


def add_gradient(
    module: Distillation, reading: Reading, measure: Measure, total: float, *, last: bool
) -> Compared:
    """Compare a micro-batch, and add the gradient of its share of the loss.

    Args:
        module: A student with its teachers.
        reading: The micro-batch.
        measure: What else is wanted of every token.
        total: Tokens of the global batch.
        last: Whether it is the last of a step.
    """
    world = module.world
    compared = stages.compare(module, reading, module.objective, measure)
    sync = module.gradient_sync == "every" or last
    # Data parallel strategies average gradients over ranks; the sum is wanted
    with memory.needed_for("the gradient"):
        world.backward(compared.total * (world.size / total), module.student, sync=sync)
    return compared


def check_finite(
    t: int, micro_batches: Sequence[Rollouts], values: Sequence[Tensor], what: str, world: World
) -> None:
    """Stop all ranks, before the optimizer's step, if a value of any of them is not finite.

    Args:
        t: Number of the step, from 1.
        micro_batches: What the values are of.
        values: Of each micro-batch, [N].
        what: What to call them in the message.
        world: The ranks.

    Raises:
        NonFiniteError: One is not; names step, rank and prompt row.
    """
    bad = torch.zeros(world.size)
    bad[world.rank] = sum(float((~v.isfinite()).sum()) for v in values)
    bad = world.sum(bad)
    if not bad.any():
        return
    rows = [
        f"{prompt.row} ({value}{', ' if prompt.where else ''}{prompt.where})"
        for micro, v in zip(micro_batches, values, strict=True)
        for prompt, value in zip(
            micro.prompts.prompts, micro.spread(v).sum(dim=1).tolist(), strict=True
        )
        if not math.isfinite(value)
    ]
    found = ", ".join(rows[:5]) + (", ..." if len(rows) > 5 else "")
    rank = int(bad.argmax())
    raise NonFiniteError(
        f"step {t}, rank {rank}: the {what} of prompt row {world.broadcast(found, rank)} is "
        f"not finite; the weights are those of step {t - 1}{ADVICE}"
    )


def _mean(values: Sequence[Tensor], world: World) -> float:
    """Return the mean over all tokens of all ranks, 0 if there are none."""
    found = [value.double() for value in values]
    sums = torch.tensor([float(sum(f.sum() for f in found)), float(sum(f.numel() for f in found))])
    total, count = world.sum(sums.double()).tolist()
    return total / count if count else 0.0


def apply_gradients(
    weights: Weights,
    student: torch.nn.Module,
    optimizer: Any,
    take: Callable[[], object],
    *,
    max_grad_norm: float,
    learning_rate_factor: float,
    t: int,
) -> dict[str, float]:
    """Clip, and take the optimizer's step.

    Args:
        weights: The student's weights.
        student: The student, perhaps sharded.
        optimizer: Lightning's or torch's optimizer of them.
        take: Takes its step: ``optimizer.step``, or what Lightning does not count.
        max_grad_norm: Gradients are scaled down to this norm.
        learning_rate_factor: What the learning rate is multiplied by.
        t: Number of the step, from 1.

    Returns:
        The metrics of the update: ``optim/lr`` that it was made with, ``optim/grad_norm`` before
        clipping.

    Raises:
        NonFiniteError: The gradient is infinite or NaN.
    """
    grad_norm = sharding.clip_gradients(student, max_grad_norm)
    if not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"step {t}: the gradient's norm is {grad_norm}, although every loss is finite; the "
            f"weights are those of step {t - 1}{ADVICE}"
        )
    with optimization.scaled(optimizer, learning_rate_factor):
        learning_rate = float(optimizer.param_groups[0]["lr"])
        with memory.needed_for("the optimizer's step", weights_change=True):
            take()
    optimizer.zero_grad()
    weights.changed()
    return {"optim/lr": learning_rate, "optim/grad_norm": grad_norm}


def _distance(before: list[Tensor], weights: Weights, world: World) -> float:
    """Return how far the weights are from a copy, which is used up."""
    torch._foreach_sub_(before, weights.shards())
    squares = torch.stack(torch._foreach_norm(before)).double().square().sum()
    return float((world.sum(squares) if weights.sharded else squares).sqrt())
