"""Whether a config and tensors read back as the updates that they were made from; headers only."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...errors import AdapterkitError
from ...io.lazy import Lazy, as_lazy
from ...methods.replacement import Replacement
from . import config as fields
from .families import family_of, family_of_type
from .file import File
from .keys import parse_key, parse_keys, prefix_of
from .reader import Places, assemble
from .spelling import Spelled, stored

if TYPE_CHECKING:
    from ...core.adapter import Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint


def says(
    config: Mapping[str, Any],
    tensors: Mapping[str, Lazy],
    spelled: Iterable[Spelled],
    updates: Updates,
    base: Checkpoint | None,
    omitted: Collection[str] = (),
    compat: str | None = None,
) -> bool:
    """Whether PEFT would find these updates in a file of these tensors with this config, as it is written: sorted.

    The tensors of the keys `omitted` are not in the file; `compat` is the reading.
    """
    written = json.loads(json.dumps(config, sort_keys=True))
    try:
        held = {key: tensor for key, tensor in tensors.items() if key not in omitted}
        prefix, keys = parse_keys(held, prefix_of(config["peft_type"]))
        stems = {parse_key(each.key, prefix).stem: each.place[0].path for each in spelled}
        known = {target.path: update for target, found in updates.items() for update in found if family_of(update)}
        out = {parse_key(key, prefix).word: tensors[key] for key in omitted}
        file = File(fields.parse(written), keys, base, compat, parameters=stems, omitted=out, known=known)
        read, places, _ = assemble(file)
    except AdapterkitError:
        return False
    own = _own(places, file)
    return _content(read, own) == _content(updates, own)


def _own(places: Places, file: File) -> dict[tuple[str, int], set[str]]:
    """(path, position) -> the fields that come from keys of their own, or from the only one for all modules."""
    family = family_of_type(file.settings.peft_type)
    several = {key.text for word, key in file.shared.items() if family and word not in family.shared}
    own: dict[tuple[str, int], set[str]] = {}
    for target, held in places.items():
        for position, keys in enumerate(held):
            fields = {field for field, key in keys.items() if key.text not in several}
            if fields:
                own.setdefault((target.path, position), set()).update(fields)
    return own


def _content(updates: Updates, own: Mapping[tuple[str, int], Collection[str]]) -> dict[Any, Any]:
    """All that a config can get wrong: places, methods, values, shapes, numbers of tokens.

    Of real numbers under keys of their own nothing but the type is: others, which a reader makes, or chooses among
    several shared tensors, are compared.
    """
    return {
        (target.path, target.rows, target.stacked): [
            _outline(update, target.layout, own.get((target.path, position), ()))
            for position, update in enumerate(found)
        ]
        for target, found in updates.items()
    }


def _outline(update: Update, layout: str, own: Collection[str]) -> tuple[Any, ...]:
    leaves = {name: as_lazy(leaf) for name, leaf in update.tensors.items()}
    if isinstance(update, Replacement) and "weight" in leaves:
        leaves["weight"] = stored(leaves["weight"], layout)
    shapes = {name: (leaf.shape, _values(leaf, name in own)) for name, leaf in leaves.items()}
    return update.method, update.attributes, shapes


def _values(leaf: Lazy, own: bool) -> Any:
    if not leaf.dtype.floating:
        return leaf.numpy().tolist()
    return leaf.dtype.name if own else (leaf.dtype.name, bytes(leaf.fetch()))
