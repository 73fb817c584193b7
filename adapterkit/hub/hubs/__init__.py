"""The hubs, one module per scheme. Other packages add hubs by the entry point group `adapterkit.hubs`."""

from __future__ import annotations

from dataclasses import replace

from ...core.registry import Registry
from ...errors import UsageError, nearest
from ..remote import Address, Remote, Uri, check_name, scheme_of
from ._filesystems import filesystem

HUBS: Registry[type[Remote]] = Registry("hub", __name__, "adapterkit.hubs", Remote)


def hub_of(scheme: str) -> type[Remote]:
    """Return the hub class of a scheme; if only fsspec knows the scheme, return a class that reads through fsspec.

    Raises:
        UsageError: the scheme is unknown.
    """
    if scheme in HUBS:
        return HUBS[scheme]
    other = filesystem(scheme)
    if other is not None:
        return other
    cure = nearest(scheme, HUBS) or f"Known: {', '.join(HUBS[name].form for name in HUBS)}"
    raise UsageError(f"unknown scheme {scheme!r}", cure=cure)


def remote_at(uri: Uri, token: str | None = None) -> Remote:
    """Return a `Remote`, which lists, reads and pushes the files of a uri."""
    return hub_of(uri.scheme)(uri, token)


def parse(text: str) -> Uri:
    """Parse a uri.

    Raises:
        UsageError: the scheme is unknown, the text after it is not a name on that hub, or the path leads outside the
            repository.
    """
    scheme, rest = scheme_of(text)
    named = hub_of(scheme or "hf").named
    uri = named(rest.removesuffix("/"))
    place, mark, member = rest.rpartition("#")
    # `NAME#member` means the subfolder `member`. Only in an `Address`, the text after `#` is a digest of the folder.
    if mark and not isinstance(uri, Address):
        check_name(member, UsageError)
        uri = named(place.removesuffix("/"))
        if uri is not None:
            uri = replace(uri, path=f"{uri.path}/{member}" if uri.path else member)
    if uri is None:
        local = "" if scheme else ". A local file needs no transfer: copy it, or use 'adapterkit convert'"
        cure = f"Write {hub_of(scheme or 'hf').form}{local}"
        raise UsageError(f"{text!r} is not a name on a hub", cure=cure)
    return uri
