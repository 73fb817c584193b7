"""Whether a config and tensors read back as the updates that they were made from; headers only."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...errors import AdapterkitError
from ...methods.replacement import Replacement
from ...tensors.lazy import Lazy, as_lazy
from . import config as fields
from .file import File
from .keys import parse_key, parse_keys, prefix_of
from .losses import Updates
from .reader import assemble
from .spelling import Spelled, stored

if TYPE_CHECKING:
    from ...tensors.checkpoint import Checkpoint
    from ...updates import Update


def says(
    config: Mapping[str, Any],
    tensors: Mapping[str, Lazy],
    spelled: Iterable[Spelled],
    updates: Updates,
    base: Checkpoint | None,
    omitted: Collection[str] = (),
) -> bool:
    """Whether PEFT would find these updates in a file of these tensors with this config, as it is written: sorted.

    The tensors of the keys `omitted` are not in the file.
    """
    written = json.loads(json.dumps(config, sort_keys=True))
    try:
        held = {key: tensor for key, tensor in tensors.items() if key not in omitted}
        prefix, keys = parse_keys(held, prefix_of(config["peft_type"]))
        stems = {parse_key(each.key, prefix).stem: each.place[0].path for each in spelled}
        out = {parse_key(key, prefix).word: tensors[key] for key in omitted}
        read, _, _ = assemble(File(fields.parse(written), keys, base, parameters=stems, omitted=out))
    except AdapterkitError:
        return False
    return _content(read) == _content(updates)


def _content(updates: Updates) -> dict[Any, Any]:
    """All that a config can get wrong: places, methods, values, shapes, numbers of tokens."""
    return {
        (target.path, target.rows, target.stacked): [_outline(update, target.layout) for update in found]
        for target, found in updates.items()
    }


def _outline(update: Update, layout: str) -> tuple[Any, ...]:
    leaves = {name: as_lazy(leaf) for name, leaf in update.tensors.items()}
    if isinstance(update, Replacement) and "weight" in leaves:
        leaves["weight"] = stored(leaves["weight"], layout)
    shapes = {name: (leaf.shape, _values(leaf)) for name, leaf in leaves.items()}
    return update.method, update.attributes, shapes


def _values(leaf: Lazy) -> Any:
    return leaf.dtype.name if leaf.dtype.floating else leaf.numpy().tolist()
