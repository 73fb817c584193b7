"""The formats: one module each, found by its file name; and the three verbs over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StorageError, UnknownFormat, UsageError, nearest
from ..registry import Registry
from ..tensors.checkpoint import opened
from ._format import ON_LOSS, Format

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..tensors.checkpoint import Checkpoint

__all__ = ["FORMATS", "Format", "detect", "read", "write"]

FORMATS: Registry[type[Format]] = Registry("format", __name__, "adapterkit.formats", Format)


def detect(path: str | PathLike[str]) -> str:
    """The name of the one format whose headers are at `path`.

    Raises:
        StorageError: nothing is there.
        UnknownFormat: no format recognises it, or several do; names the candidates.
    """
    source = _existing(path)
    found = [name for name in FORMATS if FORMATS[name]().sniff(source)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownFormat(f"could be {' or '.join(found)}", path=path, cure="Say which with format=/--from")
    raise UnknownFormat("not an adapter in any known format", path=path, cure=f"Tried: {', '.join(FORMATS)}")


def read(
    path: str | PathLike[str],
    format: str | None = None,  # noqa: A002 - the public contract's word
    base: Checkpoint | str | PathLike[str] | None = None,
    *,
    compat: str | None = None,
) -> Adapter:
    """Reads an adapter in any format, lazily, and validates it.

    Args:
        path: file or folder.
        format: its format; found from its headers when not given.
        base: the base, for formats that need one to resolve names.
        compat: reproduce the known faults of the named tool, e.g. `"peft"`.

    Returns:
        the adapter; its lineage begins with this read.

    Raises:
        AdapterkitError: see `Format.read`.
    """
    source = _existing(path)
    name = format or detect(source)
    reader = FORMATS[name]()
    if compat is not None and compat not in reader.compat:
        known = ", ".join(sorted(reader.compat)) or "none"
        raise UsageError(f"{name} has no compat {compat!r}", path=path, cure=f"Known: {known}")
    adapter = reader.read(source, compat=compat, base=None if base is None else opened(base))
    try:
        adapter.validate()
    except Exception as error:
        raise _placed(error, path) from None
    return adapter


def write(
    adapter: Adapter,
    path: str | PathLike[str],
    format: str = "adapterkit",  # noqa: A002 - the public contract's word
    base: Checkpoint | str | PathLike[str] | None = None,
    on_loss: str = "refuse",
    *,
    profile: str | None = None,
) -> list[str]:
    """Writes an adapter; see `Format.write`. Validates it first, and returns what was left out or rewritten.

    Args:
        adapter: what to write.
        path: file or folder.
        format: the format to write.
        base: the base, for formats that need one to resolve names or order rows.
        on_loss: what to do with what the format cannot say; see `Format.write`.
        profile: a consumer that takes only a part of the format, e.g. `"vllm"`; scalings and ranks that it would not
            heed are folded for it, what it cannot run is refused.

    Raises:
        AdapterkitError: see `Format.write`.
    """
    if on_loss not in ON_LOSS:
        raise UsageError(f"unknown on_loss {on_loss!r}", cure=f"Known: {', '.join(ON_LOSS)}")
    writer = FORMATS[format]()
    adapter.validate()
    lines: list[str] = []
    if profile is not None:
        if profile not in writer.profiles:
            known = ", ".join(sorted(writer.profiles)) or "none"
            raise UsageError(f"{format} has no profile {profile!r}", path=path, cure=f"Known: {known}")
        adapter, lines = writer.fit(adapter, profile, on_loss=on_loss)
    return lines + writer.write(adapter, Path(path), on_loss=on_loss, base=None if base is None else opened(base))


def _existing(path: str | PathLike[str]) -> Path:
    source = Path(path)
    if source.exists():
        return source
    siblings: Mapping[str, None] = {}
    if source.parent.is_dir():
        siblings = dict.fromkeys(str(source.parent / entry.name) for entry in source.parent.iterdir())
    cure = nearest(str(source), siblings) or "Check the spelling of the path"
    raise StorageError("no such file or folder", path=path, cure=cure)


def _placed(error: Exception, path: str | PathLike[str]) -> Exception:
    from ..errors import AdapterkitError

    return error.at(path=path) if isinstance(error, AdapterkitError) else error
