"""Write an output in a hidden folder, rename it into place, and store a record of its inputs with it.

The record describes how an output was made, so that a second run of the same command finds the output complete.

A record holds a digest of everything that determines the output (inputs, options, versions), and a fingerprint of every
file written. It is stored as an extended attribute of the output, `user.adapterkit`. So the record adds no file to a
folder that other tools read, and is not uploaded with the folder. It also moves into place with the output, in the same
rename. On file systems without extended attributes (NFS before 4.2, FAT, Windows) the record is a hidden file next to
the output. If a record gets lost, for example because the output was copied, the output is not recognised as complete.

The fingerprint of a file of up to 16 MiB is a hash of its content. For a larger file it consists of the size, the
modification time and a hash of the first MiB, where formats have their headers. Reading a model of 100 GB again would
take minutes, and a file with the same header, size and time in nanoseconds was not rewritten. The fingerprint omits the
inode number: network and overlay file systems change it at a mount, and a restarted container must know its output.
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
from typing import BinaryIO

from ..errors import AdapterkitError, StorageError, UsageError, first_line, storage_error
from .atomic import lock, part_of, sync_folder, write_bytes

ATTRIBUTE = "user.adapterkit"

WHOLE = 16 << 20
"""Files up to this many bytes are fingerprinted by their whole content."""

HEAD = 1 << 20
"""Number of bytes of a larger file that are hashed."""

LARGEST = 1 << 20
"""Size limit for reading a record, in bytes."""


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
    """Return one digest of plain data, which should be everything that determines an output."""
    return hashlib.sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()


def record_of(made_from: str, files: Mapping[str, Path]) -> bytes:
    """Return the record of an output.

    Args:
        made_from: the digest of everything that decided the output.
        files: name relative to the output's folder -> the written file.
    """
    told = {"made_from": made_from, "files": {name: fingerprint(file) for name, file in files.items()}}
    return zlib.compress(json.dumps(told, sort_keys=True).encode())


def attach(record: bytes, output: Path, beside: Path) -> None:
    """Store a record with an output.

    Args:
        record: the record.
        output: the file or folder, staged or in place.
        beside: the path of the hidden file to write if the file system has no extended attributes.
    """
    try:
        os.setxattr(output, ATTRIBUTE, record)
    except (AttributeError, OSError):  # There are no extended attributes, or there is no room.
        write_bytes(beside, record)
    else:
        beside.unlink(missing_ok=True)


def has_record(target: Path, beside: Path) -> bool:
    """Whether a record is stored with an output."""
    try:
        return bool(_read(target, beside))
    except OSError:
        return False


def is_finished(target: Path, beside: Path, made_from: str) -> bool:
    """Whether an output has a record with this digest, and all its files are unchanged."""
    if not os.path.lexists(target):
        return False
    try:
        # Limit the decompressed size, because a damaged record could inflate to any size.
        record = json.loads(zlib.decompressobj().decompress(_read(target, beside), LARGEST))
        files = {target.parent / name: told for name, told in record["files"].items()}
        same = bool(files) and record["made_from"] == made_from
        return same and all(fingerprint(file) == told for file, told in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return False


def _read(target: Path, beside: Path) -> bytes:
    try:
        return os.getxattr(target, ATTRIBUTE)
    except (AttributeError, OSError):
        with open(beside, "rb") as file:
            return file.read(LARGEST)


def listed(files: Iterable[Path]) -> list[list[str]]:
    """Return the names and fingerprints of files, for `digest_of`."""
    return [[file.name, fingerprint(file)] for file in files]


# Output that appears by rename: it is built in a hidden folder next to its target and swapped in when complete.
#
# Every command and function that writes an output uses `Staging`, which gives four guarantees:
#
# * Nothing at the target changes until the new output is complete and durable. A full disk, a signal or an error in a
#   writer leaves the old output in place.
# * A process that is killed between two renames leaves a journal. The next run at the same target reads the journal,
# and undoes or finishes the publication. The next run finds the folder, because the folder's name is derived from the
# target's name.
# * A lock in the folder lets only one process at a time write to a target.
# * Only files and folders are replaced. Device nodes, pipes and sockets are refused: `rename` would replace them.


OVERWRITE = "Write to another path, or pass --overwrite (in Python overwrite=True)"

WRITING = "writing"
"""Default suffix of a stage's name."""

