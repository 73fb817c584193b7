"""Compute checksums of files while they are written, and compare files with recorded checksums.

A file consists of runs of consecutive bytes, which the workers may write in any order. So each run has its own sha256,
and a file's checksum is the sha256 over the checksums of its runs, in file order. Checksums are computed from the bytes
in memory, and stored in the output's record. With the checksums, the damaged runs of a file can be found later without
the base. A file that is copied unchanged from the base has no checksums.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import Malformed, UsageError, storage_error
from ..io.direct import CHUNK, read_all
from .companions import REPORT

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue

Run = tuple[int, int, str]
"""(offset of a run in its file, number of bytes, sha256 of the bytes)."""

KEY = "written"
"""The key of the checksums in the record."""


def record_of(runs: Iterable[Run]) -> dict[str, JsonValue]:
    """Return the checksums of one file as plain data for the output's record."""
    ordered = sorted(runs)
    return {"sha256": over(ordered), "runs": [list(run) for run in ordered]}


def over(runs: Iterable[Run]) -> str:
    """Return the checksum of a file, computed from the checksums of its runs."""
    return sha256(b"".join(bytes.fromhex(digest) for _, _, digest in runs)).hexdigest()


def digest_of(file: BinaryIO, start: int, nbytes: int) -> str:
    """Return the sha256 of a run of an open, unbuffered file.

    Raises:
        EOFError: the file ends early.
    """
    digest, buffer = sha256(), memoryview(bytearray(min(CHUNK, nbytes)))
    file.seek(start)
    while nbytes:
        piece = buffer[:nbytes]
        read_all(file, piece)
        digest.update(piece)
        nbytes -= len(piece)
    return digest.hexdigest()


def wrong_runs(path: Path, runs: list[Run]) -> list[str]:
    """Compare each run of bytes of a file with its recorded checksum, and return a message for each difference.

    If the file is missing or has the wrong size, return a single message that reports this.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            end = sum(nbytes for _, nbytes, _ in runs)
            size = path.stat().st_size
            if size != end:
                return [f"the file has {size:,} bytes, but {end:,} bytes were written"]
            return [
                f"bytes {start:,} to {start + nbytes:,} differ from the bytes that were written"
                for start, nbytes, digest in runs
                if digest_of(file, start, nbytes) != digest
            ]
    except FileNotFoundError:
        return ["missing"]
    except OSError as error:
        raise storage_error(error, path) from error


def recorded(folder: Path) -> dict[str, list[Run]]:
    """Return the checksums in an output's record: a map from file names to runs, which are in order and without gaps.

    Raises:
        UsageError: the folder has no record, or the record has no checksums.
        Malformed: the record is damaged.
    """
    path = folder / REPORT
    cure = "To recompute the merge instead, pass --base BASE (base=), and --adapter A (adapters=) for each adapter"
    try:
        sums = json.loads(path.read_text()).get(KEY)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError("the output has no merge record, so it has no checksums", path=path, cure=cure) from None
    except OSError as error:
        raise storage_error(error, path) from error
    except (ValueError, AttributeError) as error:
        raise Malformed(f"the file is not a record of a merge ({error})", path=path, cure=cure) from None
    if sums is None:
        raise UsageError("the record has no checksums", path=path, cure=cure)
    try:
        return {_plain(name): _runs(file) for name, file in sums.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Malformed(f"the checksums are damaged ({error})", path=path, where=KEY, cure=cure) from None


def _plain(name: str) -> str:
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not a file name")
    return name


def _runs(file: Mapping[str, Any]) -> list[Run]:
    runs, end = [(int(start), int(nbytes), str(digest)) for start, nbytes, digest in file["runs"]], 0
    for start, nbytes, _ in runs:
        if start != end or nbytes < 0:
            raise ValueError(f"a run begins at byte {start} instead of byte {end}, or has a negative length")
        end = start + nbytes
    if over(runs) != file["sha256"]:
        raise ValueError("the sha256 of the file does not match the checksums of its runs")
    return runs
