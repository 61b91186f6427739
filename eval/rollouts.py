"""Read what a run has said on held-out prompts: base, student and teacher, by prompt.

``callbacks.SampleWriter`` writes it, a file for each validation and one for the teacher; runs of
before have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.files import read_lines
from eval.runs import NUMBER, check_shape
from opd.errors import UserError

PER_TOKEN = ("reverse_kl", "student_logprob", "teacher_logprob")
INSERTED = "inserted"  # 1 at tokens of a conversation that nobody has sampled
RECORD = {
    **{"row": NUMBER, "prompt": "", "completion": "", "tokens?": [""]},
    **{f"{name}?": [NUMBER] for name in (*PER_TOKEN, INSERTED)},
}
BASE, STUDENT, TEACHER = "base", "student", "teacher"


@dataclass(frozen=True)
class Completion:
    """What one of them says after a prompt.

    Attributes:
        tokens: Text of each token, n of them; the whole text if nobody knows.
        values: Per token, [n] by name: ``reverse_kl`` in nats and log-probabilities of ``student``
            and ``teacher``; those that are known.
        sampled: Whether the student has sampled a token, [n]; an environment has said the others.
        correct: Whether the answer is right; None if there is nothing to judge.
        ended: Whether it has ended by itself, rather than by the limit of tokens.
    """

    tokens: list[str]
    values: Mapping[str, list[float]]
    sampled: list[bool]
    correct: bool | None
    ended: bool


@dataclass(frozen=True)
class Row:
    """A prompt, and what is said after it.

    Attributes:
        number: Of the prompt's row in the data.
        data_set: Name of its data set, if there are several.
        prompt: Its text, as the models read it.
        answer: The right one, if there is one.
        said: By side; not all need be there.
    """

    number: int
    data_set: str | None
    prompt: str
    answer: str | None
    said: Mapping[str, Completion]


@dataclass(frozen=True)
class HeldOut:
    """What a run has said on held-out prompts.

    Attributes:
        steps: Optimizer steps that each side has been trained for, by side; None for the teacher.
        rows: The prompts of the last validation, in order.
    """

    steps: Mapping[str, int | None]
    rows: list[Row]


def read_held_out(folder: Path, last_step: int) -> HeldOut | None:
    """Read what is in ``validation/`` of a run folder; None if nothing is.

    Args:
        folder: The run folder.
        last_step: What a run has left there that went further, and was then resumed from an
            earlier step, does not count.

    Raises:
        UserError: A file is damaged.
    """
    validation = folder / "validation"
    numbers = [path.stem.removeprefix("step_") for path in validation.glob("step_*.jsonl")]
    steps = [int(number) for number in numbers if number.isdecimal()]
    last = max((step for step in steps if step <= last_step), default=0)
    trained_for = {BASE: 0, STUDENT: last, TEACHER: None} if last else {BASE: 0, TEACHER: None}
    said = {
        side: _read(validation / ("teacher.jsonl" if step is None else f"step_{step:06d}.jsonl"))
        for side, step in trained_for.items()
    }
    rows = [
        Row(
            number=key[0],
            data_set=_text(record.get("data_set")),
            prompt=key[1],
            answer=_text(record.get("answer")),
            said={side: _completion(of[key]) for side, of in said.items() if key in of},
        )
        for key, record in (said.get(STUDENT) or said[BASE]).items()
    ]
    there = {side: step for side, step in trained_for.items() if said[side]}
    return HeldOut(there, rows) if rows else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _read(path: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Read a file of records, by prompt: a run may have been resumed on other prompts."""
    records = {}
    for record in read_lines(path) if path.is_file() else ():
        check_shape(record, RECORD, path)
        tokens = record.get("tokens")
        for name in (*PER_TOKEN, INSERTED):
            if name in record and tokens is not None and len(record[name]) != len(tokens):
                raise UserError(
                    f"{path}: row {record['row']}: {name} has {len(record[name])} numbers for "
                    f"{len(tokens)} tokens"
                )
        records[int(record["row"]), record["prompt"]] = record
    return records


def _completion(record: Mapping[str, Any]) -> Completion:
    known = [name for name in PER_TOKEN if name in record and "tokens" in record]
    tokens = record.get("tokens", [record["completion"]])
    return Completion(
        tokens=tokens,
        values={name: record[name] for name in known},
        sampled=[not one for one in record.get(INSERTED, [0] * len(tokens))][: len(tokens)],
        correct=record.get("correct"),
        ended=record.get("finish_reason") != "length",
    )