STAGES = {".writing", ".merging", ".pulling", ".adapterkit"}
"""Names of the stages and the record inside a target folder that cannot be renamed."""

LONGEST = 200
"""Most bytes of the target's name that the stage's name repeats; file systems allow 255 bytes for the whole name."""

Move = tuple[Path, Path]
"""(a path in the stage, its destination)."""


class Staging:
    """The hidden folder in which one output is built.

    Args:
        target: the path where the output will appear. A link to a folder is followed; a link to a file is replaced.
        suffix: the end of the hidden folder's name; each kind of work has its own.
        noun: the name for another process that holds the lock, in messages.
    """

    def __init__(self, target: Path, suffix: str = WRITING, noun: str = "process") -> None:
        self.target, self.noun = settled(target), noun
        # Build inside the target if it cannot be renamed: it is a mount point, or its parent folder is read-only.
        self.inside = self.target.is_dir() and not _can_rename(self.target)
        self.place = self.target if self.inside else self.target.parent
        self.folder = self.place / (f".{suffix}" if self.inside else hidden_name(self.target.name, suffix))
        self.out = self.folder / "out"
        self.record = self.place / (".adapterkit" if self.inside else hidden_name(self.target.name, "adapterkit"))
        self._journal = self.folder / "publishing"
        self._replaced = self.folder / "replaced"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the stage for this process; undo a publication that a killed run left unfinished.

        Raises:
            StorageError: another process is writing to the same target, or the stage cannot be written.
        """
        made = [folder for folder in self.folder.parents if not folder.exists()]
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            if self.folder.is_symlink():  # Clearing it could delete a user's files.
                raise StorageError("a link has the name of the work folder", path=self.folder, cure="Remove the link")
            with self._open_lock() as held:
                self._hold(held.fileno())
                self.recover()
                yield
        except OSError as error:
            raise storage_error(error, error.filename or self.target) from error
        finally:
            remove_empty(self.folder, *made)

    def has_record(self) -> bool:
        """Whether a record is stored with the target."""
        return has_record(self.target, self.record)

    def is_finished(self, made_from: str) -> bool:
        """Whether the target has a record with this digest, and is unchanged since."""
        return is_finished(self.target, self.record, made_from)

    @property
    def is_published(self) -> bool:
        """Whether an earlier run moved everything into place, so that only its stage is left."""
        moves = self._journaled()
        return bool(moves) and not any(_exists(staged) for staged, _ in moves) and _exists(moves[-1][1])

    def publish(
        self, moves: Sequence[Move], gone: Iterable[Path] = (), *, durable: bool = False, record: bytes | None = None
    ) -> None:
        """Move staged files to their destinations: all of them or none.

        Args:
            moves: (staged path, destination) pairs, the main file last. The old main file moves away first and the new
                one arrives last, so no reader sees it together with other files of another output.
            gone: further files of the old output to remove.
            durable: True if the staged files are already synced to disk.
            record: the digest of everything that determines the output. It is stored with the main file or folder.

        Raises:
            OSError: a rename failed; the old output is back in place.
        """
        if not durable:
            _sync(staged for staged, _ in moves)
        old = [end for _, end in reversed(moves) if _exists(end)] + [path for path in gone if _exists(path)]
        if len(moves) == 1 and old == [moves[0][1]] and not moves[0][0].is_dir() and not old[0].is_dir():
            old = []  # One rename replaces the old file by the new file, so readers always find one of the two.
        kept = [(self._kept(path, old), path) for path in old]
        if record is not None:
            # Attach before the renames. If the process is killed after the last rename, the output has its record.
            # If it is killed before, the record lists files that do not exist, and is ignored.
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
        """Keep a copy of the target file for `recover`; for outputs that can only be written in place."""
        kept = self.folder / "before"
        old = [(kept, self.target)] if _exists(self.target) else []
        if old:
            link(str(self.target), str(kept))
        # Journal the lock file: it never moves, so this publication always counts as unfinished.
        self._write_journal([(self.folder / "lock", self.folder), (self.folder / "undone", self.target)], old)

    def keep_new(self, made_from: str | None, files: Iterable[Path]) -> None:
        """Accept the output that was written in place, and drop the copy that `set_aside` kept."""
        if made_from is not None:
            written = {str(file.relative_to(self.place)): file for file in files}
            attach(record_of(made_from, written), self.target, self.record)
        self._journal.unlink()

    def recover(self) -> None:
        """Undo an unfinished publication; keep a finished one.

        Raises:
            StorageError: the old output cannot be moved back; it stays in the stage.
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
            why = f"the previous output lies in {self._replaced} and cannot be moved back ({error.strerror})"
            cure = "Move it back yourself, then run the same command again"
            raise StorageError(why, path=self.target, cure=cure) from error

    def discard(self, keep: Collection[str] = ()) -> None:
        """Remove the stage; first move back an old output that was moved away.

        Args:
            keep: names in the stage to remove last; a later run reads its progress from these files.
        """
        try:
            self._remove(keep)
        except KeyboardInterrupt:  # The user interrupted the cleanup; finish it before raising.
            self._remove(keep)
            raise

    def _remove(self, keep: Collection[str]) -> None:
        try:
            self.recover()
        except StorageError:
            return  # Keep the stage: it holds the only copy of the old output.
        part_of(self.target).unlink(missing_ok=True)  # An output that was written in place may have left this copy.
        with contextlib.suppress(OSError):
            clear(self.folder, keep={"lock", self._journal.name, *keep})
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kept(self, path: Path, old: Sequence[Path]) -> Path:
        """Return the path at which a part of the old output is kept until the new output is in place."""
        return self._replaced if len(old) == 1 else self._replaced / os.path.relpath(path, self.place)

    def _write_journal(self, moves: Iterable[Move], old: Iterable[Move]) -> None:
        told = {
            key: [[os.path.relpath(inside, self.folder), os.path.relpath(end, self.place)] for inside, end in pairs]
            for key, pairs in (("moves", moves), ("old", old))
        }
        write_bytes(self._journal, json.dumps(told).encode())

    def _journaled(self, key: str = "moves") -> list[Move]:
        try:
            found = json.loads(self._journal.read_bytes())[key]
        except (OSError, ValueError, TypeError, KeyError):  # There is no journal: nothing was being published.
            return []
        return [(self.folder / inside, self.place / end) for inside, end in found]

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
        if not same:  # The process that held the lock finished and removed the file after this process had opened it.
            raise self._taken()

    def _taken(self) -> StorageError:
        why, cure = f"another {self.noun} is writing here", "Wait for it, or write elsewhere"
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

    The path has the target's name. Files written next to it end up next to the target. If `target` is a folder, the
    path is an empty folder. After an error, nothing is left behind and the target is unchanged.

    A replaced folder may hold files that the new output lacks: a README, a tokenizer, notes. Old and new files of an
    output must not mix, and no other file may be lost. So `owns` lists name patterns of the files that belong to such
    an output. Old files that match are removed, and all others are kept.

    Args:
        target: a file or a folder.
        overwrite: replace an existing `target`.
        owns: name patterns of files in a folder that belong to the output; None means all files.
        inputs: the files that the output is made from; they are never replaced.
        made_from: a digest of everything that decides the output; a later run compares it to find the output finished.

    Raises:
        StorageError: the target exists, or is not a file or folder; another process is writing there; the disk is full.
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
    """Restore or remove the remains of a killed run at a target; does nothing if it has no stage.

    Raises:
        StorageError: another process is writing there.
    """
    stage = Staging(target, suffix)
    if stage.folder.is_dir():
        with stage.locked():
            stage.discard()


