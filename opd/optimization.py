"""The optimizer and the schedule of its learning rate: built, tried out, and compared on a resume.

What a run is told holds, also when it goes on from a checkpoint that was told something else: the
optimizer's state comes from the checkpoint, its options and the schedule, at the step reached, from
the configuration.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from opd.errors import UserError
from opd.weights import Weights

UNTOLD = ("params", "initial_lr", "foreach", "fused")  # change no number but by rounding
REHEARSED = 10_000  # steps; of a longer run the first so many

Options = dict[str, Any]
MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


def build(make: MakeOptimizer, parameters: list[torch.nn.Parameter]) -> Optimizer:
    """Build the optimizer that a user has named.

    Adam and AdamW take torch's fused step, if the user does not ask for another: it makes no array
    of the size of the weights, is faster, and knows of shards, as that of SGD does not.

    Raises:
        UserError: It does not take its options, or these parameters.
    """
    try:
        optimizer = make(parameters)
    except Exception as error:  # classes of the user's choice raise what their authors chose
        raise UserError(f"model.optimizer: {_reason(error)}") from error
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        for group in optimizer.param_groups:
            if group.get("fused", False) is None and not (
                group.get("foreach") or group.get("differentiable")
            ):
                group["fused"] = True
    return optimizer


@contextmanager
def scaled(optimizer: Any, factor: float) -> Iterator[None]:
    """Multiply the learning rates of all groups within; schedulers never see it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def trains_others(optimizer: Any) -> bool:
    """Whether it trains other weights than it recommends, as Schedule-Free does."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


@contextmanager
def where_it_trains(optimizer: Any, weights: Weights) -> Iterator[None]:
    """Let the weights be those that an optimizer trains, for a step; between steps, the others.

    Schedule-Free (arXiv 2405.15682) samples and takes gradients at y, and recommends x, an average;
    both follow from one of them and the optimizer's state, by its ``train()`` and ``eval()``. So
    between steps, for all that judges, saves or searches, the weights are x, and each step makes y
    of them anew, whether somebody has looked or not: a run that goes on from a checkpoint, which
    holds x, does so bit for bit. (A step that fails leaves x as it was to rounding.)

    An optimizer without these two methods trains the weights themselves, and nothing happens.

    Args:
        optimizer: Lightning's or torch's.
        weights: What it trains.
    """
    if not trains_others(optimizer):
        yield
        return
    with weights.edit():
        optimizer.train()
    try:
        yield
    finally:
        with weights.edit():
            optimizer.eval()


def rehearse(
    make: MakeOptimizer, make_scheduler: MakeScheduler | None, steps: int
) -> tuple[Optimizer, LRScheduler | None]:
    """Take steps with an optimizer and a scheduler of their own, on two numbers.

    Returns:
        They, as they are after ``steps``: what a run of so many would have.

    Raises:
        UserError: A step of either fails.
    """
    numbers = torch.nn.Parameter(torch.ones(1, 2))
    weights = Weights(torch.nn.ParameterList([numbers]))
    optimizer = build(make, [numbers])
    scheduler = None
    try:
        numbers.grad = torch.ones_like(numbers)
        with where_it_trains(optimizer, weights):
            optimizer.step()
    except Exception as error:
        raise UserError(
            f"model.optimizer: {type(optimizer).__name__} cannot take a plain step "
            f"({_reason(error)}); choose another, as torch.optim.AdamW"
        ) from error
    numbers.grad = None
    taken = 0
    try:
        scheduler = None if make_scheduler is None else make_scheduler(optimizer)
        while scheduler is not None and taken < steps:
            with where_it_trains(optimizer, weights):
                optimizer.step()
            scheduler.step()
            taken += 1
    except Exception as error:
        name = "" if scheduler is None else f"{type(scheduler).__name__} "
        raise UserError(
            f"model.scheduler: {name}fails at step {taken + 1} of {steps} ({_reason(error)})"
        ) from error
    for group in optimizer.param_groups:
        if not group["lr"] >= 0:
            raise UserError(f"model.optimizer: the learning rate is {group['lr']}")
    return optimizer, scheduler


def options_of(optimizer: Optimizer, scheduler: LRScheduler | None) -> Options:
    """Describe what an optimizer and a fresh scheduler were told, so that it can be saved."""
    first = optimizer.param_groups[0]
    told = {name: value for name, value in first.items() if name not in UNTOLD}
    state = {} if scheduler is None else scheduler.state_dict()
    return {
        "optimizer": type(optimizer).__name__,
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        **{name: _plain(value) for name, value in told.items()},
        **{f"scheduler.{name}": _plain(v) for name, v in state.items() if name[0] != "_"},
    }


def check_resumed(saved: Options, ours: Options) -> None:
    """Refuse an optimizer that cannot go on from another one's state.

    Raises:
        UserError: A checkpoint was saved with an optimizer of another class.
    """
    if saved["optimizer"] != ours["optimizer"]:
        raise UserError(
            f"--ckpt_path: the checkpoint was saved with {saved['optimizer']}, and model.optimizer "
            f"is {ours['optimizer']}; go on with the same, or begin anew from the checkpoint's "
            "weights with --model.student CHECKPOINT"
        )


def differences(saved: Options, ours: Options) -> list[str]:
    """Say which options a checkpoint was saved with that are others now."""
    both = {**saved, **ours}.keys() - set(UNTOLD)
    names = sorted(name for name in both if saved.get(name) != ours.get(name))
    return [f"{name} {saved.get(name)} -> {ours.get(name)}" for name in names]


def apply(
    make: MakeOptimizer,
    make_scheduler: MakeScheduler | None,
    optimizer: Optimizer,
    schedulers: Iterable[Any],
    steps: int,
) -> None:
    """Give a resumed optimizer and its scheduler what the configuration says after ``steps``."""
    model, at_step = rehearse(make, make_scheduler, steps)
    known = {"initial_lr", *_arguments(type(model))}
    options = {name: value for name, value in model.param_groups[0].items() if name in known}
    for group in optimizer.param_groups:
        if "initial_lr" not in options:
            group.pop("initial_lr", None)
        group.update(options)
    for scheduler in schedulers:
        assert at_step is not None
        scheduler.load_state_dict(at_step.state_dict())


def _arguments(kind: type[Optimizer]) -> set[str]:
    """Names of what can be told an optimizer; Prodigy and others keep state beside it."""
    makers = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    names = {name for maker in makers for name in inspect.signature(maker).parameters}
    return names - {"self", "params"}


def _plain(value: Any) -> Any:
    """Return what a checkpoint may hold that is read with ``weights_only``, and can be compared."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
