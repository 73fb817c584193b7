"""Resolve a path or uri to a local path. An existing local path takes precedence; the hub package resolves uris."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterkitError, StorageError, UsageError, nearest, shown, storage_error
from .atomic import write_bytes
from .inputs import read_input
from .resolving import hub
from .strict_json import load_json

if TYPE_CHECKING:
    from .resolving import PlacedOutput, RangedBase, StreamedBase

NOTE = ".adapterkit-source.json"
MAX_NOTE = 1 << 16

_PLAIN = re.compile(
    r"(?P<folder>[A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*?(?P<suffix>\.[a-z_]+)?(@[^/@\s#]+)?(#[^/#\s]+)?", re.ASCII
)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".onnx", ".json", ".nemo"}
"""Suffixes of files. A name such as `runs/best.safetensors` is never taken for a repository, even if no such file
exists."""


@dataclass(frozen=True, slots=True)
class Source:
    """The hub repository from which files were downloaded. A pulled folder contains this record as a JSON file.

    Attributes:
        uri: the repository's uri, pinned to the commit.
        repo: the repository's name, such as `org/name`. For hubs other than Hugging Face, it begins with the scheme.
        commit: the full hash of the commit.
    """

    uri: str
    repo: str
    commit: str

    def save(self, folder: Path) -> None:
        """Write the record into a folder."""
        write_bytes(folder / NOTE, f"{json.dumps(asdict(self), indent=2)}\n".encode())


def source_of(path: Path) -> Source | None:
    """Return the `Source` that is stored in a folder, or next to a file; None if there is no valid record."""
    note = (path if path.is_dir() else path.parent) / NOTE
    try:
        fields = load_json(read_input(note, MAX_NOTE).decode("utf-8"))
    except (AdapterkitError, ValueError, RecursionError):
        return None
    fits = isinstance(fields, dict) and set(fields) == {"uri", "repo", "commit"}
    return Source(**fields) if fits and all(isinstance(value, str) for value in fields.values()) else None


def exists(path: Path) -> bool:
    """Whether a path exists.

    Raises:
        StorageError: the file system reports an error: the name is too long, or a parent folder is not readable.
    """
    try:
        return path.exists()
    except OSError as error:
        raise storage_error(error, path) from error


def entries_below(root: Path, failed: Callable[[OSError], object]) -> list[Path]:
    """List all files, folders and links below a folder, sorted. Links to folders are not followed.

    `Path.rglob` of some Pythons raises an error for a link to a name that is too long, and omits folders that cannot
    be read.

    Args:
        root: the folder.
        failed: is called with the error for each folder that cannot be read.
    """
    levels = os.walk(root, onerror=failed)
    return sorted(Path(folder, name) for folder, folders, names in levels for name in (*folders, *names))


def check_exists(path: Path, name: str | os.PathLike[str] | None = None) -> None:
    """Check that a local path exists.

    Args:
        path: the path.
        name: the name that the user typed, which the error shows; if None, the error shows the path.

    Raises:
        StorageError: the path does not exist; the message suggests the most similar name in the same folder.
    """
    if exists(path):
        return
    # Links to themselves are included. Without this check, the cure would suggest the link's own name.
    if path.is_symlink():
        why = "the symbolic link points to a file or folder that does not exist"
        raise StorageError(why, path=path if name is None else name, cure="Correct the link, or pass another path")
    siblings: list[str] = []
    with suppress(OSError):
        siblings = sorted(entry.name for entry in path.parent.iterdir())
    # Compare only the last part of each path: in a folder with a long path, all whole paths would look similar.
    folder = "" if path.parent == Path() else os.path.join(path.parent, "")
    cure = nearest(path.name, siblings, before=folder) or "Check the spelling of the path"
    raise StorageError("no such file or folder", path=path if name is None else name, cure=cure)


def check_named(*names: str | os.PathLike[str] | None) -> None:
    """Check that each name exists locally or refers to a hub. Call this before slow work, such as an import.

    Raises:
        StorageError: a local name does not exist.
    """
    for name in names:
        if name is not None and not is_remote(name):
            check_exists(local(name), name)


def path_text(name: str | os.PathLike[str]) -> str:
    """Return the text of a path or uri. A leading `~` becomes the user's home, and `file:///a/b` becomes `/a/b`.

    If a file with exactly the given name exists, the name is returned unchanged.

    Raises:
        UsageError: the name is not a string or a path, is empty, contains a null byte, or begins with `~user` for a
            user who does not exist.
    """
    if not isinstance(name, (str, os.PathLike)):
        cure = "Pass a path or an address such as hf://org/repo (or, for an adapter, the result of adapterkit.read)"
        raise UsageError(f"{shown(name)} of type {type(name).__name__} is not a path", cure=cure)
    text = os.fspath(name)
    if not text:
        raise UsageError(
            "the path is empty", cure="Pass a file, a folder or an address; perhaps a shell variable is not set"
        )
    if "\0" in text:
        raise UsageError(f"the path {shown(text)} contains a null byte", cure="Remove the null byte from the path")
    if text.startswith("file://") and not os.path.exists(text):
        from urllib.request import url2pathname  # This imports an HTTP client, which takes 20 ms.

        return url2pathname(text.removeprefix("file://").removeprefix("localhost"))
    if not text.startswith("~") or os.path.exists(text):
        return text
    path = os.path.expanduser(text)
    if path.startswith("~"):
        user = text[1:].partition(os.sep)[0]
        cure = f"If the name of the file begins with a tilde, write ./{text}"
        raise UsageError(f"no user {user!r} on this machine", path=text, cure=cure)
    return path


def is_repo(name: str | None) -> bool:
    """Whether a name has the form `org/repo`, as the names of bases in model cards do."""
    return name is not None and _REPO.fullmatch(name) is not None


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether a name refers to a hub: `scheme://...`, or `org/repo` if neither `org/repo` nor `org` exists locally.

    Raises:
        UsageError: the scheme is unknown.
    """
    text = path_text(name)
    if os.path.exists(text) or _member(text) is not None:
        return False
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)", text)
    # Accept one slash in path objects: pathlib collapses "hf://org" to "hf:/org".
    if scheme and (scheme[2] == "//" or isinstance(name, os.PathLike)):
        return _has_hub(scheme[1].lower(), text, strict=scheme[2] == "//")
    plain = _PLAIN.fullmatch(text) if isinstance(name, str) else None
    return plain is not None and plain["suffix"] not in _FILES and not os.path.exists(plain["folder"])


