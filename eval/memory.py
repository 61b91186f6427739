"""How much device memory a run needs, from parameter counts: the table of the README.

    python -m eval.memory

Bytes per parameter are those of float32 master weights with AdamW and ``bf16-mixed``: P parameters
of the student, T of the teacher, n devices. What depends on the length of completions comes on top:
activations, the KV cache, and some eight arrays of float32 logits [tokens of a tile, V].

Tests measure all four moments of an FSDP2 run of two processes; the columns of DDP and of other
numbers of devices are computed only.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

MASTER, GRADIENT, ADAM, COPY = 4, 4, 8, 4  # float32; Adam has two moments
GATHERED = TEACHER = 2  # bfloat16

Strategy = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what the run is doing.

    Attributes:
        rollout: Generating: weights, optimizer, teacher, and the gathered copy.
        backward: Between two micro-batches.
        step: In the optimizer's step, which also measures how far it went.
        search: In an EffOPD search.
    """

    rollout: float
    backward: float
    step: float
    search: float

    @property
    def peak(self) -> float:
        """The largest of them."""
        return max(self.rollout, self.backward, self.step, self.search)


def memory(
    student: float,
    teacher: float,
    devices: int,
    strategy: Strategy,
    *,
    effopd: bool = True,
    gradient_sync: Literal["last", "every"] = "last",
    teacher_offload: bool = False,
) -> Memory:
    """Compute the memory of weights, gradients, optimizer and copies on one device, in bytes.

    Args:
        student: Parameters of the student.
        teacher: Parameters of the teacher.
        devices: Number of devices.
        strategy: Whether each holds everything, or a share.
        effopd: Whether there is an anchor, and in a search a copy of W.
        gradient_sync: See OPDModule.
        teacher_offload: See OPDModule; leaves the layers of the teacher in host memory.
    """
    share = student / devices if strategy == "fsdp2" else student
    whole_gradients = strategy == "ddp" or gradient_sync == "last"
    teacher_share = teacher / devices if strategy == "fsdp2" else teacher
    resting = share * (MASTER + ADAM + (COPY if effopd else 0))
    resting += 0 if teacher_offload else teacher_share * TEACHER
    gathered = student * GATHERED  # under DDP: autocast's copies of the weights
    return Memory(
        rollout=resting + gathered,
        backward=resting + GRADIENT * (student if whole_gradients else share),
        step=resting + share * (GRADIENT + COPY),
        search=resting + (share * COPY if effopd else 0) + gathered,
    )


PAIRS = {"1.7B, 4B": (1.72e9, 4.02e9), "4B, 8B": (4.02e9, 8.19e9), "8B, 14B": (8.19e9, 14.8e9)}
PAIRS |= {"14B, 32B": (14.8e9, 32.8e9), "32B, 32B": (32.8e9, 32.8e9)}


def table() -> str:
    """Lay the peaks out as Markdown, in GB."""
    columns: dict[str, tuple[int, Strategy]] = {"DDP": (1, "ddp")}
    columns |= {f"FSDP2, {n} devices": (n, "fsdp2") for n in (8, 32)}
    titles = [*columns, *(f"{name}, `every`" for name in columns if name != "DDP")]
    lines = [f"| student, teacher | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, (student, teacher) in PAIRS.items():
        peaks = [memory(student, teacher, *column).peak for column in columns.values()]
        peaks += [
            memory(student, teacher, *column, gradient_sync="every").peak
            for title, column in columns.items()
            if title != "DDP"
        ]
        lines.append(f"| {name} | {' | '.join(f'{peak / 1e9:.0f}' for peak in peaks)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # there are none
    print(table())
