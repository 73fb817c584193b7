"""Updates in, keys and stored tensors out: the grammar of `keys` run backwards."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ...methods.dora import DoRA
from ...methods.ia3 import IA3
from ...methods.lora import LoRA
from ...methods.replacement import Replacement
from ...methods.rows import Rows
from ...names.layouts import IN_OUT
from ...tensors.lazy import Lazy, as_lazy
from .experts import IN_ORDER, depths, unstack
from .keys import PREFIX

if TYPE_CHECKING:
    from ...adapter import Target
    from ...tensors.checkpoint import Checkpoint
    from ...updates import Update

EMBEDDINGS = ("*emb*", "*.wte", "wte", "*.wpe", "wpe", "*.shared", "shared")
"""Globs of paths that are embeddings, among those stored the other way round."""


@dataclass(frozen=True, slots=True, eq=False)
class Spelled:
    """One tensor as PEFT stores it.

    Attributes:
        place: target, position among its updates, field.
        key: its key.
        leaf: its bytes.
        guessed: the key could be another: nothing tells an embedding from a Conv1D, or the order of two parameters.
    """

    place: tuple[Target, int, str]
    key: str
    leaf: Lazy
    guessed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What the spelling of one target depends on beyond the target itself.

    Attributes:
        stems: target -> (the path in its keys, wrappers included; whether that is a guess).
        peft_type: of the config.
        base: the base, if known: it tells modules from parameters, and convolutions from linear layers.
    """

    stems: Mapping[Target, tuple[str, bool]]
    peft_type: str
    base: Checkpoint | None


def spell(
    updates: Mapping[Target, tuple[Update, ...]], peft_type: str, prefix: str = PREFIX, base: Checkpoint | None = None
) -> Iterator[Spelled]:
    """Every tensor of the updates with its key; slices of fused weights have none."""
    layout = Layout(_stems(updates, base), peft_type, base)
    for target, found in updates.items():
        if target.rows is not None:
            continue
        for position, update in enumerate(found):
            for field, key, leaf, guessed in _spell_update(target, update, found, layout):
                yield Spelled((target, position, field), prefix + key, leaf, guessed)


def stored(leaf: Lazy, layout: str) -> Lazy:
    """A whole weight turned from the view of a layout to the order in which it is stored, or back."""
    axis = int(layout.startswith("e "))
    if layout not in ("in out *k", "e in out *k") or len(leaf.shape) < axis + 2:
        return leaf
    shape = list(leaf.shape)
    shape[axis], shape[axis + 1] = shape[axis + 1], shape[axis]
    return leaf.map(lambda values: values.swapaxes(axis, axis + 1), tuple(shape))


def config_name(target: Target, paths: Collection[str]) -> str:
    """The name under which a config knows the module or parameter of a target: an attention for its two projections."""
    module, _, name = target.path.rpartition(".")
    other = {"in_proj_weight": "out_proj", "out_proj": "in_proj_weight"}.get(name)
    return module if module and other and f"{module}.{other}" in paths else target.path


def is_parameter(target: Target, base: Checkpoint | None) -> bool:
    """Whether a LoRA's target is a parameter rather than a module."""
    return target.stacked or target.path.endswith(".weight") or (base is not None and target.path in base.tensors)


def is_embedding(target: Target) -> bool | None:
    """Whether a LoRA's target is an embedding; None where nothing tells it from a Conv1D."""
    if target.layout != "in out *k":
        return False
    if any(fnmatchcase(target.path, glob) for globs in IN_OUT.values() for glob in globs):
        return False
    return True if any(fnmatchcase(target.path.lower(), glob) for glob in EMBEDDINGS) else None


def lora_paths(updates: Mapping[Target, tuple[Update, ...]]) -> set[str]:
    """Paths of the targets that a LoRA or DoRA acts on."""
    return {target.path for target, found in updates.items() if any(isinstance(u, (LoRA, DoRA)) for u in found)}


def _stems(updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> dict[Target, tuple[str, bool]]:
    paths = lora_paths(updates)
    stems: dict[Target, tuple[str, bool]] = {}
    modules: dict[str, list[Target]] = {}
    for target in updates:
        name = config_name(target, paths)
        if target.path in paths and name == target.path and is_parameter(target, base) and "." in target.path:
            modules.setdefault(target.path.rpartition(".")[0], []).append(target)
        else:
            inside = name != target.path and target.path.endswith(".out_proj")
            stems[target] = (f"{name}.base_layer.out_proj" if inside else name, False)
    for module, targets in modules.items():
        named = {target.path.rpartition(".")[2]: target for target in targets}
        guessed = len(named) > 1 and not set(named) <= set(IN_ORDER)
        stems |= {named[name]: (module + ".base_layer" * depth, guessed) for name, depth in depths(list(named))}
    return stems


def _spell_update(
    target: Target, update: Update, found: tuple[Update, ...], layout: Layout
) -> Iterator[tuple[str, str, Lazy, bool]]:
    stem, guessed = layout.stems[target]
    if isinstance(update, (LoRA, DoRA)):
        embedding = is_embedding(target)
        for field, leaf in update.tensors.items():
            key = f"{stem}.{_part(field, bool(embedding))}"
            yield field, key, _factor(field, as_lazy(leaf), update, target.stacked), guessed or embedding is None
    elif isinstance(update, IA3):
        for field, leaf in update.tensors.items():
            yield field, f"{stem}.ia3_l", _scales(field, as_lazy(leaf), target, layout.base), False
    elif isinstance(update, Rows):
        inside = "" if layout.peft_type == "TRAINABLE_TOKENS" else ".token_adapter"
        yield "values", f"{stem}{inside}.trainable_tokens_delta", as_lazy(update.values), False
    elif isinstance(update, Replacement):
        for field, leaf in update.tensors.items():
            whole = stored(as_lazy(leaf), target.layout) if field == "weight" else as_lazy(leaf)
            yield field, _whole_key(target, field, stem, found, layout), whole, False


def _part(field: str, embedding: bool) -> str:
    if field == "magnitude":
        return "lora_magnitude_vector"
    if field == "bias":
        return "lora_B.bias"
    return f"lora_embedding_{field}" if embedding else f"lora_{field}.weight"


def _factor(field: str, leaf: Lazy, update: LoRA | DoRA, stacked: bool) -> Lazy:
    if stacked:
        return unstack(leaf) if field == "B" else leaf.reshape(-1, leaf.shape[-1])
    ones = [1] * (len(update.A.shape) - 2)
    if not ones or field in ("A", "bias"):
        return leaf
    return leaf.reshape(*leaf.shape, *ones) if field == "B" else leaf.reshape(1, *leaf.shape, *ones)


def _scales(field: str, leaf: Lazy, target: Target, base: Checkpoint | None) -> Lazy:
    weight = None if base is None else base.tensors.get(f"{target.path}.weight")
    if weight is not None and len(weight.shape) > 2:
        return leaf.reshape(1, -1, *[1] * (len(weight.shape) - 2))
    return leaf.reshape(1, -1) if field == "l_in" else leaf.reshape(-1, 1)


def _whole_key(target: Target, field: str, stem: str, found: tuple[Update, ...], layout: Layout) -> str:
    if layout.base is not None and field == "weight" and target.path in layout.base.tensors:
        return target.path
    inside = ""
    if any(isinstance(update, (LoRA, DoRA, IA3)) for update in found):
        inside = ".base_layer"
    elif any(isinstance(update, Rows) for update in found):
        inside = ".base_layer" if layout.peft_type == "TRAINABLE_TOKENS" else ".token_adapter.base_layer"
    return f"{stem}{inside}.{field}"
