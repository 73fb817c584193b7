"""Recognise files that people take for adapters and that no format reads, so that an error can name them.

The kinds are data, `spec/other_files.toml`: an IP-Adapter, a ControlNet, a file packed for one library's kernels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import msgspec

from ..errors import Malformed
from ..io.inputs import read_input

FORMAT = 1


class OtherFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of file.

    Attributes:
        name: what it is, with its article.
        keys: patterns; some key of a file of this kind has each of them.
        why: why it is not read.
        cure: what to do instead.
        sources: where the keys come from.
    """

    name: str
    keys: list[str]
    why: str
    cure: str
    sources: list[str]

    def key_of(self, names: Iterable[str]) -> str:
        """A key with the first pattern, if all patterns are there; else empty."""
        known = list(names)
        found = [next((name for name in known if re.search(pattern, name)), "") for pattern in self.keys]
        return found[0] if all(found) else ""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    files: list[OtherFile]


@cache
def other_files() -> tuple[OtherFile, ...]:
    """The kinds of files, in the order in which they are tried."""
    installed = Path(__file__).parent / "data" / "other_files.toml"
    path = installed if installed.is_file() else Path(__file__).parents[2] / "spec" / "other_files.toml"
    found = msgspec.toml.decode(read_input(path), type=_Record)
    if found.format != FORMAT:
        raise Malformed(f"format {found.format}, and this version reads format {FORMAT}", path=path, cure="Correct it")
    return tuple(found.files)


def other_file(names: Iterable[str]) -> tuple[OtherFile, str] | None:
    """The kind of a file with these keys, and a key that tells it; None where it is of no known kind."""
    known = list(names)
    return next(((kind, key) for kind in other_files() if (key := kind.key_of(known))), None)
