"""Write an output in a hidden folder, store a record of its inputs with it, and rename the output to its target.

With the record, a second run of the same command recognizes that its output is already complete.

A record has a digest of everything that determines the output (inputs, options, versions), and a fingerprint of every
written file. The record is stored as the extended attribute `user.adapterkit` of the output. This has three advantages.
No file is added to a folder that other tools read. The record is not uploaded with the folder. And one rename moves
both the output and its record to the target. On file systems without extended attributes (NFS before 4.2, FAT,
Windows), the record is a hidden file next to the output. If the record is lost, for example because the output was
copied, a second run does not recognize the output.

The fingerprint of a file of up to 16 MiB is a hash of its content. For a larger file, the fingerprint consists of the
size, the modification time and a hash of the first MiB, which contains the header in most formats. To hash all of a
100 GB model would take minutes, and a file with the same header, size and time in nanoseconds is almost certainly
unchanged. The fingerprint omits the inode number, because network and overlay file systems change it at each mount. A
restarted container must still recognize its output.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import shutil
import stat
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import AdapterkitError, StorageError, UsageError, first_line, storage_error
from .atomic import lock, part_of, sync_folder, write_bytes

ATTRIBUTE = "user.adapterkit"

WHOLE = 16 << 20
"""If a file has at most this many bytes, its fingerprint is a hash of the whole content."""

HEAD = 1 << 20
"""If a file has more than `WHOLE` bytes, its fingerprint hashes only this many bytes at its start."""

LARGEST = 64 << 20
"""The largest record in bytes."""


def fingerprint(file: Path) -> str:
    """Return a short text that changes when the file changes.

    Raises:
        OSError: the file cannot be read.
    """
    with open(file, "rb") as opened:
        status = os.fstat(opened.fileno())
        if status.st_size <= WHOLE:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        return f"{status.st_size} {status.st_mtime_ns} {hashlib.sha256(opened.read(HEAD)).hexdigest()}"


def digest_of(decided: object) -> str:
    """Return a digest of plain data.

    If a record will store the digest, `decided` must contain everything that determines the output.
    """
    return hashlib.sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()


def record_of(made_from: str, files: Mapping[str, Path]) -> bytes:
    """Return the record of an output as bytes.

    Args:
        made_from: the digest of everything that determined the output.
        files: the written files, keyed by their path relative to the folder that contains the output.
    """
    journal = {"made_from": made_from, "files": {name: fingerprint(file) for name, file in files.items()}}
    return zlib.compress(json.dumps(journal, sort_keys=True).encode())


def attach(record: bytes, output: Path, beside: Path) -> None:
    """Store a record with an output.

    Args:
        record: the bytes that `record_of` returned.
        output: the output's file or folder, in the stage or at the target.
        beside: the hidden file to which the record is written if it cannot be stored as an extended attribute.
    """
    try:
        os.setxattr(output, ATTRIBUTE, record)
    except (AttributeError, OSError):
        # The file system does not support extended attributes, or the record is too large for an extended attribute.
        write_bytes(beside, record)
        with contextlib.suppress(AttributeError, OSError):
            os.removexattr(output, ATTRIBUTE)  # An earlier record, which `_read` would prefer.
    else:
        beside.unlink(missing_ok=True)


def has_record(target: Path, beside: Path) -> bool:
    """Whether an output has a record."""
    try:
        return bool(_read(target, beside))
    except OSError:
        return False


def is_finished(target: Path, beside: Path, made_from: str) -> bool:
    """Whether an output has a record with the digest `made_from`, and all its files are unchanged."""
    if not os.path.lexists(target):
        return False
    try:
        record = _journal_of(target, beside)
        files = {target.parent / name: stamp for name, stamp in record["files"].items()}
        same = bool(files) and record["made_from"] == made_from
        return same and all(fingerprint(file) == stamp for file, stamp in files.items())
    except _UNREADABLE:
        return False


def keep_result(target: Path, made_from: str, result: Mapping[str, object]) -> None:
    """Store what a command printed about its output in the output's record, so that a later run prints the same.

    Nothing is stored if the record has another digest than `made_from`, or if the record cannot be written.

    Args:
        target: the path of the output.
        made_from: the digest with which the output was written.
        result: the result as plain data.
    """
    stage = Staging(target)
    try:
        journal = _journal_of(stage.target, stage.record)
        text = json.dumps(journal | {"result": result}, sort_keys=True).encode()
        if journal["made_from"] == made_from and len(text) <= LARGEST:
            attach(zlib.compress(text), stage.target, stage.record)
    except _UNREADABLE:
        return  # The output is complete. Only the details that a repeated run prints are missing.


def kept_result(target: Path) -> dict[str, object]:
    """Return the result that `keep_result` stored with an output, or an empty dict."""
    stage = Staging(target)
    try:
        result = _journal_of(stage.target, stage.record).get("result")
    except _UNREADABLE:
        return {}
    return result if isinstance(result, dict) else {}


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, zlib.error)
"""The errors that a missing or damaged record can raise."""


def _journal_of(target: Path, beside: Path) -> dict[str, Any]:
    # Limit the decompressed size, because a damaged record could inflate to any size.
    journal = json.loads(zlib.decompressobj().decompress(_read(target, beside), LARGEST))
    if not isinstance(journal, dict):
        raise TypeError(type(journal))
    return journal


def _read(target: Path, beside: Path) -> bytes:
    try:
        return os.getxattr(target, ATTRIBUTE)
    except (AttributeError, OSError):
        with open(beside, "rb") as file:
            return file.read(LARGEST)


def listed(files: Iterable[Path]) -> list[list[str]]:
    """Return the names and fingerprints of files, for `digest_of`."""
    return [[file.name, fingerprint(file)] for file in files]


# Build an output in a hidden folder (the stage) next to its target. When the output is complete, rename it to the
# target.
#
# Every command and function that writes an output uses `Staging`, which gives four guarantees:
#
# * Nothing at the target changes until the new output is complete and synced to disk. If the disk is full, a signal
#   arrives or a writer raises an error, the old output stays unchanged.
# * A process that is killed during or just after the renames leaves a journal in the stage. The next run with the same
#   target reads the journal. If the killed process had done all renames, the next run keeps the new output. Otherwise,
#   the next run undoes the renames that were done. It finds the stage, because the stage's name is computed from the
#   target's name.
# * A lock in the stage ensures that only one process writes to a target.
# * Only files and folders are replaced. A device node, pipe or socket is refused, because `rename` would replace it.


OVERWRITE = "Write to another path, or pass --overwrite (in Python overwrite=True)"

WRITING = "writing"
"""Default suffix of a stage's name."""

