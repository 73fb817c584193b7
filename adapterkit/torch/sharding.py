"""Weights that several processes share, and gradients that DDP averages.

FSDP2 and tensor parallelism hold DTensors. DeepSpeed's ZeRO stage 3 leaves an empty parameter in its place, whose shape
and part are attributes, and gathers those of a module before its forward.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.updates import Update
from ..errors import Unsupported


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded or partitioned one: then every process must call this."""
    held: Any = tensor
    if is_partitioned(tensor):
        library: Any = importlib.import_module("deepspeed")
        with library.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    out: Tensor = held.full_tensor() if hasattr(held, "full_tensor") else held
    return out


def gathered(update: Update) -> Update:
    """The update over whole tensors; see `whole`."""
    take: Any = whole
    return update.map(take) if any(map(is_sharded, update.tensors.values())) else update


def is_sharded(leaf: Any) -> bool:
    """Whether a tensor is a DTensor: a part of it lies in this process."""
    return hasattr(leaf, "full_tensor")


def spread(tensor: Tensor, like: Tensor, model: nn.Module) -> Tensor:
    """Return an adapter's tensor as a DTensor that every process holds whole, where the layer computes with DTensors.

    That is tensor parallelism (`parallelize_module`, transformers' `tp_plan`). FSDP2's weights are DTensors between
    forwards alone.
    """
    if not is_sharded(like) or any(_synchroniser(module) == "fully_shard" for module in model.modules()):
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = cast(Any, like).device_mesh
    # Every process has read or made the same values, so that none needs to be sent.
    made: Tensor = distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
    return made


@contextmanager
def constants_on_every_process() -> Iterator[None]:
    """Let formulas over DTensors make plain tensors (indices, identity matrices), which are the same everywhere.

    torch's own `implicit_replication` switches off an outer one when it is left.
    """
    from torch.distributed.tensor import DTensor

    dispatcher: Any = DTensor._op_dispatcher
    before = dispatcher._allow_implicit_replication
    dispatcher._allow_implicit_replication = True
    try:
        yield
    finally:
        dispatcher._allow_implicit_replication = before


def is_partitioned(leaf: Any) -> bool:
    """Whether a parameter is one of ZeRO stage 3 that is not gathered at the moment: it has no elements then."""
    status = getattr(leaf, "ds_status", None)
    return status is not None and getattr(status, "name", "") != "AVAILABLE"


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor, also where it is partitioned."""
    return tuple(tensor.ds_shape if is_partitioned(tensor) else tensor.shape)


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a value into a parameter. Either may be sharded: each process then takes its part of a whole value."""
    if hasattr(parameter, "ds_status"):  # ZeRO keeps small parameters whole too, and trains its part of them.
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

    held: Any = parameter
    # Every process has computed the same value, so that none needs to be sent.
    held.copy_(distribute_tensor(value.to(held.dtype), held.device_mesh, held.placements, src_data_rank=None))


def check_gathered(model: nn.Module) -> None:
    """Check that a model's weights are there to be looked at.

    Raises:
        Unsupported: DeepSpeed's ZeRO stage 3 has partitioned them: in this process they are empty. Or torch's first
            FSDP has flattened them.
    """
    if any(_synchroniser(module) == FSDP1 for module in model.modules()):
        cure = f"Attach the adapter before {FSDP1}(model, use_orig_params=True)"
        raise Unsupported(f"weights that {FSDP1} has flattened", where=type(model).__name__, cure=cure)
    name = next((name for name, parameter in model.named_parameters() if is_partitioned(parameter)), None)
    if name is not None:
        cure = "Attach the adapter before deepspeed.initialize, to a model that was loaded outside deepspeed.zero.Init"
        raise Unsupported("a weight that DeepSpeed's ZeRO has partitioned", where=name, cure=cure)


def check_unwrapped(model: nn.Module) -> None:
    """Check that a model takes further trained parameters.

    Raises:
        Unsupported: DDP or FSDP2 has wrapped it: they average the gradients of the parameters that they met.
    """
    name = next((found for module in model.modules() if (found := _synchroniser(module))), None)
    if name:
        why = f"{name} does not see parameters that are added after it has wrapped the model"
        raise Unsupported(why, where="trainable", cure=f"Call inject(trainable=True) before {name}")


def check_averaged(trained: Iterable[Tensor], name: str) -> None:
    """Check inside DDP's forward that it averages the gradients of some parameters.

    Raises:
        Unsupported: DDP wrapped the model before they were added; the processes would drift apart.
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
