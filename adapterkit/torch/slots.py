"""Find the forward of a module that the hooks of other tools go around.

accelerate and diffusers exchange `module.forward` for one that loads or casts the weights, calls what stood there, and
takes the weights away again. An adapter belongs inside of it. Outside, formulas would read weights on the meta device
(accelerate's offloading), uninitialised memory (diffusers' group offloading to disk) or 8 bits (its layerwise casting).

accelerate keeps the inner forward in an attribute of the module, diffusers in a reference that its first hook calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

Slot = tuple[Any, str]
"""(object, attribute) that holds a forward: the module itself, or a reference of diffusers'."""


def inner_slot(module: nn.Module) -> Slot:
    """Return the place of the forward that all hooks of accelerate and diffusers at a module go around."""
    found = _references(module)[:1]
    if "_old_forward" in module.__dict__ and hasattr(module, "_hf_hook"):
        found.append((module, "_old_forward"))
    # With hooks of both, what one of them goes around is the other's forward.
    own = (slot for slot in found if getattr(value_in(slot), "__self__", None) is module)
    return next(own, found[0] if found else (module, "forward"))


def slot_of(module: nn.Module, owner: object) -> Slot | None:
    """Return the place of a forward that is a method of `owner`; None where other tools have wrapped or removed it."""
    # functools.update_wrapper gives a wrapper all attributes of what it wraps, a `__self__` too.
    plain = [slot for slot in slots(module) if not hasattr(value_in(slot), "__wrapped__")]
    return next((slot for slot in plain if getattr(value_in(slot), "__self__", None) is owner), None)


def value_in(slot: Slot) -> Any:
    """Return what stands at a place; None where the class's own forward does."""
    return slot[0].__dict__.get(slot[1])


def slots(module: nn.Module) -> Iterator[Slot]:
    """Yield all places where a module's forward, or one inside of another tool's, may stand."""
    yield from ((module, "forward"), (module, "_old_forward"))
    yield from _references(module)


def _references(module: nn.Module) -> list[Slot]:
    """The forwards that diffusers' hooks at a module call, the inmost first."""
    registry = module.__dict__.get("_diffusers_hook")
    references = getattr(registry, "_fn_refs", ())
    return [(each, "forward" if each.original_forward is None else "original_forward") for each in references]
