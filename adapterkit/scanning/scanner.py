"""Scan a file, a folder or an address on a hub."""

from __future__ import annotations

from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterkitError, public
from ..formats import read, recognised
from ..io.checkpoint import opened
from ..io.locations import check_exists, located, path_text
from ..io.stages import stage
from .files import WEIGHTS, in_folder
from .findings import Finding, Scan, ordered
from .values import in_adapter

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint

MOST_FILES = 10_000


def scan(source: str | PathLike[str], *, base: Checkpoint | str | PathLike[str] | None = None) -> Scan:
    """Scan an untrusted adapter for signs of an attack; nothing in it is executed.

    Args:
        source: a file, a folder, or an address on a hub, whose files are downloaded first.
        base: the base, to compare the norms of the changes with the norms of its weights; None skips this rule.

    Returns:
        The findings, the most severe first. Findings are evidence, not proof. A scan without findings proves nothing.

    Raises:
        StorageError: the source or the base does not exist or cannot be read.
        NetworkError: the hub cannot be reached.

    Example:
        >>> adapterkit.scan("lora").worst  # doctest: +SKIP
        'none'
    """
    stage("scanning files and values")
    text = path_text(source)
    root = located(text)
    check_exists(root, text)
    unread: list[str] = []
    files = _files(root, unread)
    checkpoint = None if base is None else opened(base)
    findings = list(in_folder(root, files, unread))
    for adapter in _adapters(root, files, unread):
        findings += _adapter(adapter, checkpoint, unread)
    return Scan(public(text), ordered(findings), len(files), tuple(unread))


def _adapters(root: Path, files: list[Path], unread: list[str]) -> list[Path]:
    """Return the adapter at a path, or the adapters in its subfolders."""
    if _recognised(root):
        return [root]
    folders = dict.fromkeys(file.parent for file in files if file.name.endswith(WEIGHTS) and file.parent != root)
    found = [folder for folder in folders if _recognised(folder)]
    if not found and any(file.name.endswith(WEIGHTS) for file in files):
        unread.append(f"{root.name}: its targets and values: no adapter is recognised")
    return found


def _recognised(path: Path) -> bool:
    with suppress(AdapterkitError):
        return bool(recognised(path))
    return False


def _adapter(root: Path, checkpoint: Checkpoint | None, unread: list[str]) -> list[Finding]:
    """Return findings about the targets and values of an adapter.

    An adapter that cannot be read is added to `unread`, because other tools may be able to read it.
    """
    try:
        adapter = read(root, base=checkpoint)
    except AdapterkitError as error:
        unread.append(f"{root.name}: its targets and values: {error.why}")
        return []
    name = next((update.file for _, update in adapter if update.file is not None), None)
    file = Path(name).name if name is not None else root.name
    return list(in_adapter(adapter, file, checkpoint, unread))


def _files(root: Path, unread: list[str]) -> list[Path]:
    """Return at most `MOST_FILES` files. Links to folders are not followed, and git's own files are left out."""
    if not root.is_dir():
        return [root]
    found: list[Path] = []
    for path in sorted(root.rglob("*")):
        if path.relative_to(root).parts[0] == ".git" or (path.is_dir() and not path.is_symlink()):
            continue
        if len(found) >= MOST_FILES:
            unread.append(f"{root.name}: only its first {MOST_FILES:,} files were scanned")
            break
        found.append(path)
    return found
