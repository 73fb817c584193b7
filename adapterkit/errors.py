"""Every error adapterkit raises on purpose: one root, few leaves, each with a place, a cure and a stable code.

The library never prints, exits or asks; the command line turns a leaf into one line and its exit code.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from inspect import signature
from os import PathLike
from reprlib import Repr
from typing import Any, ClassVar, ParamSpec, TypeVar

Path = str | PathLike[str]


class AdapterkitError(Exception):
    """Root of all errors raised on purpose.

    Attributes:
        why: what is wrong, in one sentence without a full stop.
        path: the file or folder it was found in, if any.
        where: the place inside it: a tensor, a key, a target, a byte offset.
        cure: what the reader of the message can do about it.
        code: stable machine-readable name of the kind of error.
        exit_code: what the command line exits with.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 2
    longest: ClassVar[int] = 1000
    """Characters of each part of the message: a hostile file's keys and values may have millions."""

    def __init__(
        self, why: str, *, path: Path | None = None, where: str | None = None, cure: str | None = None
    ) -> None:
        self.why = shortened(why, self.longest)
        super().__init__(self.why)
        self.path = None if path is None else str(path)
        self.where = where and shortened(where, self.longest)
        self.cure = cure and shortened(cure, self.longest)

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.path, self.where) if part)
        text = f"{place}: {self.why}" if place else self.why
        return f"{text}. {self.cure}" if self.cure else text

    def at(self, path: Path | None = None, where: str | None = None) -> AdapterkitError:
        """Fills in the place, where the raiser did not know it, and returns the same error."""
        self.path = self.path or (None if path is None else str(path))
        self.where = self.where or (where and shortened(where, self.longest))
        return self

    def record(self) -> dict[str, str | None]:
        """The error as plain data, for `--json`."""
        return {"code": self.code, "why": self.why, "path": self.path, "where": self.where, "cure": self.cure}


class UsageError(AdapterkitError):
    """The call itself makes no sense: options that exclude each other, weights that do not match adapters."""

    code = "usage"


class Malformed(AdapterkitError):
    """A file breaks the rules of its own container or dialect."""

    code = "malformed"


class UnknownFormat(AdapterkitError):
    """No format, or more than one, recognises the input."""

    code = "unknown-format"


class ShapeMismatch(AdapterkitError):
    """A tensor's shape or dtype is not what its update or its base calls for."""

    code = "shape-mismatch"


class TargetNotFound(AdapterkitError):
    """A target has no place in the base, or more than one."""

    code = "target-not-found"


class Unsupported(AdapterkitError):
    """Well-formed, but needs something this version does not know: a method, a version, a maths-changing option."""

    code = "unsupported"
    exit_code = 3


class NotMergeable(AdapterkitError):
    """The law of an update cannot be folded into weights."""

    code = "not-mergeable"
    exit_code = 3


class Unrepresentable(AdapterkitError):
    """A format cannot say what the adapter says.

    Attributes:
        items: one line for each thing the format has no words for.
        places: the updates that are meant, as (target, position among its updates), where a writer knows them: those
            that it would take in the words of another method.
    """

    code = "unrepresentable"
    exit_code = 3
    longest = 1 << 20
    """Long enough for one line a target: the whole list is what the reader needs."""

    def __init__(
        self, why: str, *, items: Sequence[str] = (), path: Path | None = None, cure: str | None = None,
        places: Iterable[tuple[Any, int]] = (),
    ):  # fmt: skip
        lines = (shortened(item, AdapterkitError.longest) for item in items)
        super().__init__(why + "".join(f"\n  - {line}" for line in lines), path=path, cure=cure)
        self.items = tuple(items)
        self.places = tuple(places)


class CheckFailed(AdapterkitError):
    """A verification ran to its end and found a difference."""

    code = "check-failed"
    exit_code = 1


class Corrupt(AdapterkitError):
    """Bytes are not the ones that were promised: a digest, a length or a journal disagrees."""

    code = "corrupt"
    exit_code = 4


class StorageError(AdapterkitError):
    """The file system said no: no space, no permission, read-only, not there, already taken."""

    code = "storage"
    exit_code = 6


class NetworkError(AdapterkitError):
    """A hub could not be reached, refused, or answered with what makes no sense."""

    code = "network"
    exit_code = 5


class AccessDenied(NetworkError):
    """A hub wants a token, another token, or a licence accepted first."""

    code = "access"


class RemoteNotFound(NetworkError):
    """A hub has no such repository, revision or file."""

    code = "remote-not-found"


_CURES = {
    errno.ENOSPC: "Free some space on that file system or write elsewhere, then run the same command again",
    errno.EDQUOT: "Raise the quota or write elsewhere, then run the same command again",
    errno.EACCES: "Check the owner and the mode of that path",
    errno.EPERM: "Check the owner and the mode of that path",
    errno.EEXIST: "A file is in the way of a folder",
    errno.ENOTDIR: "A file is in the way of a folder",
    errno.ENOENT: "Check the spelling of the path",
    errno.EISDIR: "Name a file, not a folder",
    errno.EROFS: "The file system is mounted read-only; write elsewhere",
}


def storage_error(error: OSError, path: Path) -> StorageError:
    """The typed form of an `OSError` met while reading or writing `path`."""
    reason = (error.strerror or str(error)).lower()
    return StorageError(reason, path=path, cure=_CURES.get(error.errno or 0, "Check the disk and its file system"))


P = ParamSpec("P")
R = TypeVar("R")


def places_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of a file so that its errors name that file.

    The first argument is the file: a path, or an object with a `root`. An error that names another file keeps it. A
    `UsageError` is about the call, not about a file, and is left as it is.
    """
    name = next(iter(signature(function).parameters))

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except AdapterkitError as error:
            given: Any = args[0] if args else kwargs.get(name)
            path = given if isinstance(given, (str, PathLike)) else getattr(given, "root", None)
            if path is not None and not isinstance(error, UsageError):
                error.at(path=path)
            raise

    return run


def shortened(text: str, most: int) -> str:
    """`text` with its middle left out where it has more than `most` characters, and lone surrogates escaped."""
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end - 5]} ... {text[-end:]}"


def shown(value: object, most: int = 120) -> str:
    """`repr` of a value from a file, for a message, in at most `most` characters.

    Python refuses to print an integer of more than 4300 digits, which YAML and numpy headers can hold in hexadecimal.
    """
    return shortened(_SHOWN.repr(value), most)


class _Repr(Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()
        return repr(value) if bits <= 128 else f"an integer of {bits} bits"


_SHOWN = _Repr()


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says; its kind, where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, among: Iterable[str], count: int = 3) -> str:
    """Words that name the closest of `among`, for the cure of an error; empty when none is close."""
    import difflib

    close = difflib.get_close_matches(name, list(among), n=count, cutoff=0.6)
    return f"Nearest: {', '.join(close)}" if close else ""