def unwritten(error: Exception, path: Path) -> StorageError:
    """Return the error for a failed write to `path`, if another library hides the OSError."""
    free = shutil.disk_usage(path.parent).free
    why = f"the file could not be written ({first_line(error)}); {free:,} bytes are free"
    return StorageError(why, path=path, cure="Free some space, raise the limit of file sizes, or write elsewhere")


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists.

    Raises:
        StorageError: the target is neither a file nor a folder, or it exists and `overwrite` is not set.
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
    """Return the path to rename to: links to folders and `.` in the target are resolved."""
    return Path(os.path.realpath(target)) if target.is_dir() or target.name in ("", "..") else target


def hidden_name(name: str, suffix: str) -> str:
    """Return the name of a hidden folder next to `name`; deterministic, and short enough for any file system."""
    if len(os.fsencode(name)) > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}.{suffix}"


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove everything in a folder except the given names."""
    for entry in folder.iterdir():
        if entry.name not in keep:
            remove(entry)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists; a link itself is removed, not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_empty(*folders: Path) -> None:
    """Remove folders that were created for a failed output, if they are empty, innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _outside(stage: Staging, path: str | None) -> str:
    """Translate a path in the stage, which will be deleted, to the matching path at the target."""
    return str(stage.target) if path is None else str(path).replace(str(stage.out), str(stage.target.parent))


