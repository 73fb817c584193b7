"""Find the forward of a module inside the hooks of other tools.

accelerate and diffusers replace `module.forward` by a wrapper that loads or casts the weights, calls the previous
forward, and releases the weights again. An adapter must run inside this wrapper. Outside the wrapper, formulas would
read weights on the meta device (accelerate's offloading), uninitialised memory (diffusers' group offloading to disk) or
8-bit values (its layerwise casting).

accelerate keeps the inner forward in an attribute of the module, diffusers in a reference that its first hook calls.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

Slot = tuple[object, str]
"""(object, attribute) that holds a forward: the module itself, or one of diffusers' references."""


def inner_slot(module: nn.Module) -> Slot:
    """Return the slot of a module's innermost forward, which all hooks of accelerate and diffusers wrap."""
    found = _references(module)[:1]
    if "_old_forward" in module.__dict__ and hasattr(module, "_hf_hook"):
        found.append((module, "_old_forward"))
    # If both tools have hooks, find the module's own forward: inside one tool's hooks is the other tool's forward.
    own = (slot for slot in found if getattr(value_in(slot), "__self__", None) is module)
    return next(own, found[0] if found else (module, "forward"))


def slot_of(module: nn.Module, owner: object) -> Slot | None:
    """Return the slot of a forward that is a method of `owner`, or None if other tools wrapped or removed it."""
    # Skip wrappers: functools.update_wrapper copies all attributes to a wrapper, including `__self__`.
    plain = [slot for slot in slots(module) if not hasattr(value_in(slot), "__wrapped__")]
    return next((slot for slot in plain if getattr(value_in(slot), "__self__", None) is owner), None)


def value_in(slot: Slot) -> object:
    """Return the value in a slot, or None if the slot is empty and the class's own forward applies."""
    found: object = slot[0].__dict__.get(slot[1])
    return found


def slots(module: nn.Module) -> Iterator[Slot]:
    """Yield the slots where a module's forward may be: its own, and those to which other tools move the forward."""
    yield from ((module, "forward"), (module, "_old_forward"))
    yield from _references(module)


def _references(module: nn.Module) -> list[Slot]:
    """Return the slots of forwards that diffusers' hooks at a module call, the innermost first."""
    registry = module.__dict__.get("_diffusers_hook")
    references = getattr(registry, "_fn_refs", ())
    return [(each, "forward" if each.original_forward is None else "original_forward") for each in references]
