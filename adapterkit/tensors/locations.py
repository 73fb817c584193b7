"""Where things that are named lie: a local path, before all; else a place on a hub, fetched when it is needed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import AdapterkitError, UsageError, shown, storage_error
from .atomic import write_bytes
from .inputs import read_input
from .strict_json import load_json

NOTE = ".adapterkit-source.json"
MAX_NOTE = 1 << 16

_PLAIN = re.compile(
    r"(?P<folder>[A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*?(?P<suffix>\.[a-z_]+)?(@[^/@\s#]+)?(#[^/#\s]+)?", re.ASCII
)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".onnx", ".json", ".nemo"}
"""Endings of local files: `runs/best.safetensors` that is not there is a slip of the pen, not a repository."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where files came from: the note that a pulled folder carries.

    Attributes:
        uri: the place, for ever: at the commit.
        repo: what the place is called: `org/name`, or with a scheme where it is not Hugging Face's.
        commit: its full name.
    """

    uri: str
    repo: str
    commit: str

    def save(self, folder: Path) -> None:
        """Leaves the note in a folder."""
        write_bytes(folder / NOTE, f"{json.dumps(asdict(self), indent=2)}\n".encode())


def source_of(path: Path) -> Source | None:
    """What the note in a folder, or beside a file, says; None without one that makes sense."""
    note = (path if path.is_dir() else path.parent) / NOTE
    try:
        told = load_json(read_input(note, MAX_NOTE).decode("utf-8"))
    except (AdapterkitError, ValueError, RecursionError):
        return None
    fits = isinstance(told, dict) and set(told) == {"uri", "repo", "commit"}
    return Source(**told) if fits and all(isinstance(value, str) for value in told.values()) else None


def exists(path: Path) -> bool:
    """Whether there is something at a path.

    Raises:
        StorageError: the file system cannot tell: the name is too long, or a folder above may not be read.
    """
    try:
        return path.exists()
    except OSError as error:
        raise storage_error(error, path) from error


def path_text(name: str | os.PathLike[str]) -> str:
    """The text of a path or address; `~` at its start is the user's home, unless a file is called so.

    Raises:
        UsageError: it is neither text nor a path.
    """
    if not isinstance(name, (str, os.PathLike)):
        cure = "Pass a path, an address such as hf://org/repo, or what adapterkit.read returns where an adapter belongs"
        raise UsageError(f"{shown(name)} of type {type(name).__name__} where a path belongs", cure=cure)
    text = os.fspath(name)
    return os.path.expanduser(text) if text.startswith("~") and not os.path.exists(text) else text


def is_repo(name: str | None) -> bool:
    """Whether a name is `org/repo`, as model cards name bases; a path of somebody's disk is none."""
    return name is not None and _REPO.fullmatch(name) is not None


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a place on a hub: `scheme://...`, or `org/repo` where nothing local could be meant.

    Raises:
        UsageError: it has a scheme that is not known.
    """
    text = path_text(name)
    if os.path.exists(text) or _member(text) is not None:
        return False
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)", text)
    if scheme and (scheme[2] == "//" or isinstance(name, os.PathLike)):
        return _has_hub(scheme[1].lower(), text, strict=scheme[2] == "//")
    plain = _PLAIN.fullmatch(text) if isinstance(name, str) else None
    return plain is not None and plain["suffix"] not in _FILES and not os.path.exists(plain["folder"])


def _has_hub(scheme: str, text: str, *, strict: bool) -> bool:
    """Whether there is a hub of that scheme; a path with a colon in it may be just that, an address may not."""
    try:
        import_module("adapterkit.hub.hubs").hub_of(scheme)
    except UsageError as error:
        if strict:
            raise error.at(path=text) from None
        return False
    return True


def local(name: str | os.PathLike[str]) -> Path:
    """The local path that a name stands for: `FOLDER#name` is the subfolder `name`, unless the whole is a path itself.

    Args:
        name: of something on this disk; nothing need be there.
    """
    text = path_text(name)
    member = None if os.path.exists(text) else _member(text)
    return Path(text) if member is None else member


def _member(text: str) -> Path | None:
    folder, mark, member = text.rpartition("#")
    plain = mark and member not in ("", ".", "..") and "/" not in member and os.sep not in member
    return Path(folder) / member if plain and os.path.isdir(folder) else None


def located(name: str | os.PathLike[str]) -> Path:
    """The local path of what is named; what is on a hub is fetched, verified, into a cache first.

    Raises:
        UsageError: an unknown scheme, or a name that makes no sense on a hub.
        NetworkError: it is not on the hub, may not be read, or the hub cannot be reached.
    """
    if not is_remote(name):
        return local(name)
    path: Path = import_module("adapterkit.hub").fetched(os.fspath(name))
    return path


@contextmanager
def headers_of(name: str | os.PathLike[str]) -> Iterator[Path]:
    """A path for the length of some reading of headers; of what is on a hub, only headers are fetched.

    Raises:
        AdapterkitError: as for `located`; an error met inside names the place on the hub instead of the path.
    """
    if not is_remote(name):
        yield local(name)
        return
    text = os.fspath(name)
    with import_module("adapterkit.hub").headers(text) as path:
        try:
            yield path
        except AdapterkitError as error:
            if error.path:
                error.path = error.path.replace(str(path), text)
            if error.cure:
                error.cure = error.cure.replace(str(path), text)
            raise


def is_address(name: str | os.PathLike[str]) -> bool:
    """Whether a name says by its scheme that it is on a hub; what is written to a plain name is local.

    Raises:
        UsageError: it has a scheme that is not known.
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path_text(name)) is not None and is_remote(name)


def outgoing(
    name: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: Sequence[str | os.PathLike[str]] = (),
    unchanged: Callable[[], object] = lambda: None,
) -> AbstractContextManager[Path]:
    """A local path to write what shall be on a hub; it is pushed when the block ends without an error.

    The path is the same for the same name, so that what an interrupted run left there is found again.

    Args:
        name: of the place.
        overwrite: replace what is there.
        sources: what it is made from; a licence that all their model cards name is passed on.
        unchanged: called where all of it was there already, and nothing was pushed.

    Raises:
        AdapterkitError: as for `adapterkit.hub.push`; before anything is written, where it is known by then.
    """
    hub = import_module("adapterkit.hub")
    found: AbstractContextManager[Path] = hub.outgoing(os.fspath(name), overwrite, sources, unchanged)
    return found


def streamed(name: str | os.PathLike[str], out: Path) -> AbstractContextManager[Any]:
    """A base on a hub whose weight files are brought one at a time; see `adapterkit.hub.streaming`.

    Raises:
        AdapterkitError: as for `located`, or it cannot be streamed.
    """
    found: AbstractContextManager[Any] = import_module("adapterkit.hub").streamed(name, out)
    return found
