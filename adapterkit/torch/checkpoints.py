"""Let every framework save and load a trained adapter through `model.state_dict()` and `model.load_state_dict()`.

Trainer, Accelerate, Lightning, torch.distributed.checkpoint and plain training loops save the model's state dict and
load it again. None of them calls a method of an adapter's handle. So the attribute `handle.checkpoint` sets which
tensors the state dict contains:

* `base`, the default: the base's tensors under their own keys, as if no adapter were attached.
* `adapter`: only the tensors of the handle's adapter, so that a checkpoint is as small as the adapter.
* `all`: the tensors of the base and of the handle's adapter.

Loading does not depend on `handle.checkpoint`. If a state dict contains an adapter's tensors, they are copied into the
attached adapter that has the same name. An adapter's tensors include its buffers (random projections, PiSSA's initial
part), because buffers may depend on data, and a resumed run must compute with the same buffers. If the state dict has
no tensor of the base, the base keeps its values, and strict loading raises no error.

Three tools read state dicts, and need other tensors than `handle.checkpoint` selects. The state dict hooks of this file
recognise these readers by their frames on the call stack, because nothing else identifies them:

* `torch.distributed.pipelining` looks up the parameters of a traced model in its state dict, and fails if one is
  missing. So the state dict for this reader also contains the adapters' parameters.
* `torch.distributed.checkpoint` with `ignore_frozen_params=True` removes each frozen parameter from the state dict,
  and fails if a frozen parameter is missing. So the state dict for this reader also contains the frozen parameters.
* accelerate's preparation for FSDP2 with `cpu_ram_efficient_loading` empties all parameters, and loads them again from
  the state dict. So the state dict for this reader contains all parameters. It contains no buffer of an adapter,
  because accelerate keeps non-persistent buffers itself, and fails if a tensor is not sharded.

The hooks are top-level functions of this file, so they survive `deepcopy` and `pickle` of the model.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import nearest
from .leaves import Leaf, is_leaf_name

if TYPE_CHECKING:
    from .watch import Watch

CHOICES = ("base", "adapter", "all")
"""The values of `handle.checkpoint`."""

HANDLES = "_adapterkit_handles"
"""The attribute of a model that lists the handles of its adapters. Copies of the model keep this list."""


class Saved(Protocol):
    """The attributes of a handle that this file uses.

    `_leaves` are the adapter's tensors in the model. `_watch` watches the adapter's hooks.
    """

    @property
    def name(self) -> str: ...

    checkpoint: str
    _leaves: tuple[Leaf, ...]
    _watch: Watch


def watch_state(model: nn.Module) -> None:
    """Register the state dict hooks on a model, unless they are already registered."""
    if _save not in model._state_dict_hooks.values():
        hooked: Any = model
        hooked.register_state_dict_post_hook(_save)
        hooked.register_load_state_dict_pre_hook(_load)


def leave_state(model: nn.Module) -> None:
    """Remove the state dict hooks from a model."""
    for hooks, ours in ((model._state_dict_hooks, _save), (model._load_state_dict_pre_hooks, _load)):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is ours]:
            del hooks[key]


def _save(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    handles: list[Saved] = module.__dict__.get(HANDLES, [])
    for handle in handles:
        handle._watch.reclaim()
    live = any(isinstance(tensor, nn.Parameter) for tensor in state_dict.values())  # state_dict(keep_vars=True)
    wanted, emptied = _without_frozen(handles, live), _is_emptied()
    if not emptied and any(handle.checkpoint == "adapter" for handle in handles):
        # With `ignore_frozen_params`, torch removes the base's frozen parameters later, and fails if one is missing. So
        # keep them here.
        frozen = (name for name, p in module.named_parameters() if not p.requires_grad and not is_leaf_name(name))
        popped = {prefix + name for name in frozen} if wanted else set()
        for key in [key for key in state_dict if key.startswith(prefix) and key not in popped]:
            del state_dict[key]
    paths = _paths(module)
    traced = live and _reader("torch.distributed.pipelining._IR", "_from_traced") is not None
    for handle in handles:
        for leaf in handle._leaves:
            trains = isinstance(leaf.tensor, nn.Parameter)
            lost = trains and (traced or (wanted and not leaf.tensor.requires_grad))
            if trains if emptied else handle.checkpoint != "base" or lost:
                state_dict[prefix + _key(paths, leaf)] = leaf.tensor if live else leaf.tensor.detach()


def _without_frozen(handles: Iterable[Saved], live: bool) -> bool:
    """Whether torch.distributed.checkpoint is reading the state dict with `ignore_frozen_params=True`.

    If so, the saved file contains neither the frozen base nor any adapter whose `checkpoint` is `base`. Warn about
    such an adapter if it has trained parameters.
    """
    reader = None if live else _reader("torch.distributed.checkpoint.state_dict", "_get_model_state_dict")
    if reader is None or not getattr(reader.f_locals.get("info"), "ignore_frozen_params", False):
        return False
    for handle in handles:
        if handle.checkpoint == "base" and any(isinstance(leaf.tensor, nn.Parameter) for leaf in handle._leaves):
            warnings.warn(
                f"with ignore_frozen_params=True, the state dict does not contain the trained adapter {handle.name!r}. "
                'Set handle.checkpoint = "adapter" before you save the state dict',
                stacklevel=2,
            )
    return True


def _is_emptied() -> bool:
    """Whether accelerate empties all parameters, and loads them again from the state dict, to prepare FSDP2."""
    return _reader("accelerate.utils.fsdp_utils", "fsdp2_prepare_model") is not None


def _reader(module: str, function: str) -> FrameType | None:
    """Return the call frame of `function`, a function of `module`; None if this function is not running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return frame
        frame = frame.f_back
    return None


