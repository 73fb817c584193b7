"""Read and write weights that are sharded over several processes, and check that gradients are averaged.

FSDP2 and tensor parallelism use DTensors. DeepSpeed's ZeRO stage 3 empties each parameter, and keeps the full shape and
this process's shard as attributes of the parameter. Before a module's forward, ZeRO gathers the module's parameters.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.updates import Update
from ..errors import Unsupported


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor. For a DTensor or a tensor partitioned by ZeRO, every process must call this function."""
    sharded: Any = tensor
    if is_partitioned(tensor):
        library: Any = importlib.import_module("deepspeed")
        with library.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    out: Tensor = sharded.full_tensor() if hasattr(sharded, "full_tensor") else sharded
    return out


def gathered(update: Update) -> Update:
    """Return the update with whole tensors in place of DTensors; see `whole`."""
    take: Any = whole
    return update.map(take) if any(map(is_sharded, update.tensors.values())) else update


def is_sharded(leaf: object) -> bool:
    """Whether a tensor is a DTensor, so that this process may hold only a part of it."""
    return hasattr(leaf, "full_tensor")


def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Return for each tensor whether all its elements are finite.

    If the first tensor is a DTensor, all must be DTensors of the same mesh, and every process must call this function.
    All processes get the same result, so either all of them raise an error or none does.
    """
    # `isfinite().all()` would allocate several tensors of this size.
    local = [
        cast(Any, tensor).to_local() if is_sharded(tensor) else tensor for tensor in map(torch.Tensor.detach, tensors)
    ]
    finite = [not each.numel() or all(bool(end.isfinite()) for end in each.aminmax()) for each in local]
    if is_sharded(tensors[0]):
        flags = torch.tensor(finite, dtype=torch.int32, device=local[0].device)
        mesh = cast(Any, tensors[0]).device_mesh
        for axis in range(mesh.ndim):
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MIN, group=mesh.get_group(axis))
        finite = [bool(flag) for flag in flags]
    return finite


def spread(tensor: Tensor, like: Tensor, model: nn.Module) -> Tensor:
    """Return an adapter's tensor as a replicated DTensor if the layer computes with DTensors, else unchanged.

    Layers compute with DTensors in tensor parallelism (`parallelize_module`, transformers' `tp_plan`). Under FSDP2,
    weights are DTensors only between forwards, so the tensor is returned unchanged.

    Args:
        tensor: the adapter's tensor, with the same values in every process.
        like: the layer's weight.
        model: the model.
    """
    if not is_sharded(like) or any(_synchroniser(module) == "fully_shard" for module in model.modules()):
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = cast(Any, like).device_mesh
    # Every process has read or made the same values, so nothing needs to be sent.
    distributed: Tensor = distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
    return distributed


@contextmanager
def constants_on_every_process() -> Iterator[None]:
    """Inside the `with`, let formulas combine DTensors with plain tensors that are equal in all processes.

    Examples of such plain tensors are indices and identity matrices. torch's own `implicit_replication` cannot be
    nested: when the inner `with` ends, the feature is also off for the rest of the outer `with`.
    """
    from torch.distributed.tensor import DTensor

    dispatcher: Any = DTensor._op_dispatcher
    before = dispatcher._allow_implicit_replication
    dispatcher._allow_implicit_replication = True
    try:
        yield
    finally:
        dispatcher._allow_implicit_replication = before


def is_partitioned(leaf: object) -> bool:
    """Whether a parameter is empty now, because ZeRO stage 3 has partitioned it and not gathered it again."""
    status = getattr(leaf, "ds_status", None)
    return status is not None and getattr(status, "name", "") != "AVAILABLE"


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the full shape of a tensor, even if ZeRO has partitioned it."""
    sharded: Any = tensor
    return tuple(sharded.ds_shape if is_partitioned(tensor) else tensor.shape)


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a value into a parameter.

    If the parameter is sharded and the value is not, each process copies only its own part of the value.
    """
    if hasattr(parameter, "ds_status"):
        # ZeRO keeps small parameters whole, but trains their partitions. GatheredParameters makes sure that both the
        # whole parameter and its partitions get the value.
        library: Any = importlib.import_module("deepspeed")
        with library.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        return
    if is_sharded(parameter) == is_sharded(value):
        parameter.copy_(value)
        return
    if is_sharded(value):
        parameter.copy_(whole(value))
        return
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    # Every process has computed the same value, so nothing needs to be sent.
    sharded.copy_(
        distribute_tensor(value.to(sharded.dtype), sharded.device_mesh, sharded.placements, src_data_rank=None)
    )


def check_gathered(model: nn.Module) -> None:
    """Check that a model's weights are whole in this process.

    Raises:
        Unsupported: DeepSpeed's ZeRO stage 3 has partitioned the weights, so the weights are empty in this process; or
            the first version of torch's FSDP (`FullyShardedDataParallel`) has flattened the weights.
    """
    if any(_synchroniser(module) == FSDP1 for module in model.modules()):
        cure = f"Inject the adapter before {FSDP1}(model, use_orig_params=True)"
        raise Unsupported(f"{FSDP1} has flattened the weights", where=type(model).__name__, cure=cure)
    name = next((name for name, parameter in model.named_parameters() if is_partitioned(parameter)), None)
    if name is not None:
        cure = (
            "Inject the adapter before deepspeed.initialize, into a model that was loaded outside deepspeed.zero.Init"
        )
        raise Unsupported("DeepSpeed's ZeRO has partitioned this weight", where=name, cure=cure)


def check_unwrapped(model: nn.Module) -> None:
    """Check that trained parameters can still be added to a model.

    Raises:
        Unsupported: DDP or FSDP has already wrapped the model. Both average only the gradients of the parameters that
            the model had when it was wrapped.
    """
    name = next((wrapper for module in model.modules() if (wrapper := _synchroniser(module))), None)
    if name:
        why = f"{name} has already wrapped the model, and ignores parameters that are added afterwards"
        raise Unsupported(why, where="trainable", cure=f"Call inject(trainable=True) before {name}")


def check_averaged(trained: Iterable[Tensor], name: str) -> None:
    """Check that DDP averages the gradients of the given parameters. Outside DDP's forward, do nothing.

    Raises:
        Unsupported: a parameter was added after DDP wrapped the model. DDP would not average its gradient, so the
            processes would diverge.
    """
    running: Any = DistributedDataParallel._active_ddp_module
    if running is None:
        return
    met = {id(parameter) for parameter in running._module_parameters}
    if any(id(tensor) not in met for tensor in trained if tensor.requires_grad):
        why = f"the adapter {name!r} was injected after DistributedDataParallel had wrapped the model"
        raise Unsupported(why, where=name, cure="Call inject(trainable=True) before DistributedDataParallel")


def _synchroniser(module: nn.Module) -> str:
    if isinstance(module, DistributedDataParallel):
        return "DistributedDataParallel"
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return FSDP1 if FSDP1 in kinds else "fully_shard" if "FSDPModule" in kinds else ""


FSDP1 = "FullyShardedDataParallel"
