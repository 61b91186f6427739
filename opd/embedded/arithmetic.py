"""The built-in task: add two three-digit numbers with the carries written out.

A problem and its chain, digit by digit from the right, each step being the two digits, their sum
and the carry::

    prompt      123+456=
    completion  369c0;257c0;145c0=0579

The answer is what stands after the last ``=``. Problems come from a seed; a fixed property of the
two numbers decides whether a problem is a training or a test problem, so the two never overlap.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

CHARACTERS = "0123456789+=;c"
ANSWER_PATTERN = r"=(\d+)$"
ROWS = {"train": 16_384, "test": 512}
_SPLIT_MODULUS, _TEST_RESIDUES = 97, 10


@dataclass(frozen=True)
class Problem:
    """Two numbers to add, both of ``digits`` digits."""

    left: int
    right: int
    digits: int = 3

    @property
    def prompt(self) -> str:
        return f"{self.left:0{self.digits}d}+{self.right:0{self.digits}d}="

    @property
    def answer(self) -> str:
        return f"{self.left + self.right:0{self.digits + 1}d}"

    @property
    def chain(self) -> str:
        """The completion that a careful adder writes."""
        steps, carry = [], 0
        for place in range(self.digits):
            a, b = self.left // 10**place % 10, self.right // 10**place % 10
            carry, digit = divmod(a + b + carry, 10)
            steps.append(f"{a}{b}{digit}c{carry}")
        return ";".join(steps) + f"={self.answer}"

    @property
    def split(self) -> Split:
        key = self.left * 10**self.digits + self.right
        return "test" if key % _SPLIT_MODULUS < _TEST_RESIDUES else "train"


def problems(split: Split, seed: int = 0, digits: int = 3) -> Iterator[Problem]:
    """Yield problems of one split without end, in an order that ``seed`` fixes."""
    generator = random.Random(f"{split}:{seed}:{digits}")
    low, high = 10 ** (digits - 1), 10**digits - 1
    while True:
        problem = Problem(generator.randint(low, high), generator.randint(low, high), digits)
        if problem.split == split:
            yield problem


def rows(split: Split) -> list[dict[str, str]]:
    """The prompts of ``embedded:train`` or ``embedded:test``, each with its answer."""
    stream = problems(split)
    chosen = [next(stream) for _ in range(ROWS[split])]
    return [{"prompt": problem.prompt, "answer": problem.answer} for problem in chosen]
