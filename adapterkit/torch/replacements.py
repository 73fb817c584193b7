"""Detect at once that another tool removes an adapter from a model, if the model's next forward could not detect it.

watch.py checks the model before each forward. The following tools finish before the next forward:

* torch.fx copies a model's modules into a new module (`prepare_fx`) and replaces them there (`convert_fx`). The model
  itself does not change, and the new module is not watched.
* torch.fx installs its quantization-aware modules (`prepare_qat_fx`) without triggering module hooks, but these modules
  take over the weights of the old modules.
* PEFT's `merge_and_unload` changes the weight under an attached adapter, and puts the wrapped module back in place.

torch can report every module and parameter that is registered with a module. The hooks for these reports are global,
and cost one call for each registration.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules import module as torch_module

from ..errors import Unsupported
from ..formats.peft.families import family_of_type
from ..methods import METHODS
from .forward_hook import ALIVE
from .parts import HOOK

_REGISTERED: list[Any] = []
"""The handles of the global hooks, once they are registered."""


def notice_replacements() -> None:
    """From now on, check every module that replaces another one."""
    if not _REGISTERED:
        _REGISTERED.append(torch_module.register_module_module_registration_hook(_look))
        _REGISTERED.append(torch_module.register_module_parameter_registration_hook(_look_at_weight))


def _look(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Check a module that is being registered with another one.

    Raises:
        Unsupported: the new module replaces a module with an adapter in torch.fx's copy of a model, or it leaves a PEFT
            layer whose merge changed what the adapter computes.
    """
    old = parent._modules.get(name)
    if old is None or old is new:
        return
    if isinstance(parent, fx.GraphModule) or type(new).__module__.startswith("torch.ao."):
        lost = _carried(old) - (set() if new is None else _carried(new))
        if lost:
            why = f"a {type(new).__name__} replaces a {type(old).__name__} that has an adapter"
            raise Unsupported(why, where=name, cure=_QUANTIZED)
    if new is not None and HOOK in new.__dict__:
        check_tuner(old, new, name)


def _look_at_weight(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Check a parameter that is being registered with a module.

    Raises:
        Unsupported: a module of torch.ao takes over the weight of a module that has an adapter.
    """
    if parameter is None or not type(module).__module__.startswith("torch.ao."):
        return
    if any(hook.parts and hook.module._parameters.get(name) is parameter for hook in list(ALIVE)):
        why = f"a {type(module).__name__} takes over the {name} of a module that has an adapter"
        raise Unsupported(why, where=name, cure=_QUANTIZED)


def _carried(module: nn.Module) -> set[int]:
    """Return the ids of the modules in a tree that have an adapter."""
    return {id(each) for each in module.modules() if HOOK in each.__dict__}


def is_tuner(module: nn.Module) -> bool:
    """Whether a module is a PEFT layer, which wraps another module."""
    return hasattr(type(module), "merged") and any(k.__module__.startswith("peft.") for k in type(module).__mro__)


def check_tuner(tuner: nn.Module, module: nn.Module, where: str) -> None:
    """Check that a PEFT layer has not merged into a weight whose adapter depends on the order of changes.

    If both changes are additive, their order does not matter.

    Args:
        tuner: the PEFT layer.
        module: the module inside it, with attached adapters.
        where: the module's name.

    Raises:
        Unsupported: PEFT has merged, and one of the two changes is not additive.
    """
    if not is_tuner(tuner) or not getattr(tuner, "merged"):  # noqa: B009 - PEFT's layers have no type
        return
    ours = [update for part in module.__dict__[HOOK].parts for update in part.updates]
    if _is_sum(tuner) and all(update.kind == "additive" and not update.changes_bias for update in ours):
        return
    methods = " and ".join(dict.fromkeys(update.method for update in ours)) or "an adapter"
    why = f"PEFT merged its {_kind(tuner).upper()} into the weight that {methods} changes, which gives another result"
    raise Unsupported(why, where=where, cure="Call handle.merge_() first, or keep PEFT's adapter unmerged")


def _is_sum(tuner: nn.Module) -> bool:
    """Whether a PEFT layer adds a change to the weight that does not depend on the weight."""
    kind = _kind(tuner)
    family = family_of_type(kind.upper())
    method: Any = METHODS.get(kind) if family is None else getattr(family, "method", None)
    return getattr(method, "kind", "") == "additive" and not getattr(tuner, "lora_variant", None)


def _kind(tuner: nn.Module) -> str:
    """Return PEFT's name for the method of one of its layers: the folder name in `peft.tuners`."""
    names = [kind.__module__.split(".") for kind in type(tuner).__mro__ if kind.__module__.startswith("peft.tuners.")]
    return next((parts[2] for parts in names if len(parts) > 3), "adapter")


_QUANTIZED = "Call handle.merge_() before the model is prepared"
