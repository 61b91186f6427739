"""The weights that are trained: look at them, edit them, keep tensors beside them.

Under FSDP a rank holds a shard of each, and passes work on gathered copies; so whoever edits
weights has to see to it that no copy is left, and whoever has taken a copy has to notice that they
have changed. Both are settled here: edits happen in :meth:`Weights.edit`, and each makes a new
``version``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from opd.sharding import discard_gathered, is_sharded, local_shards, to_host, whole_layers

if TYPE_CHECKING:
    from opd.world import World

Device = Literal["parameters", "cpu"]


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained by the names that they have without a wrapper."""
    return {
        name.replace("_fsdp_wrapped_module.", ""): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


class Weights:
    """What is trained of a module.

    Args:
        owner: The module; its parameters may be made, and sharded, later.

    Attributes:
        version: Grows whenever the weights change. Whoever copies them compares it.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._owner = owner
        self._shapes: dict[str, torch.Size] = {}
        self.version = 0

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a share."""
        return is_sharded(self._owner)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        return trainable_parameters(self._owner)

    def shards(self, names: Sequence[str] | None = None) -> list[Tensor]:
        """Return what this rank holds, as plain tensors that share memory with the parameters.

        Look, do not touch: to change them, see :meth:`edit`.

        Args:
            names: Which parameters, in this order; None: all.
        """
        discard_gathered(self._owner)
        parameters = self.parameters()
        return local_shards([parameters[name] for name in (parameters if names is None else names)])

    def over_shards(self, world: World) -> Callable[[Tensor], Tensor]:
        """Return what adds up sums over shards: over ranks, a collective, where there are any."""
        return world.sum if self.sharded else lambda sums: sums

    def starts(self, names: Sequence[str], world: World) -> list[int]:
        """Return where in its whole, flattened parameter each shard of this rank begins.

        Under either FSDP shards are consecutive parts, in the order of the ranks. A collective if
        weights are sharded.
        """
        if not self.sharded:
            return [0] * len(names)
        sizes = torch.zeros(world.size, len(names), dtype=torch.long)
        sizes[world.rank] = torch.tensor([shard.numel() for shard in self.shards(names)])
        starts: list[int] = world.sum(sizes)[: world.rank].sum(dim=0).tolist()
        return starts

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of whole parameters; the first time, a collective if they are sharded.

        Under FSDP1 a shard is flat, and its parameter's shape cannot be told from it.
        """
        if not self._shapes:
            for layer in whole_layers(self._owner):
                self._shapes |= {name: tensor.shape for name, tensor in layer.items()}
        return self._shapes

    def whole(
        self, names: Sequence[str], shards: Iterable[Tensor], world: World
    ) -> Iterator[tuple[Tensor, slice]]:
        """Put the shards of all ranks together, one tensor after the other.

        If weights are sharded, a collective for each; all ranks must go through it to the end.

        Args:
            names: Of the parameters.
            shards: What this rank holds of them, or of something that is sharded alike; one is
                taken at a time.
            world: The ranks.

        Yields:
            A whole tensor, which shares memory with the shard if that is whole; and which part of
            it, flattened, this rank holds.
        """
        shapes, starts = self.shapes(), self.starts(names, world)
        for name, shard, start in zip(names, shards, starts, strict=True):
            part = slice(start, start + shard.numel())
            if not self.sharded:
                yield shard, part
                continue
            flat = torch.zeros(shapes[name].numel(), dtype=shard.dtype, device=shard.device)
            flat[part] = shard.flatten()
            yield world.sum(flat).view(shapes[name]), part

    @contextmanager
    def edit(self, names: Sequence[str] | None = None) -> Iterator[list[Tensor]]:
        """Hand out the shards to be changed; no collective.

        Copies that passes have gathered are dropped before; make no pass inside.
        """
        try:
            yield self.shards(names)
        finally:
            self.changed()

    def changed(self) -> None:
        """Note that the weights are others than before."""
        self.version += 1

    def companion(self, name: str) -> Companion:
        """Return the tensors that stand beside the weights under a name; made on the first call.

        They are part of the module, so every strategy's checkpoint holds them.
        """
        found = dict(self._owner.named_children()).get(name)
        if found is None:
            self._owner.add_module(name, found := Companion())
        assert isinstance(found, Companion)
        return found

    def copy(self, names: Sequence[str], device: Device = "parameters") -> list[Tensor]:
        """Copy this rank's shards.

        Args:
            names: Of the parameters.
            device: Beside them, or in host memory, pinned where there is a GPU.
        """
        return [copy_of(shard, shard, device) for shard in self.shards(names)]


def copy_of(tensor: Tensor, weight: Tensor, device: Device) -> Tensor:
    """Copy a tensor to where its weight is, or into host memory, pinned where there is a GPU."""
    return tensor.to(weight.device, copy=True) if device == "parameters" else to_host(tensor)


class Companion(nn.Module):
    """A tensor beside each of some parameters of a module, sharded alike and saved with it.

    Loading takes whatever tensors a checkpoint holds.
    """

    def __setitem__(self, parameter: str, tensor: Tensor) -> None:
        self.register_buffer(parameter.replace(".", "/"), tensor)  # torch forbids dots

    def __getitem__(self, parameter: str) -> Tensor:
        return self.get_buffer(parameter.replace(".", "/"))

    def keys_by_parameter(self) -> list[tuple[str, str]]:
        """Return pairs of a parameter's name and its tensor's key in the state dict."""
        return [(key.replace("/", "."), key) for key in self._buffers]

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold these tensors, by parameter, and no others."""
        self._buffers.clear()
        for parameter, tensor in tensors.items():
            self[parameter] = tensor

    def shards(self, names: Sequence[str]) -> list[Tensor]:
        """Return what this rank holds beside some parameters, as plain tensors."""
        return local_shards([self[name] for name in names])

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key, tensor in state_dict.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                if name in self._buffers:  # where it is, it stays
                    torch._foreach_copy_(
                        local_shards([self.get_buffer(name)]), local_shards([tensor])
                    )
                else:
                    self.register_buffer(name, tensor)


def companions(module: nn.Module) -> list[tuple[str, Companion]]:
    """Return the companions of a module's parameters with their names in it."""
    return [(name, part) for name, part in module.named_children() if isinstance(part, Companion)]


@contextmanager
def exchanged(module: nn.Module, companion: Companion) -> Iterator[None]:
    """Let parameters and their companion change places; no communication."""
    discard_gathered(module)
    _exchange(module, companion)
    try:
        yield
    finally:
        discard_gathered(module)
        _exchange(module, companion)


def _exchange(module: nn.Module, companion: Companion) -> None:
    parameters = trainable_parameters(module)
    for name, _ in companion.keys_by_parameter():
        (weight,), (other,) = local_shards([parameters[name]]), local_shards([companion[name]])
        kept = weight.clone()
        weight.copy_(other)
        other.copy_(kept)
