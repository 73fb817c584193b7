"""Change a model completely or not at all, even if Ctrl-C, a lack of memory or another tool's hook stops the change.

Attaching an adapter changes many modules in sequence. All errors in the arguments are found before the first change. If
an exception stops the changes later, this module restores the model. It needs only copies of small dictionaries, and
never copies a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .bypass import PARAMETERS, slots
from .checkpoints import HANDLES
from .leaves import APPLY
from .parts import HOOK, SCRIPTING
from .scopes import SETTINGS

_ENTRIES = (HOOK, SCRIPTING, APPLY, HANDLES, PARAMETERS, "forward", "_old_forward")
"""The attributes of a module that an adapter sets or replaces."""

_TABLES = (
    PARAMETERS, "_buffers", "_non_persistent_buffers_set", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_state_dict_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", HANDLES,
)  # fmt: skip
"""The attributes of a module that hold dictionaries, sets or lists in which an adapter adds or removes entries."""


@contextmanager
def all_or_nothing(
    model: nn.Module, objects: Iterable[object] = (), undo: Callable[[], None] | None = None
) -> Iterator[None]:
    """Restore a model to its previous state if the `with` block raises an exception.

    Args:
        model: the model.
        objects: further objects whose attributes are restored, such as a handle and its leaves.
        undo: a function that restores the values of the weights. It is called before the attributes are restored.
    """
    kept: list[_State | _Attributes] = [_State(module) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    ours = [each for module in model.modules() for each in _ours(module)]
    kept += [_Attributes(each) for each in (*objects, *ours)]
    try:
        yield
    except BaseException:
        if undo is not None:
            undo()
        for each in kept:
            each.restore()
        for parameter, flag in gradients:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)
        SETTINGS.renew()
        raise


def _ours(module: nn.Module) -> Iterator[object]:
    """Yield all objects, except the module itself, that an adapter changes when it is attached to the module.

    These are the adapter's hook, the objects in which other tools keep the module's forward, and the forward pre-hooks
    that adapterkit registered with the module.
    """
    if HOOK in module.__dict__:
        yield module.__dict__[HOOK]
    yield from (owner for owner, _ in slots(module) if owner is not module)
    package = __name__.rpartition(".")[0]
    hooks = module.__dict__.get("_forward_pre_hooks") or {}  # Modules of torch.jit have no such attribute.
    yield from (hook for hook in hooks.values() if type(hook).__module__.startswith(package))


class _State:
    """A copy of those attributes of a module that adapters change: the attributes in `_ENTRIES` and `_TABLES`."""

    def __init__(self, module: nn.Module) -> None:
        self.attributes = module.__dict__
        self.kept_attributes = {name: self.attributes[name] for name in _ENTRIES if name in self.attributes}
        tables: list[Any] = [self.attributes.get(name) for name in _TABLES]
        self.tables = [(table, table.copy()) for table in tables if isinstance(table, dict | set | list)]

    def restore(self) -> None:
        for name in _ENTRIES:
            self.attributes.pop(name, None)
        self.attributes.update(self.kept_attributes)
        for table, before in self.tables:
            table.clear()
            if isinstance(table, list):
                table.extend(before)
            else:
                table.update(before)


class _Attributes:
    """A copy of an object's attributes. Attributes that are lists are copied too."""

    def __init__(self, each: object) -> None:
        self.attributes = each.__dict__
        self.before = dict(self.attributes)
        self.lists = [(value, value.copy()) for value in self.before.values() if isinstance(value, list)]

    def restore(self) -> None:
        self.attributes.clear()
        self.attributes.update(self.before)
        for value, before in self.lists:
            value[:] = before
