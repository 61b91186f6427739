"""Sums of two numbers of two digits: what teacher and students are asked, and the rows that ask it.

The 8,100 sums are dealt out once: those for evaluation and for validation are in nobody's training.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import NamedTuple

HELD_OUT = {"test": 128, "validation": 32}  # rows; the rest is for training


class Sum(NamedTuple):
    """Two numbers to add."""

    left: int
    right: int

    @property
    def problem(self) -> str:
        return f"What is {self.left} + {self.right}? Put the answer in \\boxed{{}}."

    @property
    def answer(self) -> str:
        return str(self.left + self.right)

    @property
    def completion(self) -> str:
        """What the teacher says, and the model as it comes does not."""
        total = f"{self.left} + {self.right} = {self.answer}"
        return f"{total}. The answer is \\boxed{{{self.answer}}}."


def sums() -> dict[str, list[Sum]]:
    """Return the sums of each split, in an order of no meaning."""
    shuffled = [Sum(*pair) for pair in itertools.product(range(10, 100), repeat=2)]
    random.Random(0).shuffle(shuffled)
    splits, start = {}, 0
    for name, count in HELD_OUT.items():
        splits[name] = shuffled[start : start + count]
        start += count
    return {"train": shuffled[start:], **splits}


def write_rows(folder: Path) -> None:
    """Write a JSONL file of prompts with answers for each split; of the test, named as its task."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in sums().items():
        lines = [json.dumps({"prompt": row.problem, "answer": row.answer}) + "\n" for row in rows]
        name = "two_digit_sums" if split == "test" else split
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
