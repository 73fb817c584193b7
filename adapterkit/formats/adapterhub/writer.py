"""Encode an `Adapter` as the contents of a folder, and check that they read back as the same adapter.

If the source config still describes the adapter, the writer keeps it unchanged. Otherwise the writer composes a new
config, with the fields that release 1.3 writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from ...errors import AdapterkitError, Unrepresentable
from ...io.lazy import as_lazy
from .._losses import Loss, expressible
from .container import SAFETENSORS, Content
from .families import FAMILIES, family_of
from .file import AdapterHubNaming, root_of
from .layers import family_of_base, model_type_of, on_outputs
from .reader import FORMAT, HEAD, AdapterHubHints, assemble, by_family, hints_of, spell
from .settings import RELEASE

if TYPE_CHECKING:
    from ...core.adapter import Adapter, Target, Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy
    from ...io.strict_json import JsonValue

NAME = "adapter"
"""The name for an adapter that was not read from AdapterHub's format."""


def encode(adapter: Adapter, *, on_loss: str, base: Checkpoint | None) -> tuple[Content, list[str]]:
    """Return the contents of the folder, and one line for each omitted update.

    Raises:
        Unrepresentable: AdapterHub's format cannot express an update, and `on_loss` does not allow omitting the update.
    """
    hints = hints_of(adapter)
    if hints.config and all(family_of(update) for _, update in adapter):
        content = _content(adapter, adapter.updates, hints, hints.config)
        if says(content, adapter.updates, compat=hints.compat, base=base):
            return content, []
    updates, lines = expressible(
        on_outputs(adapter.updates, base), lambda held: _losses(held, base),
        dialect="AdapterHub", place="an AdapterHub folder", on_loss=on_loss,
    )  # fmt: skip
    content = _content(adapter, updates, hints, _config(adapter, updates, hints, base))
    if not says(content, updates, compat=None, base=base):
        cure = "Write adapterkit's format: --to adapterkit (format='adapterkit')"
        raise Unrepresentable("AdapterHub's config cannot express this combination", items=lines, cure=cure)
    return content, lines


def _content(adapter: Adapter, updates: Updates, hints: AdapterHubHints, config: Mapping[str, JsonValue]) -> Content:
    root = hints.root or root_of(target.path for target in updates)
    naming = AdapterHubNaming(str(config["name"]), cast("str | None", config.get("model_type")), root)
    spelled = {hints.keys.get(key, key): leaf for key, leaf in spell(updates, naming)}
    kept, head = _kept(adapter)
    stale = {key for family, own in by_family(updates).items() for key in family.stale(own, naming, kept)}
    kept = {key: leaf for key, leaf in kept.items() if key not in stale}
    return Content(
        config=config,
        tensors=spelled | kept,
        file=hints.file or SAFETENSORS,
        interface=hints.interface,
        head=hints.head,
        head_tensors=head,
        head_file=hints.head_file,
    )


def _kept(adapter: Adapter) -> tuple[dict[str, Lazy], dict[str, Lazy]]:
    """Return the stored tensors that belong to no update: those of the adapter's file, and the prediction head's."""
    foreign = adapter.foreign
    tensors = {} if foreign is None or foreign.format != FORMAT else foreign.tensors
    own = {key: as_lazy(leaf) for key, leaf in tensors.items() if not key.startswith(HEAD)}
    return own, {key.removeprefix(HEAD): as_lazy(leaf) for key, leaf in tensors.items() if key.startswith(HEAD)}


def _config(
    adapter: Adapter, updates: Updates, hints: AdapterHubHints, base: Checkpoint | None
) -> dict[str, JsonValue]:
    own = [{**family.fresh, **family.compose(each, base)} for family, each in by_family(updates).items()]
    known = {} if base is None else base.config or {}
    ref = adapter.base.id if adapter.base else None
    model_type = family_of_base((target.path for target in updates), model_type_of(base))
    return {
        "hidden_size": known.get("hidden_size"),
        "model_class": None,
        "model_type": model_type,
        "name": NAME,
        **hints.config,
        "config": own[0] if len(own) == 1 else {"architecture": "union", "configs": own},
        "model_name": ref or hints.config.get("model_name"),
        "version": RELEASE,
    }


def _losses(updates: Updates, base: Checkpoint | None) -> dict[Loss, None]:
    found: dict[tuple[Target, int], str] = {}
    for target, each in updates.items():
        for position, update in enumerate(each):
            if family_of(update) is None:
                found[target, position] = f"the adapters library does not have the method {update.method}"
    for family, own in by_family(updates).items():
        for target, position, why in family.losses(own, base):
            found.setdefault((target, _position(updates[target], own[target][position])), why)
    return dict.fromkeys((target, position, why) for (target, position), why in found.items())


def _position(updates: tuple[Update, ...], update: Update) -> int:
    return next(position for position, other in enumerate(updates) if other is update)


# Check that the folder's contents would be read as the same updates. Only headers are compared, not values.


def says(content: Content, updates: Updates, *, compat: str | None, base: Checkpoint | None) -> bool:
    """Whether reading these contents would yield these updates; values are not compared."""
    written = json.loads(json.dumps(dict(content.config), sort_keys=True))
    try:
        read, _, _ = assemble(replace(content, config=written), compat=compat, base=base, heads=_heads(updates))
    except AdapterkitError:
        return False
    return _outlines(read) == _outlines(updates)


def _heads(updates: Updates) -> int | None:
    prefixes = FAMILIES["prefix_tuning"].methods
    found = [u.tensors.get("P", u.tensors.get("b2")) for us in updates.values() for u in us if u.method in prefixes]
    return next((int(leaf.shape[2]) for leaf in found if leaf is not None), None)


def _outlines(updates: Updates) -> dict[tuple[str, tuple[int, int] | None], object]:
    return {(target.path, target.rows): [_outline(update) for update in found] for target, found in updates.items()}


def _outline(update: Update) -> tuple[object, ...]:
    leaves = {name: as_lazy(leaf) for name, leaf in update.tensors.items()}
    return update.method, update.attributes, {name: (leaf.shape, leaf.dtype.name) for name, leaf in leaves.items()}
