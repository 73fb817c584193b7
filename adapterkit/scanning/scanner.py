"""Scan a file, a folder or a place on a hub."""

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
from .files import in_folder
from .findings import Finding, Scan, ordered
from .values import in_adapter

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint

MOST_FILES = 10_000


def scan(source: str | PathLike[str], *, base: Checkpoint | str | PathLike[str] | None = None) -> Scan:
    """Look for what an adapter from a stranger could do; nothing in it is executed.

    Args:
        source: a file, a folder, or an address on a hub, whose files are fetched first.
        base: the base, to compare norms with; without it that rule is left out.

    Returns:
        findings, the worst first. They are evidence, not proof, and their absence proves nothing.

    Raises:
        StorageError: nothing is there, or it cannot be read.
        NetworkError: the hub cannot be reached.

    Example:
        >>> adapterkit.scan("lora").worst  # doctest: +SKIP
        'none'
    """
    stage("looking at files and values")
    text = path_text(source)
    root = located(text)
    check_exists(root, text)
    files = _files(root)
    unread: list[str] = []
    findings = list(in_folder(root, files, unread))
    with suppress(AdapterkitError):
        if recognised(root):
            findings += _adapter(root, base, unread)
    return Scan(public(text), ordered(findings), len(files), tuple(unread))


def _adapter(root: Path, base: Checkpoint | str | PathLike[str] | None, unread: list[str]) -> list[Finding]:
    """Findings in the adapter itself; what cannot be read is said, since other tools may read it."""
    checkpoint = None if base is None else opened(base)
    try:
        adapter = read(root, base=checkpoint)
    except AdapterkitError as error:
        unread.append(f"{root.name}: as an adapter: {error.why}")
        return []
    name = next((update.file for _, update in adapter if update.file is not None), None)
    file = Path(name).name if name is not None else root.name
    return list(in_adapter(adapter, file, checkpoint, unread))


def _files(root: Path) -> list[Path]:
    """All files, links not followed into folders; a folder of too many is cut off."""
    if not root.is_dir():
        return [root]
    found: list[Path] = []
    for path in sorted(root.rglob("*")):
        if ".git" in path.parts or len(found) >= MOST_FILES:
            continue
        if path.is_symlink() or path.is_file():
            found.append(path)
    return found