def _has_hub(scheme: str, text: str, *, strict: bool) -> bool:
    """Whether there is a hub for a scheme.

    If there is no hub for the scheme, raise an error if `strict` is true, otherwise return False. Callers pass
    `strict=True` for a name such as `a://b`, but not for a name such as `a:/b`, which may be a local path.
    """
    try:
        hub().hub_of(scheme)
    except UsageError as error:
        if strict:
            raise error.at(path=text) from None
        return False
    return True


def local(name: str | os.PathLike[str]) -> Path:
    """Return the local path of a name.

    `FOLDER#name` means the subfolder `name` of `FOLDER`, unless a path with exactly this text exists.

    Args:
        name: a local name; it need not exist.
    """
    text = path_text(name)
    member = None if os.path.exists(text) else _member(text)
    return Path(text) if member is None else member


def _member(text: str) -> Path | None:
    folder, mark, member = text.rpartition("#")
    plain = mark and member not in ("", ".", "..") and "/" not in member and os.sep not in member
    return Path(folder) / member if plain and os.path.isdir(folder) else None


def located(name: str | os.PathLike[str]) -> Path:
    """Return the local path of a name. If the name refers to a hub, download the files into a cache and verify them.

    Raises:
        UsageError: the scheme is unknown, or the name is invalid on its hub.
        NetworkError: the hub lacks the repository or file, denies access, or is not reachable.
    """
    if not is_remote(name):
        return local(name)
    return hub().fetched(os.fspath(name))


@contextmanager
def headers_of(name: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a local path for code that reads only headers. If the name refers to a hub, only headers are downloaded.

    Raises:
        AdapterkitError: see `located`. Errors in the block show the uri instead of the temporary path.
    """
    if not is_remote(name):
        yield local(name)
        return
    text = os.fspath(name)
    with hub().headers(text) as path, _shown_as(text, path):
        yield path


@contextmanager
def ranged(name: str | os.PathLike[str], *, whole: bool = False) -> Iterator[RangedBase]:
    """Yield a base on a hub. Only the bytes that the block reads are downloaded, into a temporary folder.

    Args:
        name: the uri.
        whole: also download the files that are not weights.

    Raises:
        AdapterkitError: see `located`; also if the base has no safetensors files.
    """
    text = os.fspath(name)
    with hub().ranged(text, whole=whole) as base, _shown_as(text, base.path):
        yield base


@contextmanager
def _shown_as(text: str, path: Path) -> Iterator[None]:
    """In errors that the block raises, replace the temporary path with the uri."""
    try:
        yield
    except AdapterkitError as error:
        if error.path:
            error.path = error.path.replace(str(path), text)
        if error.cure:
            error.cure = error.cure.replace(str(path), text)
        raise


def is_address(name: str | os.PathLike[str]) -> bool:
    """Whether an output's name refers to a hub. A name without a scheme, such as `org/repo`, is a local path here.

    Raises:
        UsageError: the scheme is unknown.
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path_text(name)) is not None and is_remote(name)


def outgoing(
    name: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: Sequence[str | os.PathLike[str]] = (),
    unchanged: Callable[[], object] = lambda: None,
) -> AbstractContextManager[Path]:
    """Return a context manager that yields a local path to write to. If the block succeeds, the content is pushed.

    The path is computed from the name, so a later run finds the files of an interrupted run.

    Args:
        name: the uri to push to.
        overwrite: replace existing files.
        sources: the adapters and the base. If all their model cards name the same licence, the output's card names this
            licence too.
        unchanged: a function to call if nothing was pushed, because the hub already had all files.

    Raises:
        AdapterkitError: see `adapterkit.hub.push`. If possible, it is raised before anything is written.
    """
    return hub().outgoing(os.fspath(name), overwrite, sources, unchanged)


def streamed(name: str | os.PathLike[str], out: Path) -> AbstractContextManager[StreamedBase]:
    """Return a context manager that yields a base on a hub, whose weight files are downloaded one by one.

    The files are downloaded into a hidden folder next to `out`. See `StreamedBase`.

    Raises:
        AdapterkitError: see `located`; also if the base cannot be streamed.
    """
    return hub().streamed(name, out)


def pinned(name: str | os.PathLike[str]) -> str:
    """Return a uri pinned to its current commit, so that other machines read the same files.

    Raises:
        AdapterkitError: see `located`.
    """
    return hub().pinned(os.fspath(name))


def placing(
    name: str | os.PathLike[str], *, overwrite: bool = False, unchanged: Callable[[], object] = lambda: None
) -> AbstractContextManager[PlacedOutput]:
    """Return a context manager that yields an output on a hub. The tasks of a cluster upload the output's weight files.

    Raises:
        AdapterkitError: see `outgoing`.
    """
    return hub().placing(os.fspath(name), overwrite, unchanged)