STAGES = {".writing", ".merging", ".pulling", ".adapterkit"}
"""The names that stages and the record file have inside a target folder that cannot be renamed."""

LONGEST = 200
"""If the target's name has more bytes than this, the stage's name contains a digest of the target's name instead of the
name itself. File systems limit names to 255 bytes."""

Move = tuple[Path, Path]
"""The path of a file in the stage, and its destination."""


class Staging:
    """The hidden folder in which an output is built.

    Args:
        target: the path where the output will appear. A link to a folder is followed; a link to a file is replaced.
        suffix: the end of the hidden folder's name. Each kind of work, such as merging or pulling, has its own suffix.
        noun: the noun in the error `another <noun> is writing here`, such as `process` or `merge`.
    """

    def __init__(self, target: Path, suffix: str = WRITING, noun: str = "process") -> None:
        self.target, self.noun = settled(target), noun
        # A target folder cannot be renamed if it is a mount point, or if its parent folder is read-only. In this case,
        # build the output inside the target folder.
        self.inside = self.target.is_dir() and (
            os.path.ismount(self.target) or not os.access(self.target.parent, os.W_OK | os.X_OK)
        )
        self.place = self.target if self.inside else self.target.parent
        self.folder = self.place / (f".{suffix}" if self.inside else hidden_name(self.target.name, suffix))
        self.out = self.folder / "out"
        self.record = self.place / (".adapterkit" if self.inside else hidden_name(self.target.name, "adapterkit"))
        self._journal = self.folder / "publishing"
        self._replaced = self.folder / "replaced"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the stage for this process. If a killed run left unfinished renames, undo them before the block starts.

        Raises:
            StorageError: another process is writing to the same target, or the stage cannot be written.
        """
        created = [folder for folder in self.folder.parents if not folder.exists()]
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            if self.folder.is_symlink():  # Refuse a link, because clearing the folder could delete a user's files.
                why = "adapterkit needs a folder with this name for its work, but the path is a symbolic link"
                raise StorageError(why, path=self.folder, cure="Remove the link")
            with self._open_lock() as lock:
                self._hold(lock.fileno())
                self.recover()
                yield
        except OSError as error:
            raise storage_error(error, error.filename or self.target) from error
        finally:
            remove_empty(self.folder, *created)

    def has_record(self) -> bool:
        """Whether the target has a record."""
        return has_record(self.target, self.record)

    def is_finished(self, made_from: str) -> bool:
        """Whether the target has a record with the digest `made_from`, and has not changed since."""
        return is_finished(self.target, self.record, made_from)

    @property
    def is_published(self) -> bool:
        """Whether an earlier run has moved all files to the target, and only the cleanup of its stage remains."""
        moves = self._journaled()
        return bool(moves) and not any(_exists(staged) for staged, _ in moves) and _exists(moves[-1][1])

    def publish(
        self, moves: Sequence[Move], gone: Iterable[Path] = (), *, durable: bool = False, record: bytes | None = None
    ) -> None:
        """Move staged files to their destinations: all of them or none.

        Args:
            moves: (staged path, destination) pairs. The main file or folder is last. The old main file is moved away
                first and the new one arrives last, so that nobody reads the main file of one output with the files of
                another.
            gone: other files of the old output that must be removed.
            durable: True if the staged files are already synced to disk.
            record: the record of the output, from `record_of`. It is stored with the main file or folder.

        Raises:
            OSError: a rename failed, and the old output was restored.
        """
        if not durable:
            _sync(staged for staged, _ in moves)
        old = [end for _, end in reversed(moves) if _exists(end)] + [path for path in gone if _exists(path)]
        if len(moves) == 1 and old == [moves[0][1]] and not moves[0][0].is_dir() and not old[0].is_dir():
            old = []  # One rename replaces the old file by the new one, so readers always find one of the two files.
        kept = [(self._kept(path, old), path) for path in old]
        if record is not None:
            # Attach the record before the renames. If the process is killed after the last rename, the output has its
            # record. If the process is killed earlier, a later run ignores the record, because a file that the record
            # lists is missing or has another fingerprint.
            attach(record, self.target if self.inside else moves[-1][0], self.record)
        remove(self._replaced)
        self._write_journal(moves, kept)
        try:
            for place, path in kept:
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
            for staged, end in moves:
                end.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged, end)
            for folder in {end.parent for _, end in moves}:
                sync_folder(folder)
        except BaseException:
            self.recover()
            raise

    def set_aside(self) -> None:
        """Link or copy the target file into the stage, so that `recover` can restore the file.

        Call this before the target is overwritten.
        """
        kept = self.folder / "before"
        old = [(kept, self.target)] if _exists(self.target) else []
        if old:
            link(str(self.target), str(kept))
        # The journal lists the lock file as a file to move, but the lock file is never moved. So until `keep_new`
        # removes the journal, `recover` regards the moves as unfinished and restores the old file.
        self._write_journal([(self.folder / "lock", self.folder), (self.folder / "undone", self.target)], old)

    def keep_new(self, made_from: str | None, files: Iterable[Path]) -> None:
        """Accept the output that was written after `set_aside`, so that `recover` no longer restores the old file."""
        if made_from is not None:
            written = {str(file.relative_to(self.place)): file for file in files}
            attach(record_of(made_from, written), self.target, self.record)
        self._journal.unlink()

    def recover(self) -> None:
        """Undo the renames of a killed run, unless the run had done all of its renames. In that case, change nothing.

        Raises:
            StorageError: the old output cannot be moved back. The old output stays in the stage.
        """
        moves = self._journaled()
        if not moves or self.is_published:
            return
        try:
            for staged, end in reversed(moves):
                if not _exists(staged) and _exists(end):
                    os.replace(end, staged)
            for kept, path in reversed(self._journaled("old")):
                if _exists(kept) and not _exists(path):
                    os.replace(kept, path)
            self._journal.unlink()
        except OSError as error:
            kept_at = next((kept for kept, _ in self._journaled("old") if _exists(kept)), self.folder)
            why = f"the previous output is in {kept_at} and cannot be moved back ({error.strerror})"
            cure = f"Move the previous output to {self.target}, then run the same command again"
            raise StorageError(why, path=self.target, cure=cure) from error

    def discard(self, keep: Collection[str] = ()) -> None:
        """Remove the stage. If the old output was moved away and not replaced, first move it back.

        Args:
            keep: the names of files in the stage that are removed last. If this process is killed before that, a later
                run reads these files to find out how far this run got.
        """
        try:
            self._remove(keep)
        except KeyboardInterrupt:  # The user interrupted the cleanup. Finish it before raising the interrupt again.
            self._remove(keep)
            raise

    def _remove(self, keep: Collection[str]) -> None:
        try:
            self.recover()
        except StorageError:
            return  # Keep the stage: it has the only copy of the old output.
        part_of(self.target).unlink(missing_ok=True)  # A killed run may have left the temporary file of `replacing`.
        with contextlib.suppress(OSError):
            clear(self.folder, keep={"lock", self._journal.name, *keep})
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kept(self, path: Path, old: Sequence[Path]) -> Path:
        """Return the path in the stage at which a file or folder of the old output is kept during the renames."""
        return self._replaced if len(old) == 1 else self._replaced / os.path.relpath(path, self.place)

    def _write_journal(self, moves: Iterable[Move], old: Iterable[Move]) -> None:
        journal = {
            key: [[os.path.relpath(inside, self.folder), os.path.relpath(end, self.place)] for inside, end in pairs]
            for key, pairs in (("moves", moves), ("old", old))
        }
        write_bytes(self._journal, json.dumps(journal).encode())

    def _journaled(self, key: str = "moves") -> list[Move]:
        try:
            moves = json.loads(self._journal.read_bytes())[key]
        except (OSError, ValueError, TypeError, KeyError):  # If there is no journal, no rename was started.
            return []
        return [(self.folder / inside, self.place / end) for inside, end in moves]

    def _open_lock(self) -> BinaryIO:
        try:
            return open(self.folder / "lock", "wb")
        except FileNotFoundError:  # Another process has just finished, and removed the stage.
            raise self._taken() from None

    def _hold(self, handle: int) -> None:
        if not lock(handle):
            raise self._taken()
        try:
            same = os.path.samestat(os.fstat(handle), os.stat(self.folder / "lock"))
        except FileNotFoundError:
            same = False
        if not same:
            # The previous holder removed the lock file after this process had opened it. A lock on a removed file does
            # not keep other processes out.
            raise self._taken()

    def _taken(self) -> StorageError:
        why = f"another {self.noun} is writing here"
        cure = f"Wait until the other {self.noun} ends, or write to another path"
        return StorageError(why, path=self.target, cure=cure)


@contextlib.contextmanager
def staged(
    target: Path,
    *,
    overwrite: bool = True,
    owns: Collection[str] | None = (),
    inputs: Iterable[Path] = (),
    made_from: str | None = None,
) -> Iterator[Path]:
    """Yield a path to write to; when the block ends, the written output replaces `target`.

    The path has the target's name. Files that are written next to the path are moved next to the target. If `target` is
    an existing folder, the path is an empty folder. After an error, all written files are removed and the target is
    unchanged.

    An existing folder may have files that the new output lacks. Old and new files of an output must not mix, but a
    README, a tokenizer or notes must not be lost. So `owns` lists name patterns for the files that belong to an output.
    Old files that match a pattern are removed, and all other old files are kept.

    Args:
        target: a file or a folder.
        overwrite: replace an existing `target`.
        owns: name patterns for the files in a folder that belong to the output; None means all files.
        inputs: the files that the output is made from. They are never replaced.
        made_from: a digest of everything that determines the output. It is stored in the record of the output, so that
            a later run with the same digest sees that the output is complete.

    Raises:
        StorageError: the target exists, and `overwrite` is not set; the target is neither a file nor a folder; another
            process is writing to the target; or the disk is full.
        UsageError: the output would replace a file that belongs to another output, or one of its own inputs.
    """
    inputs = list(inputs)
    take_over(target)
    check_free(target, overwrite)
    check_inputs(replaced_at(target, owns), inputs)
    stage = Staging(target)
    with stage.locked():
        try:
            check_free(stage.target, overwrite)
            clear(stage.folder, keep={"lock"})
            stage.out.mkdir()
            path = stage.out / stage.target.name
            if stage.target.is_dir():
                path.mkdir()
            yield path
            moves, gone = _planned(stage, path, owns, overwrite)
            check_inputs([*(end for _, end in moves), *gone, *replaced_at(stage.target, owns, path)], inputs)
            record = None
            if made_from is not None and moves:
                written = {str(file.relative_to(stage.out)): file for file in files_below(stage.out)}
                record = record_of(made_from, written)
            if path.is_dir() and stage.target.is_dir() and not stage.inside:
                _keep(stage.target, path, owns)
            stage.publish(moves, gone, record=record)
        except OSError as error:
            raise storage_error(error, _outside(stage, error.filename)) from error
        except AdapterkitError as error:
            error.path = _outside(stage, error.path)
            raise
        finally:
            stage.discard()


def take_over(target: Path, suffix: str = WRITING) -> None:
    """Undo the unfinished renames of a killed run at a target, and remove its stage. If there is no stage, do nothing.

    Raises:
        StorageError: another process is writing to the target.
    """
    stage = Staging(target, suffix)
    if stage.folder.is_dir():
        with stage.locked():
            stage.discard()


def unwritten(error: Exception, path: Path) -> StorageError:
    """Return a StorageError for a failed write to `path`.

    Call this if the write was done by a library that raises its own error instead of an OSError.
    """
    free = shutil.disk_usage(path.parent).free
    why = f"the file could not be written ({first_line(error)}); {free:,} bytes are free"
    return StorageError(why, path=path, cure="Free some space, raise 'ulimit -f', or write to another disk")


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is an empty folder or `overwrite` is set.

    Raises:
        StorageError: the target exists and is neither a file nor a folder; or it exists, and `overwrite` is not set.
    """
    try:
        mode = os.stat(target).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            why = "the path is neither a file nor a folder, so it is not replaced"
            raise StorageError(why, path=target, cure="Write to another path")
        taken = not stat.S_ISDIR(mode) or bool({*os.listdir(target)} - STAGES)
    except (FileNotFoundError, NotADirectoryError):
        taken = os.path.lexists(target)
    except OSError as error:
        raise storage_error(error, target) from error
    if taken and not overwrite:
        raise StorageError("already there", path=target, cure=OVERWRITE)


