"""What is analysed: updates dW = W - W_0 from one base to checkpoints, perhaps of several runs.

Symbols as in the paper (arXiv 2605.11739, section 4): W_0 = base, W = checkpoint, dW = W - W_0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from eval.analyze.tensors import HEAD, Tensors, find_misfit, is_tied, opened
from opd import checkpoints
from opd.errors import UserError
from opd.geometry import has_matrices

Group = Literal["attention", "mlp", "embedding", "head", "other"]
MATRICES: tuple[Group, ...] = ("attention", "mlp")
# Words of names, in this order: a layer's embedding would be of its attention
WORDS: dict[Group, tuple[str, ...]] = {
    "attention": ("attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("mlp", "ffn", "feed_forward", "gate_proj", "up_proj", "down_proj", "experts"),
    "embedding": ("embed", "wte", "wpe"),
    "head": ("lm_head", "embed_out"),
}
Row = dict[str, Any]  # of a table: column and value
CHUNK = 2**24  # numbers that are widened at a time
LABEL = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a model.

    Attributes:
        layer: Number of the transformer layer, from 0; None outside of them.
        kind: Of the module, as q_proj.
        group: What it belongs to. Of attention and MLP these are matrices only, those of experts
            too, [E, m, n].
    """

    layer: int | None
    kind: str
    group: Group

    @staticmethod
    def of(name: str, shape: Sequence[int]) -> Place:
        """Read it off a tensor's name."""
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdecimal()), None)
        kind = parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]
        found: Group = next((g for g, ws in WORDS.items() if any(w in name for w in ws)), "other")
        if found in MATRICES and (layer is None or not has_matrices(name, shape)):
            found = "other"
        return Place(layer, kind, found)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run.

    Attributes:
        label: Of the run, as it is called in tables and figures.
        name: Of the checkpoint.
        step: After which it was saved; of models that do not know, their number in the order given.
        tensors: Its weights.
    """

    label: str
    name: str
    step: int
    tensors: Tensors


@dataclass(frozen=True)
class Updates:
    """A base, and checkpoints trained from it: those of a run side by side, in order.

    Attributes:
        base: W_0.
        checkpoints: All of them.
        places: Of the tensors, by name; without a head that is the embedding itself.
    """

    base: Tensors
    checkpoints: tuple[Checkpoint, ...]
    places: dict[str, Place]

    @property
    def runs(self) -> dict[str, list[Checkpoint]]:
        """The checkpoints by run."""
        found: dict[str, list[Checkpoint]] = {}
        for checkpoint in self.checkpoints:
            found.setdefault(checkpoint.label, []).append(checkpoint)
        return found

    @property
    def matrices(self) -> list[str]:
        """Names of the tensors that are matrices of MLP and attention, or hold those of experts."""
        return [name for name, place in self.places.items() if place.group in MATRICES]

    @property
    def count(self) -> int:
        """How many matrices these are."""
        shapes = (self.base.shapes[name] for name in self.matrices)
        return sum(shape[0] if len(shape) == 3 else 1 for shape in shapes)

    def delta(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """Return dW of one tensor, float32.

        Raises:
            UserError: It holds NaN or an infinite number.
        """
        return self.difference(
            checkpoint, name, self.base.read(name), checkpoint.tensors.read(name)
        )

    def difference(
        self, checkpoint: Checkpoint, name: str, before: Tensor, after: Tensor
    ) -> Tensor:
        """Return the same of one that has been read.

        Raises:
            UserError: It holds NaN or an infinite number.
        """
        found = after.float() - before.float()
        if not found.isfinite().all():
            bad = self.base if not before.isfinite().all() else checkpoint.tensors
            raise UserError(f"{bad.source}: {name} holds numbers that are NaN or infinite")
        return found

    def norm(self, checkpoint: Checkpoint, name: str) -> float:
        """Return the Frobenius norm of dW of one tensor, without a copy of it.

        Raises:
            UserError: It holds NaN or an infinite number.
        """
        after, before = (t.read(name).flatten() for t in (checkpoint.tensors, self.base))
        squares = 0.0
        for one, other in zip(after.split(CHUNK), before.split(CHUNK), strict=True):
            squares += float((one.double() - other.double()).square().sum())
        if not math.isfinite(squares):
            bad = self.base if not before.isfinite().all() else checkpoint.tensors
            raise UserError(f"{bad.source}: {name} holds numbers that are NaN or infinite")
        return math.sqrt(squares)


@contextmanager
def open_updates(
    base: str, named: Sequence[str], *, trust_remote_code: bool = False
) -> Iterator[Updates]:
    """Open a base and the checkpoints of one or several runs.

    Args:
        base: Where W_0 is.
        named: Where checkpoints are, each as SOURCE or LABEL=SOURCE; a run folder stands for all of
            its checkpoints.
        trust_remote_code: Let models run their own code.

    Raises:
        UserError: One is not there, or not of the base's architecture.
    """
    sources = [pair for text in named for pair in _expand(text)]
    if twice := next((s for i, s in enumerate(sources) if s in sources[:i]), None):
        raise UserError(f"--checkpoints: {twice[1]} is named twice")
    with ExitStack() as stack:
        for whole in (False, True):  # files may name tensors otherwise than checkpoints do
            tensors = [
                stack.enter_context(opened(s, trust_remote_code=trust_remote_code, whole=whole))
                for s in (base, *(source for _, source in sources))
            ]
            misfits = [find_misfit(tensors[0], other) for other in tensors[1:]]
            if not any(misfits):
                break
        if misfit := next(filter(None, misfits), None):
            raise UserError(f"--checkpoints: are not all of the base's architecture: {misfit}")
        found: list[Checkpoint] = []
        for (label, source), weights in zip(sources, tensors[1:], strict=True):
            number = sum(checkpoint.label == label for checkpoint in found) + 1
            name, step = Path(source).name, _step_of(source)
            found.append(Checkpoint(label, name, number if step is None else step, weights))
        for label in {checkpoint.label for checkpoint in found}:
            _check_order(label, [c for c in found if c.label == label])
        shapes = tensors[0].shapes
        everywhere = [n for n in shapes if all(n in t.shapes for t in tensors)]
        if HEAD in everywhere and all(map(is_tied, tensors)):  # else the embedding counts twice
            everywhere.remove(HEAD)
        yield Updates(tensors[0], tuple(found), {n: Place.of(n, shapes[n]) for n in everywhere})


def _expand(text: str) -> list[tuple[str, str]]:
    """Read LABEL=SOURCE, and put a run folder's checkpoints in its place, in order of the steps."""
    label, equals, source = text.partition("=")
    if not equals or not LABEL.fullmatch(label) or Path(text).expanduser().exists():
        label, source = "", text
    folder = Path(source).expanduser()
    if not (folder / "checkpoints").is_dir() or (folder / "config.json").is_file():
        return [(label or "update", source)]
    by_step: dict[int, Path] = {}
    for path in sorted(checkpoints.find_all(folder / "checkpoints")):
        if checkpoints.find_flaw(path) is None:
            by_step.setdefault(checkpoints.read_step(path), path)  # last.ckpt may be one more
    if not by_step:
        raise UserError(f"--checkpoints {source}: a run without a whole checkpoint")
    return [(label or folder.name, str(by_step[step])) for step in sorted(by_step)]


def _step_of(source: str) -> int | None:
    path = Path(source).expanduser()
    if not checkpoints.is_checkpoint(path):
        return None
    step = checkpoints.read(path).get("global_step")
    return None if step is None else int(step)


def _check_order(label: str, run: Sequence[Checkpoint]) -> None:
    steps = [checkpoint.step for checkpoint in run]
    if sorted(set(steps)) != steps:
        raise UserError(
            f"--checkpoints: those of {label} are of steps {', '.join(map(str, steps))}; name "
            "those of a run in order, and those of different runs as LABEL=CHECKPOINT"
        )
