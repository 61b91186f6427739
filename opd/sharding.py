"""A model spread over ranks with FSDP2 or FSDP1: how it is cut up, run, gathered and edited.

Between passes every rank holds a shard of each parameter. A pass gathers a layer at a time; a
rollout gathers the whole model once, so that no token costs a collective and ranks need not wait
for each other. What is gathered is a copy: whoever edits shards must see to it that no copy is left
(:func:`discard_gathered`).

On a model that is not sharded, every function here does nothing, or the plain thing.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

P = ParamSpec("P")
T = TypeVar("T")
RUN_PASS = "run_pass"  # method of a sharded model that runs a function between its forward hooks
_HELD = weakref.WeakSet[nn.Module]()  # models that are whole on every rank just now


def transformer_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the model's repeated layers: the members of its longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer by itself, for shapes that change."""
    for layer in transformer_layers(model):
        layer.compile(dynamic=True)


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
            source = getattr(whole.get_submodule(module), attribute).detach()
            full = source.to(device, tensor.dtype).contiguous()
        dist.broadcast(full, src=0)
        if isinstance(tensor, DTensor):
            full = distribute_tensor(full, mesh, tensor.placements, src_data_rank=None)
        torch._foreach_copy_(local_shards([tensor]), local_shards([full]))


def wrap_with_fsdp1(
    model: PreTrainedModel,
    device: torch.device,
    *,
    compute_dtype: torch.dtype | None,
    trained: bool,
    offload: bool = False,
) -> PreTrainedModel:
    """Wrap a whole model, which all ranks hold, so that each keeps a share; a collective.

    Args:
        model: The model with its weights.
        device: This rank's device.
        compute_dtype: What parameters are gathered in; the shards keep theirs. None: theirs.
        trained: Whether to keep gathered parameters until backward; see :func:`gathered`.
        offload: Keep the shards in host memory.

    Returns:
        The wrapper, which passes on attributes, and so can stand for the model.
    """
    kinds = {type(layer) for layer in transformer_layers(model)}
    strategy = ShardingStrategy.SHARD_GRAD_OP if trained else ShardingStrategy.FULL_SHARD
    wrapper = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(kinds),
        sharding_strategy=strategy,
        mixed_precision=MixedPrecision(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        cpu_offload=CPUOffload(offload and device.type != "cpu"),
        device_id=device,
        # A mesh makes its state dicts those of FSDP2: DTensors
        device_mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        use_orig_params=True,
    )
    object.__setattr__(wrapper, RUN_PASS, types.MethodType(_call_fsdp1, wrapper))
    return cast(PreTrainedModel, wrapper)


def _call(model: PreTrainedModel, function: Callable[..., T], *args: Any) -> T:
    return function(model, *args)


def _call_fsdp1(wrapper: FullyShardedDataParallel, function: Callable[..., T], *args: Any) -> T:
    """Run a function as if it were the model's forward, the only thing that FSDP1 gathers for."""
    model = wrapper.module

    def forward(*inputs: Any) -> T:
        del model.forward  # from here on, it is the model's own again
        return function(model, *inputs)

    model.forward = forward
    result: T = wrapper(*args)
    return result


