"""A model spread over ranks with FSDP2: how it is cut up, run, gathered and edited.

Between passes every rank holds a shard of each parameter (a DTensor). A pass gathers a layer at a
time; a rollout gathers the whole model once, so that no token costs a collective and ranks need not
wait for each other. What is gathered is a copy: whoever edits shards must see to it that no copy is
left (:func:`discard_gathered`).

On a model that is not sharded, every function here does nothing, or the plain thing.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

P = ParamSpec("P")
T = TypeVar("T")
RUN_PASS = "run_pass"  # method of a sharded model that runs a function between its forward hooks


def transformer_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the model's repeated layers: the members of its longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def shard(
    model: PreTrainedModel,
    whole: PreTrainedModel | None,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    compute_dtype: torch.dtype | None,
    trained: bool,
    offload: bool = False,
) -> None:
    """Cut a model into shards, layer by layer, and fill them from rank 0; a collective.

    Args:
        model: The model on the meta device; on return, each rank holds its shards.
        whole: The same model with its weights on rank 0, None elsewhere.
        mesh: One-dimensional mesh of the ranks to spread it over.
        device: This rank's device.
        compute_dtype: What parameters are gathered in; the shards keep theirs. None: theirs.
        trained: Whether there will be backward passes. If so, what is outside of the layers
            (embedding, head) stays gathered from forward to backward.
        offload: Keep the shards in host memory, and copy them to the device when they are needed.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = offload and device.type != "cpu"
    offloading = CPUOffloadPolicy() if offload else OffloadPolicy()
    for layer in transformer_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offloading)
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=policy,
        offload_policy=offloading,
        reshard_after_forward=not trained,
    )
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gives tied parameters a tensor each
    _fill_from_rank_0(model, whole, mesh, device)
    # generate() and our passes call parts of the model, where FSDP's hooks are on its forward only
    setattr(model, RUN_PASS, types.MethodType(_call, model))
    register_fsdp_forward_method(model, RUN_PASS)


def _fill_from_rank_0(
    model: PreTrainedModel, whole: PreTrainedModel | None, mesh: DeviceMesh, device: torch.device
) -> None:
    """Send each tensor of the whole model to all ranks, which keep their shard of it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if whole is None:
            full = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        else:
            module, _, attribute = name.rpartition(".")
            full = getattr(whole.get_submodule(module), attribute).detach().to(device)
        dist.broadcast(full, src=0)
        if isinstance(tensor, DTensor):
            full = distribute_tensor(full, mesh, tensor.placements, src_data_rank=None)
        torch._foreach_copy_(local_shards([tensor]), local_shards([full]))


def _call(model: PreTrainedModel, function: Callable[..., T], *args: Any) -> T:
    return function(model, *args)


def forward_pass(
    function: Callable[Concatenate[PreTrainedModel, P], T],
) -> Callable[Concatenate[PreTrainedModel, P], T]:
    """Let a function of a model count as a forward of it, so that its parameters are gathered.

    One backward needs one pass: do not call one pass from another.
    """

    @functools.wraps(function)
    def run(model: PreTrainedModel, *args: P.args, **kwargs: P.kwargs) -> T:
        run_pass = getattr(model, RUN_PASS, None)
        if run_pass is None:
            return function(model, *args, **kwargs)
        result: T = run_pass(functools.partial(function, **kwargs), *args)
        return result

    return cast(Callable[Concatenate[PreTrainedModel, P], T], run)


def _parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the whole model on every rank: one all-gather per layer on entry, none inside.

    A collective on entry; ranks may do different things inside and leave at different times.
    """
    parts = _parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()  # one at a time: an all-gather needs its memory twice
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for part in parts:
            # FSDP2's own choice: the root's parameters are needed again as soon as backward starts
            part.set_reshard_after_forward(part is not parts[0], recurse=False)


def discard_gathered(module: nn.Module) -> None:
    """Free gathered copies, so that shards can be edited; no collective."""
    for part in _parts(module):
        part.reshard()


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Choose whether backward sums gradients over ranks; if not, it adds them up on this rank."""
    for part in _parts(model):
        part.set_requires_gradient_sync(enabled, recurse=False)


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are shards of larger ones."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what this rank holds of tensors, as plain tensors that share their memory."""
    detached = [tensor.detach() for tensor in tensors]
    return [t.to_local() if isinstance(t, DTensor) else t for t in detached]


def whole_value(tensor: Tensor) -> float:
    """Return a one-element tensor as a number; a collective if it is sharded."""
    return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
