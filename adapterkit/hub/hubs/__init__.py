"""The hubs, one module per scheme. Other packages add theirs by the entry point group `adapterkit.hubs`."""

from __future__ import annotations

from ...core.registry import Registry
from ...errors import UsageError, nearest
from ..remote import Remote
from ..uris import Uri
from ._filesystems import filesystem

HUBS: Registry[type[Remote]] = Registry("hub", __name__, "adapterkit.hubs", Remote)


def hub_of(scheme: str) -> type[Remote]:
    """Return the hub class of a scheme, or fsspec's if only fsspec knows the scheme.

    Raises:
        UsageError: nobody knows the scheme.
    """
    if scheme in HUBS:
        return HUBS[scheme]
    other = filesystem(scheme)
    if other is not None:
        return other
    cure = nearest(scheme, HUBS) or f"Known: {', '.join(HUBS[name].form for name in HUBS)}"
    raise UsageError(f"unknown scheme {scheme!r}", cure=cure)


def remote_at(uri: Uri, token: str | None = None) -> Remote:
    """Return the remote that a uri names."""
    return hub_of(uri.scheme)(uri, token)
