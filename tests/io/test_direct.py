"""Writing past the page cache: whatever the sizes and places, the bytes of a file are those that plain writes give."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterkit.io import direct
from adapterkit.io.direct import DEPTH, PAGE, PIECE, Writer

DIRECT = getattr(os, "O_DIRECT", 0)

pytestmark = pytest.mark.skipif(not DIRECT, reason="only Linux opens files so")

SIZE = (DEPTH + 3) * PIECE + 12345
BYTES = random.Random(7).randbytes(SIZE)
CUTS = {
    "small": [0, 1, 5, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 17, 9 * PAGE],
    "pages": list(range(0, 200 * PAGE, 25 * PAGE)),
    "pieces": [7, 7 + PIECE, 7 + 2 * PIECE, SIZE],
    "large": [100, SIZE - 5, SIZE],
    "blocks": [*range(8, SIZE, 786_432), SIZE],
}


def invalid(*_: object) -> OSError:
    return OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.fixture(params=["can", "cannot open", "cannot write"])
def _disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems: one that can; one that refuses to open a file so; one that then refuses to write."""
    opening, writing = os.open, direct.write_all

    def refuse_to_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & DIRECT:
            raise invalid()
        return opening(path, flags, *rest, **options)

    def refuse_to_write(file: Any, data: memoryview) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & DIRECT:
            raise invalid()
        writing(file, data)

    if request.param == "cannot open":
        monkeypatch.setattr(os, "open", refuse_to_open)
    if request.param == "cannot write":
        monkeypatch.setattr(direct, "write_all", refuse_to_write)


def through_room(writer: Writer, data: bytes) -> None:
    writer.room(len(data))[:] = data
    writer.filled(len(data))


def written(path: Path, cuts: Sequence[int], order: Sequence[int], *, one_run: bool) -> bytes:
    """A file of zeros into which the ranges between cuts are written, in an order, in runs of their own or in one."""
    path.write_bytes(bytes(SIZE))
    with closing(Writer()) as writer:
        if one_run:
            writer.begin(str(path), cuts[0])
        for number in order:
            start, stop = cuts[number], cuts[number + 1]
            if not one_run:
                writer.finish()
                writer.begin(str(path), start)
            through_room(writer, BYTES[start:stop])
        writer.finish().result()
    return path.read_bytes()


@pytest.mark.usefixtures("_disk")
@pytest.mark.parametrize("name", CUTS)
def test_runs_one_behind_another_and_in_any_order(tmp_path: Path, name: str) -> None:
    cuts = CUTS[name]
    expected = bytes(cuts[0]) + BYTES[cuts[0] : cuts[-1]] + bytes(SIZE - cuts[-1])
    order = list(range(len(cuts) - 1))
    assert written(tmp_path / "one", cuts, order, one_run=True) == expected
    random.Random(3).shuffle(order)
    assert written(tmp_path / "apart", cuts, order, one_run=False) == expected


@pytest.mark.usefixtures("_disk")
@pytest.mark.parametrize(("start", "at"), [(0, 0), (PAGE, 2 * PAGE), (100, PAGE + 100), (3, 0), (0, 11)])
def test_bytes_of_another_file(tmp_path: Path, start: int, at: int) -> None:
    source, target, taken = tmp_path / "source", tmp_path / "target", list[int]()
    source.write_bytes(BYTES)
    target.write_bytes(bytes(SIZE + PIECE))
    count = SIZE - start - 77
    with closing(Writer()) as writer, open(source, "rb", buffering=0) as file:
        writer.begin(str(target), at)
        through_room(writer, b"before")
        writer.copy(file, start, count, taken.append)
        through_room(writer, b"behind")
        writer.finish().result()
        with pytest.raises(EOFError):
            writer.copy(file, SIZE - 5, 6)
    assert target.read_bytes()[: at + count + 12] == bytes(at) + b"before" + BYTES[start : start + count] + b"behind"
    assert sum(taken) == count


def test_what_cannot_be_written_is_told_and_nothing_is_written_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: object, _data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    with closing(Writer()) as writer:
        writer.begin(str(path), 0)
        with monkeypatch.context() as patch:
            patch.setattr(direct, "write_all", full)
            through_room(writer, BYTES[: 2 * PAGE])
            assert writer.finish().exception().errno == errno.ENOSPC  # type: ignore[union-attr]
        writer.begin(str(path), PIECE)
        through_room(writer, BYTES[: 2 * PAGE])
        assert writer.finish().exception().errno == errno.ENOSPC  # type: ignore[union-attr]
        with pytest.raises(OSError, match="space"):
            writer.write(memoryview(BYTES))
    assert path.read_bytes() == bytes(SIZE)


def test_memory_does_not_grow_with_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with closing(Writer()) as writer:
        writer.begin(str(path), 0)
        for _ in range(4 * DEPTH):
            through_room(writer, BYTES[:PIECE])
        assert len(writer.sent) + len(writer.idle) + 1 == DEPTH + 1
        through_room(writer, BYTES[: 2 * PIECE])
        assert not writer.sent
        writer.finish().result()
    assert path.stat().st_size == (4 * DEPTH + 2) * PIECE
