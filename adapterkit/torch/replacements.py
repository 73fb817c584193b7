"""Notice at once that another tool takes an adapter out of a model, where the model's next forward could not.

watch.py looks at the model before each forward. Two tools are done by then:

* torch.fx copies a model's modules into a module of its own (`prepare_fx`) and exchanges them there (`convert_fx`). The
  model itself stays as it was, and the new one was never watched.
* Its quantization-aware modules (`prepare_qat_fx`) are put there past all hooks, but take the weight of the old ones.
* PEFT's `merge_and_unload` changes the weight below an adapter of ours and puts the module back where it was.

torch tells of every module and parameter that is put into a module; the hooks for that are global, and cost one call
for each.
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
"""The handles of the global hooks, once there are any."""


def notice_replacements() -> None:
    """Look at every module that is put in the place of another one from now on."""
    if not _REGISTERED:
        _REGISTERED.append(torch_module.register_module_module_registration_hook(_look))
        _REGISTERED.append(torch_module.register_module_parameter_registration_hook(_look_at_weight))


def _look(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Look at a module on its way into another one.

    Raises:
        Unsupported: it takes the place of one with an adapter, in torch.fx's copy of a model; or comes back from under
            a layer of PEFT's whose merge changed what the adapter computes.
    """
    old = parent._modules.get(name)
    if old is None or old is new:
        return
    if isinstance(parent, fx.GraphModule) or type(new).__module__.startswith("torch.ao."):
        lost = _carried(old) - (set() if new is None else _carried(new))
        if lost:
            why = f"a {type(new).__name__} takes the place of a {type(old).__name__} that carries an adapter"
            raise Unsupported(why, where=name, cure=_QUANTIZED)
    if new is not None and HOOK in new.__dict__:
        check_tuner(old, new, name)


def _look_at_weight(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Look at a parameter on its way into a module.

    Raises:
        Unsupported: a module of torch.ao takes the weight of one that carries an adapter.
    """
    if parameter is None or not type(module).__module__.startswith("torch.ao."):
        return
    if any(hook.parts and hook.module._parameters.get(name) is parameter for hook in list(ALIVE)):
        why = f"a {type(module).__name__} takes the {name} of a module that carries an adapter"
        raise Unsupported(why, where=name, cure=_QUANTIZED)


def _carried(module: nn.Module) -> set[int]:
    """The ids of the modules in a tree that carry an adapter."""
    return {id(each) for each in module.modules() if HOOK in each.__dict__}


def is_tuner(module: nn.Module) -> bool:
    """Whether a module is a layer that PEFT puts around another one."""
    return hasattr(type(module), "merged") and any(k.__module__.startswith("peft.") for k in type(module).__mro__)


def check_tuner(tuner: Any, module: nn.Module, where: str) -> None:
    """Check that a layer of PEFT's has merged nothing into a weight below an adapter that this changes.

    Two sums of changes of one weight may be made in any order.

    Args:
        tuner: PEFT's layer.
        module: the module inside it, with adapters of ours.
        where: its name.

    Raises:
        Unsupported: it has, and one of the two is no sum.
    """
    if not is_tuner(tuner) or not tuner.merged:
        return
    ours = [update for part in module.__dict__[HOOK].parts for update in part.updates]
    if _is_sum(tuner) and all(update.kind == "additive" and not update.changes_bias for update in ours):
        return
    methods = " and ".join(dict.fromkeys(update.method for update in ours)) or "an adapter"
    why = f"PEFT merged its {_kind(tuner).upper()} into the weight below {methods}, where it computes something else"
    raise Unsupported(why, where=where, cure="Call handle.merge_() first, or keep PEFT's adapter unmerged")


def _is_sum(tuner: Any) -> bool:
    """Whether a layer of PEFT's adds a change to the weight that does not depend on it."""
    kind = _kind(tuner)
    family = family_of_type(kind.upper())
    method: Any = METHODS.get(kind) if family is None else getattr(family, "method", None)
    return getattr(method, "kind", "") == "additive" and not getattr(tuner, "lora_variant", None)


def _kind(tuner: nn.Module) -> str:
    """PEFT's name for the method of one of its layers: that of the folder in `peft.tuners`."""
    names = [kind.__module__.split(".") for kind in type(tuner).__mro__ if kind.__module__.startswith("peft.tuners.")]
    return next((parts[2] for parts in names if len(parts) > 3), "adapter")


_QUANTIZED = "Call handle.merge_() before it is prepared"
