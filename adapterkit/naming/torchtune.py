"""torchtune's names and orders of rows, from spec/architectures/namings."""

from __future__ import annotations

from functools import cache

from .architectures import namings_of
from .tables import NameTable


@cache
def table() -> NameTable:
    """Return the table of our templates and torchtune's; all families have the same names."""
    return NameTable({key: place.name for key, place in namings_of("torchtune")[0].places().items()})


@cache
def meta_order() -> dict[str, bool]:
    """Map each model_type to whether rows of q and k are in Meta's order."""
    return {
        model_type: any(place.rows for place in naming.places().values())
        for naming in namings_of("torchtune")
        for model_type in naming.model_types
    }


@cache
def turned() -> dict[str, str]:
    """Map the end of a module's name to the heads to which its rows belong, `query` or `kv`."""
    places = [place for naming in namings_of("torchtune") for place in naming.places().values()]
    return {place.name.rpartition("{n}.")[2]: place.heads for place in places if place.heads is not None}
