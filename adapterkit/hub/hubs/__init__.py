"""The hubs: one file each, called as its scheme is; third parties add theirs by the entry point `adapterkit.hubs`."""

from __future__ import annotations

from ...errors import UsageError, nearest
from ...registry import Registry
from ..remote import Remote
from ..uris import Uri
from ._filesystems import filesystem

HUBS: Registry[type[Remote]] = Registry("hub", __name__, "adapterkit.hubs", Remote)


def hub_of(scheme: str) -> type[Remote]:
    """The hub of a scheme; fsspec's, where only that knows it.

    Raises:
        UsageError: there is none.
    """
    if scheme in HUBS:
        return HUBS[scheme]
    other = filesystem(scheme)
    if other is not None:
        return other
    cure = nearest(scheme, HUBS) or f"Known: {', '.join(HUBS[name].form for name in HUBS)}"
    raise UsageError(f"unknown scheme {scheme!r}", cure=cure)


def remote_at(uri: Uri, token: str | None = None) -> Remote:
    """The place that a uri names."""
    return hub_of(uri.scheme)(uri, token)