def check_inputs(replaced: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse to replace an input file, even if it is given by another name or through a link.

    Raises:
        UsageError: a file is both replaced and read.
    """
    read = {identity: file for file in inputs if (identity := _identity(file)) is not None}
    for path in replaced if read else ():
        file = read.get(_identity(path) or (-1, -1))
        if file is not None:
            why = f"source and destination are the same file: the output would replace its input {file}"
            raise UsageError(why, path=path, cure="Write to another path")


def replaced_at(target: Path, owns: Collection[str] | None, new: Path | None = None) -> Iterator[Path]:
    """Yield the files at a target that an output replaces: files that match `owns` or are named like a new file.

    Args:
        target: the target, which may not exist.
        owns: as for `staged`.
        new: the new output, if it exists already.
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
    """Whether a path equals another or is inside it, compared by inode, so that links and mounts do not matter."""
    there = _identity(outer)
    if there is None:
        return inner.resolve() == outer.resolve()
    real = inner.resolve()
    return _identity(inner) == there or (outer.is_dir() and any(_identity(path) == there for path in real.parents))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _planned(
    stage: Staging, path: Path, owns: Collection[str] | None, overwrite: bool
) -> tuple[list[Move], list[Path]]:
    """Return the destinations of the staged files, and the other files of the old output to remove."""
    target = stage.target
    if path.is_dir() and target.exists() and not target.is_dir():
        raise StorageError(
            "a file has the name of the output folder", path=target, cure="Remove it, or write to another path"
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
    """Refuse to replace a file next to the target if its contents differ, because it may belong to another output.

    Several formats keep a number such as alpha in a file with a fixed name next to their tensors.
    """
    if not _exists(end) or (end.is_file() and end.read_bytes() == file.read_bytes()):
        return
    if not overwrite:
        raise StorageError("the file exists and has other contents", path=end, cure=OVERWRITE)
    if not _exists(target):
        why = f"the file exists and has other contents: it belongs to a file other than {target.name}"
        raise UsageError(why, path=end, cure="Write to another folder")


def _keep(old: Path, new: Path, owns: Collection[str] | None) -> None:
    """Add those old files that do not match `owns` to the new folder, by hard links, which copy nothing."""
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
    """Create a hard link, or a copy if the file system has no hard links; symbolic links are recreated."""
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


def _can_rename(folder: Path) -> bool:
    return not os.path.ismount(folder) and os.access(folder.parent, os.W_OK | os.X_OK)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)
