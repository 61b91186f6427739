"""The built-in task: add three-digit numbers with the carries written out.

A problem and its chain, digit by digit from the right, each step being the two digits, the digit of
their sum and the carry::

    prompt      123+456=
    completion  369c0;257c0;145c0=0579

The long task adds eight numbers: the chain goes on with the next number and the total so far, and
has some 200 tokens. The answer is what stands after the last ``=``. Problems come from a seed; a
fixed property of the numbers decides whether a problem is for training or for testing, so the two
never overlap.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

CHARACTERS = "0123456789+=;c"
ANSWER_PATTERN = r"=(\d+)$"
DIGITS = 3
SHORT, LONG = 2, 8  # numbers to add
# Name after ``embedded:`` -> split, numbers to add, rows.
PROMPTS: dict[str, tuple[Split, int, int]] = {
    "train": ("train", SHORT, 16_384),
    "test": ("test", SHORT, 512),
    "train-long": ("train", LONG, 16_384),
    "test-long": ("test", LONG, 512),
}
_SPLIT_MODULUS, _TEST_RESIDUES = 97, 10


@dataclass(frozen=True)
class Problem:
    """Two to nine numbers of three digits to add."""

    numbers: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return "+".join(map(str, self.numbers)) + "="

    @property
    def answer(self) -> str:
        return f"{sum(self.numbers):0{DIGITS + 1}d}"

    def chain(self, slip: float = 0.0, generator: random.Random | None = None) -> str:
        """Return the completion of an adder who gets sum digits wrong with probability ``slip``.

        The adder goes on with the wrong digit; without slips the answer is right.
        """
        generator = generator or random.Random(0)
        total, text = str(self.numbers[0]), ""
        for i, number in enumerate(self.numbers[1:]):
            addend = str(number).zfill(len(total))
            steps, digits, carry = [], "", 0
            for a, b in zip(reversed(total), reversed(addend), strict=True):
                carry, digit = divmod(int(a) + int(b) + carry, 10)
                if generator.random() < slip:
                    digit = (digit + generator.randint(1, 9)) % 10
                steps.append(f"{a}{b}{digit}c{carry}")
                digits = f"{digit}{digits}"
            total = f"{carry}{digits}" if i == 0 else digits
            text += (f"+{number};" if i else "") + ";".join(steps) + f"={total}"
        return text

    @property
    def split(self) -> Split:
        key = self.numbers[0] * 10**DIGITS + self.numbers[1]
        return "test" if key % _SPLIT_MODULUS < _TEST_RESIDUES else "train"


def problems(split: Split, numbers: int = SHORT, seed: int = 0) -> Iterator[Problem]:
    """Yield problems of one split without end, in an order that ``seed`` fixes."""
    generator = random.Random(f"{split}:{seed}:{DIGITS}")
    low, high = 10 ** (DIGITS - 1), 10**DIGITS - 1
    while True:
        problem = Problem(tuple(generator.randint(low, high) for _ in range(numbers)))
        if problem.split == split:
            yield problem


def rows(name: str) -> list[dict[str, str]]:
    """Return the prompts of ``embedded:NAME``, each with its answer."""
    split, numbers, count = PROMPTS[name]
    stream = problems(split, numbers)
    chosen = [next(stream) for _ in range(count)]
    return [{"prompt": problem.prompt, "answer": problem.answer} for problem in chosen]