def forward_pass(
    function: Callable[Concatenate[PreTrainedModel, P], T],
) -> Callable[Concatenate[PreTrainedModel, P], T]:
    """Let a function of a model count as a forward of it, so that its parameters are gathered.

    One backward needs one pass: do not call one pass from another.
    """

    @functools.wraps(function)
    def run(model: PreTrainedModel, *args: P.args, **kwargs: P.kwargs) -> T:
        run_pass = getattr(model, RUN_PASS, None)
        # What FSDP2 holds already needs no pass, at whose end it would let go of the root
        if run_pass is None or (model in _HELD and isinstance(model, FSDPModule)):
            return function(model, *args, **kwargs)
        result: T = run_pass(functools.partial(function, **kwargs), *args)
        return result

    return cast(Callable[Concatenate[PreTrainedModel, P], T], run)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the whole model on every rank: one all-gather per layer on entry, none inside.

    A collective on entry; ranks may do different things inside and leave at different times, enter
    it again as often as they like, too.
    """
    if model in _HELD:
        yield
        return
    _HELD.add(model)
    try:
        with _held(model):
            yield
    finally:
        _HELD.discard(model)


@contextmanager
def _held(model: nn.Module) -> Iterator[None]:
    if isinstance(model, FullyShardedDataParallel):
        _pass_of_one_token(cast(PreTrainedModel, model))
        yield  # SHARD_GRAD_OP keeps it, also for the passes that follow, until backward
        return
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
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


@forward_pass
def _pass_of_one_token(model: PreTrainedModel) -> None:
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def whole_layers(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Gather parameters, one unit of sharding after the other: at most a layer is whole at a time.

    A collective if the model is sharded; all ranks must go through it to the end.

    Yields:
        Parameters by the names that they have without a wrapper; until the next is asked for.
    """
    units: list[tuple[str, nn.Module]] = [
        (name, part) for name, part in model.named_modules() if _is_unit(part)
    ]
    for name, unit in units or [("", model)]:
        inner = tuple(
            f"{other}."
            for other, part in unit.named_modules()
            if part is not unit and _is_unit(part)
        )
        summoned: AbstractContextManager[None] = nullcontext()
        if isinstance(unit, FullyShardedDataParallel):
            summoned = FullyShardedDataParallel.summon_full_params(
                unit, recurse=False, writeback=False
            )
        with summoned:
            own = [item for item in unit.named_parameters() if not item[0].startswith(inner)]
            yield {
                plain_name(f"{name}.{key}"): p.full_tensor()
                if isinstance(p, DTensor)
                else p.detach()
                for key, p in own
            }


def _is_unit(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule | FullyShardedDataParallel)


def plain_name(name: str) -> str:
    """Return a parameter's name without those of wrappers."""
    return name.removeprefix(".").replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")


@contextmanager
def head_gathered(model: nn.Module) -> Iterator[None]:
    """Hold what is outside of a model's layers, the head above all, on every rank.

    One all-gather on entry, none inside: ranks may read the head unequally often.
    """
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False):
            yield
    elif isinstance(model, FSDPModule):
        model.unshard()
        try:
            yield
        finally:
            model.reshard()
    else:
        yield


def discard_gathered(module: nn.Module) -> None:
    """Free gathered copies, so that shards can be edited; no collective."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FullyShardedDataParallel) and part._is_root is not None:
            # (before the first pass there is nothing to free; nor is there with a single rank)
            handle = part._handle
            if handle is not None and handle.uses_sharded_strategy:
                _reshard(part, handle, free_unsharded_flat_param=True)


def summing_gradients(
    wrapper: nn.Module | None, model: nn.Module, enabled: bool
) -> AbstractContextManager[None]:
    """Sum gradients over ranks in a backward, or only add them up on each.

    Args:
        wrapper: What a replicating strategy has made of the module.
        model: The student, perhaps sharded.
        enabled: Whether to sum over ranks.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(enabled, recurse=False)
    owner = wrapper if isinstance(wrapper, DistributedDataParallel) else model
    if not enabled and isinstance(owner, DistributedDataParallel | FullyShardedDataParallel):
        return cast(AbstractContextManager[None], owner.no_sync())
    return nullcontext()


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale gradients so that their norm over all ranks' shards is at most ``max_norm``.

    Returns:
        The norm before. A collective if the model is sharded.
    """
    if isinstance(model, FullyShardedDataParallel):
        return float(model.clip_grad_norm_(max_norm))
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return what FSDP1 has wrapped; any other model as it is.

    The wrapper passes on what it is asked for, but keeps to itself what it is told.
    """
    return model.module if isinstance(model, FullyShardedDataParallel) else model


def is_sharded(module: nn.Module) -> bool:
    """Whether each rank holds only a share of a module's parameters."""
    return any(map(_is_unit, module.modules()))


def local_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what this rank holds of tensors, as plain tensors that share their memory."""
    detached = [tensor.detach() for tensor in tensors]
    return [t.to_local() if isinstance(t, DTensor) else t for t in detached]


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor, or this rank's shard of it, to host memory; pinned if it was on a GPU."""
    host = tensor.to("cpu", copy=True)
    if tensor.device.type == "cuda":
        if isinstance(host, DTensor):  # which cannot be pinned, as FSDP2 itself knows
            host._local_tensor = host._local_tensor.pin_memory()
        else:
            host = host.pin_memory()
    return host
