"""Weights of models on disk, read tensor by tensor: a model is never in memory as a whole.

Safetensors are read as they are asked for; files of checkpoints are mapped; of shards each tensor
is put together when its turn comes. What has to be made first (an adapter merged into its base, a
GGUF file unpacked, files that name tensors otherwise than the model does) is loaded as a whole.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from opd import checkpoints
from opd.errors import UserError
from opd.models import adapters, gguf, load_model, model_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD = "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]


class Tensors(ABC):
    """The weights of one model.

    Attributes:
        source: Where they are, as the user has named it.
        shapes: Of the tensors, by name.
    """

    source: str
    shapes: Shapes

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Read one tensor, in the dtype that it is kept in."""


class _Files(Tensors):
    """Safetensors files of a folder; open while they are read, or all of them would be mapped."""

    def __init__(self, source: str, paths: list[Path]) -> None:
        self.source = source
        self.shapes = {}
        self._paths: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._paths[name] = path

    def read(self, name: str) -> Tensor:
        with safe_open(self._paths[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


class _Held(Tensors):
    """Tensors that are in memory, or mapped."""

    def __init__(self, source: str, tensors: Mapping[str, Tensor]) -> None:
        self.source = source
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class _Shards(Tensors):
    """A checkpoint's folder of shards."""

    def __init__(self, source: str, path: Path) -> None:
        self.source = source
        self._path = path
        self._found = checkpoints.student_metadata(path)
        self.shapes = {name: tuple(meta.size) for name, meta in self._found.items()}

    def read(self, name: str) -> Tensor:
        meta = self._found[name]
        key = checkpoints.STUDENT_PREFIX + name
        state = {key: torch.empty(meta.size, dtype=meta.properties.dtype)}
        checkpoints.read_shards(self._path, {checkpoints.STATE_DICT: state}, no_dist=True)
        return state[key]


@contextmanager
def opened(
    source: str, *, trust_remote_code: bool = False, whole: bool = False
) -> Iterator[Tensors]:
    """Open the weights of a model.

    Args:
        source: Hub id, folder, checkpoint, GGUF file or embedded:NAME.
        trust_remote_code: Let it run its own code, where it must be loaded as a whole.
        whole: Load it as a whole, whatever it is, so that tensors have the names of the model.

    Raises:
        UserError: There is no model there.
    """
    path = Path(source).expanduser()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(model_folder(source, weights=True)))
        if whole or gguf.is_gguf(path) or adapters.is_adapter(folder):
            model = load_model(source, trust_remote_code=trust_remote_code)
            yield _Held(source, model.state_dict())
        elif checkpoints.is_sharded(path):
            yield _Shards(source, path)
        elif checkpoints.is_checkpoint(path):
            yield _Held(source, checkpoints.read_tensors(path))
        else:
            yield _Files(source, weight_files(source, folder))


def weight_files(source: str, folder: Path) -> list[Path]:
    """List the safetensors files that a model in a folder consists of.

    Raises:
        UserError: There are none, or one is missing.
    """
    if (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values())
        paths = [folder / name for name in sorted(names)]
    else:
        single = folder / SINGLE
        paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{source}: there are no weights in safetensors")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{source}: {path.name}, which {INDEX} names, is missing")
    return paths


def find_misfit(base: Tensors, other: Tensors) -> str | None:
    """Say where two models are not of the same architecture; None: nowhere.

    A head that is the embedding itself may be there or not.
    """
    for one, two in [(base, other), (other, base)]:
        for name in sorted(one.shapes.keys() - two.shapes.keys()):
            if name != HEAD or not is_tied(one):
                return f"{two.source} lacks {name}, which {one.source} has"
    for name in sorted(base.shapes.keys() & other.shapes.keys()):
        ours, theirs = (list(t.shapes[name]) for t in (base, other))
        if ours != theirs:
            return f"{name} is {theirs} in {other.source} and {ours} in {base.source}"
    return None


def is_tied(tensors: Tensors) -> bool:
    """Whether the head, which must be there, is the embedding."""
    head = tensors.read(HEAD)
    return any(
        "embed" in name and shape == head.shape and torch.equal(tensors.read(name), head)
        for name, shape in tensors.shapes.items()
        if name != HEAD
    )