def settled(target: Path) -> Path:
    """Return the path to which an output for `target` is renamed. If `target` is a folder, resolve links and `.`."""
    return Path(os.path.realpath(target)) if target.is_dir() or target.name in ("", "..") else target


def hidden_name(name: str, suffix: str) -> str:
    """Return the hidden name for a target's name.

    The same arguments always give the same hidden name. The name is short enough for any file system.
    """
    if len(os.fsencode(name)) > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}.{suffix}"


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove everything in a folder except the given names."""
    for entry in folder.iterdir():
        if entry.name not in keep:
            remove(entry)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link if it exists; the target of a link is kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_empty(*folders: Path) -> None:
    """Remove the given folders if they are empty. Pass a folder before the folder that contains it."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _outside(stage: Staging, path: str | None) -> str:
    """For error messages, return the path at the target that corresponds to a path in the stage."""
    return str(stage.target) if path is None else str(path).replace(str(stage.out), str(stage.target.parent))


def check_inputs(replaced: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse to replace an input file. Inodes are compared, so a link to an input is recognized.

    Raises:
        UsageError: an output would replace a file that is also an input.
    """
    read = {identity: file for file in inputs if (identity := _identity(file)) is not None}
    for path in replaced if read else ():
        file = read.get(_identity(path) or (-1, -1))
        if file is not None:
            why = f"source and destination are the same file: the output would replace its input {file}"
            raise UsageError(why, path=path, cure="Write to another path")


def check_beside(place: Path, sources: Iterable[Path], mark: bytes) -> None:
    """Refuse to replace a file of a source, for outputs that describe the source and may lie in its folder.

    An earlier output of the same kind may be replaced.

    Args:
        place: the file to write.
        sources: the files and folders that are read.
        mark: bytes in the first 200 bytes of every output of this kind; a file that contains them may be replaced.

    Raises:
        UsageError: the output would replace another file of a source.
    """
    if not place.is_file():
        return
    with open(place, "rb") as file:
        if mark in file.read(200):
            return
    for source in sources:
        check_inputs([place], files_below(source) if source.is_dir() else [source])


def replaced_at(target: Path, owns: Collection[str] | None, new: Path | None = None) -> Iterator[Path]:
    """Yield the paths that an output replaces at its target.

    If the target is a folder, these are the old files that match `owns`, and the paths of the new files.

    Args:
        target: the target; it need not exist.
        owns: as for `staged`.
        new: the new output, if it has been written already.
    """
    if not target.is_dir():
        yield target
        return
    for entry in target.iterdir():
        if _owned(entry.name, owns):
            yield from files_below(entry) if entry.is_dir() and not entry.is_symlink() else [entry]
    if new is not None and new.is_dir():
        yield from (target / file.relative_to(new) for file in files_below(new))


def is_within(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or is inside `outer`. Inodes are compared, so links and mounts are recognized."""
    there = _identity(outer)
    if there is None:
        return inner.resolve() == outer.resolve()
    real = inner.resolve()
    return _identity(inner) == there or (outer.is_dir() and any(_identity(path) == there for path in real.parents))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _planned(
    stage: Staging, path: Path, owns: Collection[str] | None, overwrite: bool
) -> tuple[list[Move], list[Path]]:
    """Return the moves of the staged files, and the files of the old output that must be removed as well."""
    target = stage.target
    if path.is_dir() and target.exists() and not target.is_dir():
        raise StorageError(
            "the output is a folder, but the target is a file", path=target, cure="Remove it, or write to another path"
        )
    gone: list[Path] = []
    if path.is_dir() and stage.inside:
        moves = [(entry, target / entry.name) for entry in sorted(path.iterdir())]
        others = [entry for entry in target.iterdir() if entry != stage.folder and not _exists(path / entry.name)]
        gone = [entry for entry in others if _owned(entry.name, owns)]
    elif path.is_dir():
        moves = [(path, target)]
    else:
        moves = [(path, target)] if _exists(path) else []
    if not stage.inside:
        beside = [file for file in files_below(stage.out) if path not in (file, *file.parents)]
        sides = [(file, stage.place / file.relative_to(stage.out)) for file in beside]
        for file, end in sides:
            _check_beside(file, end, target, overwrite)
        moves = [*sides, *moves]
    return moves, gone


def _check_beside(file: Path, end: Path, target: Path, overwrite: bool) -> None:
    """Check whether `file` may be moved to `end`, next to the target.

    An old file there may belong to another output: several formats store a number such as alpha in a file with a fixed
    name next to their tensors. So an old file with other contents is replaced only if `overwrite` is set and the target
    exists.
    """
    if not _exists(end) or (end.is_file() and end.read_bytes() == file.read_bytes()):
        return
    if not overwrite:
        raise StorageError("the file exists and has other contents", path=end, cure=OVERWRITE)
    if not _exists(target):
        why = f"the file exists and has other contents: it belongs to a file other than {target.name}"
        raise UsageError(why, path=end, cure="Write to another folder")


def _keep(old: Path, new: Path, owns: Collection[str] | None) -> None:
    """Add the old files that do not match `owns` to the new folder.

    The files are added as hard links if possible, otherwise as copies.
    """
    for entry in old.iterdir():
        if not _exists(new / entry.name) and not _owned(entry.name, owns):
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=link)
            else:
                link(str(entry), str(new / entry.name))


def _owned(name: str, owns: Collection[str] | None) -> bool:
    return owns is None or matches(name, owns)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name matches any of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def link(source: str, target: str) -> str:
    """Create a hard link to a file, or a copy if hard links are impossible. Copy a symbolic link as a symbolic link."""
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return target
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copy2(source, target)
    return target


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, in order of their names."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            yield from files_below(entry)
        else:
            yield entry


def _sync(paths: Iterable[Path]) -> None:
    """Sync files, and all files in folders, to disk."""
    for path in paths:
        if path.is_symlink():
            continue
        if path.is_dir():
            _sync(path.iterdir())
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _exists(path: Path) -> bool:
    return os.path.lexists(path)
