"""Check that a folder's contents read back as the updates from which they were made; only headers are compared."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import AdapterkitError
from ...io.lazy import as_lazy
from .container import Content
from .families import FAMILIES
from .reader import assemble

if TYPE_CHECKING:
    from ...core.adapter import Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint


def says(content: Content, updates: Updates, *, compat: str | None, base: Checkpoint | None) -> bool:
    """Whether these contents would be read as these updates."""
    written = json.loads(json.dumps(dict(content.config), sort_keys=True))
    try:
        read, _, _ = assemble(replace(content, config=written), compat=compat, base=base, heads=_heads(updates))
    except AdapterkitError:
        return False
    return _content(read) == _content(updates)


def _heads(updates: Updates) -> int | None:
    prefixes = FAMILIES["prefix_tuning"].methods
    found = [u.tensors.get("P", u.tensors.get("b2")) for us in updates.values() for u in us if u.method in prefixes]
    return next((int(leaf.shape[2]) for leaf in found if leaf is not None), None)


def _content(updates: Updates) -> dict[tuple[str, tuple[int, int] | None], object]:
    return {(target.path, target.rows): [_outline(update) for update in found] for target, found in updates.items()}


def _outline(update: Update) -> tuple[object, ...]:
    leaves = {name: as_lazy(leaf) for name, leaf in update.tensors.items()}
    return update.method, update.attributes, {name: (leaf.shape, leaf.dtype.name) for name, leaf in leaves.items()}
