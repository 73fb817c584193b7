"""The edge: functions that take names of files and hubs where the modules below take what is opened already.

`adapterkit.names` is a function, so the package that it is about is called `adapterkit.naming`: a module and a function
of one name would replace each other, depending on what is imported first.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from .adapter import Adapter
from .binding.tables import name_map
from .errors import places_errors
from .formats import read
from .tensors.checkpoint import opened

if TYPE_CHECKING:
    from .tensors.checkpoint import Checkpoint


@places_errors
def names(
    base: Checkpoint | str | PathLike[str],
    adapter: Adapter | str | PathLike[str] | None = None,
    *,
    rename: str | Sequence[str] = (),
    allow_partial: bool = False,
) -> dict[str, Any]:
    """Say where an adapter's targets lie in a base, and by which rules; headers alone are read.

    Args:
        base: a folder, a weight file, an address on a hub, or an open checkpoint.
        adapter: the adapter, or where it is; without one, the base's own names are listed with what other tools call
            them.
        rename: rules for names that cannot be told, each `FROM=TO` or `@FILE`, as in `adapterkit.merge`.
        allow_partial: list targets that have no place under `missing` instead of refusing.

    Returns:
        `base`, `model_type`, `family` (the architecture file that is for the base, or None), and with an adapter
        `targets`, a list of records with `target` (the adapter's name), `path` (the base's), `rows` and `layout` and
        `tensor`; `rules`, each with the number of targets that it placed; and `missing`. Without an adapter `weights`:
        one record for each stored name, with `#` for numbers, the number of such modules, and `names` by naming.

    Raises:
        TargetNotFound: a target has no place, or two readings of its name fit.
        ShapeMismatch: a shape does not fit.
        UsageError: a rule that cannot be read.
    """
    checkpoint = opened(base)
    given = read(adapter, base=checkpoint) if isinstance(adapter, (str, PathLike)) else adapter
    return name_map(checkpoint, given, rename=rename, partial=allow_partial)
