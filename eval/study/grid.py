"""What a study runs: methods x a grid of settings x learning rates x seeds.

A trial is one command of ``opd fit``. What differs between trials stands in :class:`Trial`, by
which results are grouped and paired; all else is the same for the whole study.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.cli import recipes
from opd.errors import UserError

PARTS = ("configs", "arguments", "learning_rates")  # of a method that is written out
SET_BY = {  # options of a trial that follow from the study, and what of it says so
    **{"--output": "output", "--overwrite": "output", "--seed_everything": "seeds"},
    **{
        "--model.optimizer.lr": "learning_rates",
        "--model.optimizer.init_args.lr": "learning_rates",
    },
    **{"--trainer.max_steps": "max_steps", "--trainer.val_check_interval": "check_every"},
}

Settings = tuple[tuple[str, str], ...]  # one point of the grid: (key of opd fit, value as typed)


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: What tables and figures call it.
        learning_rates: Those that it is tried at.
        configs: Files stacked on the recipe, later ones win.
        arguments: Further arguments of ``opd fit``.
    """

    name: str
    learning_rates: tuple[float, ...]
    configs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        method: Name of its method.
        learning_rate: Learning rate.
        seed: Seed.
        settings: Its point of the grid.
    """

    method: str
    learning_rate: float
    seed: int
    settings: Settings = ()

    @property
    def name(self) -> str:
        """Of its folder; no two trials of a study have the same."""
        settings = (f"{key}={value}" for key, value in self.settings)
        name = "_".join(
            [self.method, *settings, f"lr{self.learning_rate}", f"seed{self.seed}"],
        )
        return re.sub(r"[^\w.+=-]", "-", name)

    @property
    def arguments(self) -> list[str]:
        """What it adds to the command of its method."""
        settings = itertools.chain(*((f"--{key}", value) for key, value in self.settings))
        rate, seed = str(self.learning_rate), str(self.seed)
        return [*settings, "--model.optimizer.lr", rate, "--seed_everything", seed]


def trials(
    methods: Sequence[Method], points: Sequence[Settings], seeds: Sequence[int]
) -> list[Trial]:
    """List the trials of a study, seed by seed, so that one that is cut short can be compared.

    Raises:
        UserError: Two of them would have the same folder.
    """
    listed = [
        Trial(method.name, rate, seed, point)
        for seed in seeds
        for point in points
        for method in methods
        for rate in method.learning_rates
    ]
    names = [trial.name for trial in listed]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UserError(f"grid: two trials would be called {twice}; put one value in a file")
    return listed


def read_methods(
    option: str, given: Mapping[str, Any], learning_rates: Sequence[float]
) -> list[Method]:
    """Read methods as YAML gives them.

    Args:
        option: What they were given for, for messages.
        given: By name: null for the recipe alone; one configuration, or a list of them; or a
            mapping with some of ``configs``, ``arguments`` and ``learning_rates``.
        learning_rates: Of methods that name none.

    Raises:
        UserError: A method is something else, or a configuration does not exist.
    """
    named = [(str(name), value) for name, value in given.items()]  # YAML reads 1 as a number
    return [_method(f"{option}.{name}", name, value, learning_rates) for name, value in named]


def _method(option: str, name: str, value: Any, learning_rates: Sequence[float]) -> Method:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(
            f"{option}: {name!r} names folders: begin with a letter, and use letters, "
            "digits, _, -, + and . only"
        )
    parts = value if isinstance(value, Mapping) else {"configs": value}
    if unknown := [key for key in parts if key not in PARTS]:
        raise UserError(f"{option}: {unknown[0]!r} is none of {', '.join(PARTS)}")
    configs = parts.get("configs") or []
    configs = [configs] if isinstance(configs, str) else _list(f"{option}.configs", configs)
    if odd := [config for config in configs if not isinstance(config, str)]:
        raise UserError(f"{option}: {odd[0]!r} is neither a configuration nor null")
    arguments = [to_word(word) for word in _list(f"{option}.arguments", parts.get("arguments", []))]
    check_arguments(f"{option}.arguments", arguments)
    rates = learning_rates
    if "learning_rates" in parts:
        rates = _list(f"{option}.learning_rates", parts["learning_rates"])
    elif not rates:
        raise UserError(f"learning_rates: names none, nor does {option}")
    return Method(
        name,
        tuple(check_rates(f"{option}.learning_rates", rates)),
        tuple(recipes.find(config, option) for config in configs),
        tuple(arguments),
    )


def read_grid(grid: Mapping[str, Any]) -> list[Settings]:
    """List the points of a grid; of one without keys there is one, which sets nothing.

    Args:
        grid: Values by key of ``opd fit``, with or without the dashes.

    Raises:
        UserError: A key is the study's own, or has no list of different values.
    """
    axes = []
    for key, values in grid.items():
        name = str(key).removeprefix("--")
        check_arguments("grid", [f"--{name}"])
        words = [to_word(value) for value in _list(f"grid.{name}", values)]
        check_different(f"grid.{name}", words)
        axes.append([(name, word) for word in words])
    return list(itertools.product(*axes))


def to_word(value: Any) -> str:
    """Write a value of YAML as a word of a command."""
    return value if isinstance(value, str) else json.dumps(value)


def _list(option: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{option}: must be a list, as [a, b], not {to_word(value)}")
    return value


def check_arguments(option: str, words: Sequence[str]) -> None:
    """Refuse arguments that follow from the study.

    Raises:
        UserError: There is one.
    """
    for word in words:
        if key := SET_BY.get(word.partition("=")[0]):
            raise UserError(f"{option}: {word} is set for every trial; change {key} instead")


def check_different(option: str, values: Sequence[Any]) -> None:
    """Refuse a list without values, or with one of them twice.

    Raises:
        UserError: It is such.
    """
    if not values:
        raise UserError(f"{option}: names none")
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise UserError(f"{option}: {twice[0]} is there twice")


def check_rates(option: str, values: Sequence[Any]) -> list[float]:
    """Return learning rates as numbers.

    Raises:
        UserError: There are none, one is no number above 0, or one is there twice.
    """
    rates = []
    for value in values:
        try:
            rates.append(float(value))  # YAML reads 1e-4 as text
        except (TypeError, ValueError):
            raise UserError(f"{option}: {to_word(value)} is no number") from None
    check_different(option, rates)
    for rate in rates:
        if not (rate > 0 and math.isfinite(rate)):
            raise UserError(f"{option}: {rate} must be above 0")
    return rates


def check_seeds(seeds: Sequence[int]) -> None:
    """Check the seeds.

    Raises:
        UserError: There are none, one is there twice, or PyTorch does not take one.
    """
    check_different("seeds", seeds)
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"seeds: {seed} must be at least 0 and below 2**32")