@torch.no_grad()
def _load(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _metadata: object, _strict: bool,
    _missing: list[str], _unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Copy tensors from a state dict into the attached adapters.

    If a key or a shape is wrong, or a tensor is missing, copy nothing and add a message to `errors`.
    """
    mine = [key for key in state_dict if key.startswith(prefix) and is_leaf_name(key)]
    if not mine:
        _warn_of_base(module.__dict__[HANDLES])
        return
    for handle in module.__dict__[HANDLES]:
        handle._watch.reclaim()
    paths = _paths(module)
    leaves = {prefix + _key(paths, leaf): leaf for handle in module.__dict__[HANDLES] for leaf in handle._leaves}
    tensors = {key: leaf.tensor for key, leaf in leaves.items()}
    if _is_emptied():
        tensors = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    loaded = {key: state_dict.pop(key) for key in mine}
    names = {_adapter(key) for key in mine}
    problems = [
        f"{key}: no attached adapter has this tensor. {nearest(key, tensors)}" for key in mine if key not in tensors
    ]
    problems += [f"{key}: missing" for key in tensors if key not in loaded and _adapter(key) in names]
    problems += [
        f"{key}: the shape is {list(loaded[key].shape)}, but the adapter's is {list(tensor.shape)}"
        for key, tensor in tensors.items()
        if key in loaded and loaded[key].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        errors.append(f"{problems[0].strip()}{more}. Inject the adapter that the checkpoint was made with.")
        return
    for key, value in loaded.items():
        leaves[key].put(value)
    if not any(key.startswith(prefix) for key in state_dict):
        _keep_base(module, state_dict, prefix)


def _warn_of_base(handles: Iterable[Saved]) -> None:
    """Warn that a loaded state dict contains no adapter, so the attached adapters keep their values.

    Warn once for each trained adapter whose `checkpoint` is `base`.

    A Trainer that resumes, or goes back to its best checkpoint, loads the state dict that it saved. If
    `handle.checkpoint` is `base`, that state dict contains only the base.
    """
    for handle in handles:
        if handle.checkpoint != "base" or id(handle) in _WARNED:
            continue
        if any(isinstance(leaf.tensor, nn.Parameter) for leaf in handle._leaves):
            _WARNED.add(id(handle))
            weakref.finalize(handle, _WARNED.discard, id(handle))
            warnings.warn(
                f"the loaded state dict does not contain the adapter {handle.name!r}, which keeps its values. If the "
                'state dict is a checkpoint of the training, set handle.checkpoint = "adapter" before saving, or pass '
                "callbacks=[adapterkit.torch.TrainerCallback(handle)] to the Trainer",
                stacklevel=2,
            )


_WARNED: set[int] = set()
"""The ids of the handles that were named in warnings."""


def _keep_base(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Add the base's current tensors to a state dict that contains no tensor of the base.

    As a result, loading this state dict does not change the base.
    """
    hooks = module._state_dict_hooks
    kept = dict(hooks)
    for key in [key for key, hook in hooks.items() if hook is _save]:
        del hooks[key]
    try:
        state_dict.update(module.state_dict(prefix=prefix))
    finally:
        hooks.clear()
        hooks.update(kept)


def _paths(model: nn.Module) -> dict[int, str]:
    return {id(module): f"{name}." if name else "" for name, module in model.named_modules()}


def _key(paths: dict[int, str], leaf: Leaf) -> str:
    return paths[id(leaf.module)] + leaf.name


def _adapter(key: str) -> str:
    """Return the adapter's name in a key: NAME in `model.layer.adapterkit:NAME:model/layer/lora/A`."""
    return key.rpartition(".")[2].split(":", 2)[1]
