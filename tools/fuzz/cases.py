"""Cases: a few files as an attacker would send them, what a user names of them, and what they are read with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox import REPOSITORY

NOTE = "case.json"


@dataclass(frozen=True, slots=True)
class Special:
    """Something other than a plain file: a `link` to a place, a `fifo`, a `folder`, or a `far` link out of the case."""

    kind: str
    to: str = ""


Content = bytes | Special


@dataclass(frozen=True, slots=True)
class Case:
    """Files and what to do with them.

    Attributes:
        name: the seed it comes from.
        kind: `adapter`, `base`, `graph` or `recipe`.
        files: content by relative path.
        subject: relative path of what a user names; empty for the whole folder.
        format: the format that the adapter is of, where it is known.
        base: path in the repository of a base to read with; empty without.
        partner: of an adapter, the folder of a base that it merges into; of a base or a graph, the adapter.
    """

    name: str
    kind: str
    files: Mapping[str, Content]
    subject: str = ""
    format: str = ""
    base: str = ""
    partner: str = field(default="", compare=False)

    def write(self, folder: Path) -> Path:
        """Writes the files into a new folder; returns the path that a user names."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content.kind == "fifo":
                os.mkfifo(path)
            elif content.kind == "folder":
                path.mkdir(exist_ok=True)
            else:
                path.symlink_to(content.to)
        return folder / self.subject

    def keep(self, folder: Path, note: Mapping[str, object]) -> None:
        """Writes the files with a note that `load` understands; replaces what was there."""
        shutil.rmtree(folder, ignore_errors=True)
        self.write(folder)
        own = {"kind": self.kind, "subject": self.subject, "format": self.format, "base": self.base, "seed": self.name}
        (folder / NOTE).write_text(json.dumps({**own, **note}, indent=1, default=str) + "\n", "utf-8")

    def with_files(self, files: Mapping[str, Content]) -> Case:
        return replace(self, files=files)

    def digest(self) -> str:
        """Tells cases apart by content."""
        whole = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            whole.update(
                name.encode("utf-8", "surrogatepass") + b"\0" + (content if isinstance(content, bytes) else b"?")
            )
        return whole.hexdigest()[:12]


def load(folder: Path) -> Case:
    """A case that `keep` wrote."""
    note = said_of(folder)
    files: dict[str, Content] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            files[name] = Special("link", os.readlink(path))
        elif path.is_fifo():
            files[name] = Special("fifo")
        elif path.is_file() and name != NOTE:
            files[name] = path.read_bytes()
    return Case(folder.name, note["kind"], files, note["subject"], note.get("format", ""), note.get("base", ""))


def said_of(folder: Path) -> dict[str, Any]:
    """The note of a kept case: its kind, its seed and, where known, the run and its number there."""
    note: dict[str, Any] = json.loads((folder / NOTE).read_text("utf-8"))
    return note


def located(base: str) -> Path:
    """Where a base named by a case lies."""
    return REPOSITORY / base
