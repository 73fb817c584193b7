"""The errors that adapterkit raises on purpose. An error can name the faulty file and tell the user what to do.

The library never prints, exits or asks questions. The command line prints the error and exits with its exit code.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from inspect import signature
from os import PathLike
from reprlib import Repr
from typing import Any, ClassVar, ParamSpec, TypeVar

Path = str | PathLike[str]

MAX_LINE = 800
"""The maximum length of a line in an error message, in characters. Longer lines are cut, because a name from a file can
have 70,000 characters."""

MAX_LINES = 200
MAX_TEXT = 3000
"""The maximum length of an error message with several lines, in characters: about one screen. A longer message ends
with the number of omitted lines."""

MAX_PATH = 4096
"""The maximum length of a path in an error, in characters. Linux has the same limit."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/{1,2})(\S+)")
"""Matches a url. One slash is enough, because `pathlib` turns two slashes into one. A Windows drive such as `C:/` does
not match, because the scheme needs at least two letters."""

_USER = re.compile(r"(?!\[)[^/@]*:(?!\d{1,5}/)[^@]*@|[^/?#@]*@")
"""Matches a user name, or a user name and password, before a host. It does not match `host:5000/name@sha256:...`, which
contains no user name."""

_QUERY = re.compile(r"\?[^#]*")
_FRAGMENT = re.compile(r"#(?![\w.-]*$).*", re.DOTALL)
_PARAMETER = re.compile(r"(?i)([?&][\w-]*(?:token|sig|signature|key|secret|password|credential|auth)[\w-]*=)[^\s&#/]+")
"""Matches a secret parameter, such as `?token=...`. The pattern does not require a scheme such as `https://` before the
parameter, because the text may be the path of a file on a hub."""

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


def public(text: str) -> str:
    """Return the text without secrets: `...` replaces secrets in urls, and `<token>` replaces Hugging Face tokens.

    No other function removes secrets. This function is applied to errors, lineage, origin files, reports and all output
    of the command line. In a url, the function replaces user names and passwords before the host. It also replaces the
    whole query (`?token=`, `X-Amz-Signature`, ...), because no list could name all secret parameters.
    """
    if ":/" in text:
        text = _ADDRESS.sub(_without_secrets, text)
    if "=" in text:
        text = _PARAMETER.sub(r"\1...", text)
    return _TOKEN.sub("<token>", text) if "hf_" in text else text


def _without_secrets(match: re.Match[str]) -> str:
    rest = match[2].rstrip("'\")].,;:>")
    end = match[2][len(rest) :]
    rest = _USER.sub("...@", rest, count=1) if _USER.match(rest) else rest
    return match[1] + _FRAGMENT.sub("#...", _QUERY.sub("?...", rest, count=1)) + end


def brief(text: str) -> str:
    """Shorten a message: cut the middle out of long lines, and omit the last lines of a message that is too long.

    `MAX_LINES` limits the number of lines, and `MAX_TEXT` limits the number of characters.
    """
    if not text.isascii():  # Escape lone surrogates, which JSON can hold and no terminal can print.
        text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= MAX_LINE:
        return text
    lines = text.split("\n")
    shown: list[str] = []
    size = 0
    for line in lines[:MAX_LINES]:
        size += min(len(line), MAX_LINE)
        if size > MAX_TEXT:
            break
        shown.append(_cut(line, MAX_LINE))
    left = len(lines) - len(shown)
    return "\n".join([*shown, *([f"... and {left:,} more lines"] if left else [])])


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    start = limit * 3 // 4
    end = limit - start - 40
    return f"{text[:start]} ... ({len(text) - start - end:,} characters) ... {text[len(text) - end :]}"


class AdapterkitError(Exception):
    """The base class of all errors that adapterkit raises on purpose.

    When `why`, `path`, `where` or `cure` is set, secrets are removed from the text (see `public`), and a long text is
    shortened.

    Attributes:
        why: the fault, in one sentence without a full stop.
        path: the faulty file or folder, or None.
        where: the location of the fault inside the file: a tensor, a key, a target or a byte offset.
        cure: a sentence that tells the user how to mend the fault.
        code: a stable machine-readable name for the kind of error.
        exit_code: the exit code of the command line.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 2

    def __init__(
        self, why: str, *, path: Path | None = None, where: str | None = None, cure: str | None = None
    ) -> None:
        self.why = why
        super().__init__(self.why)
        self.path = None if path is None else str(path)
        self.where = where
        self.cure = cure

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, str):
            if name in ("why", "where", "cure"):
                value = brief(public(value))
            elif name == "path":
                value = _cut(public(value), MAX_PATH)
        super().__setattr__(name, value)

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.path, self.where) if part)
        text = f"{place}: {self.why}" if place else self.why
        return f"{text}. {self.cure}" if self.cure else text

    def at(self, path: Path | None = None, where: str | None = None) -> AdapterkitError:
        """Set `path` and `where` unless they are already set, and return the same error."""
        self.path = self.path or (None if path is None else str(path))
        self.where = self.where or where
        return self

    def record(self) -> dict[str, str | None]:
        """Return the error as plain data, for `--json`."""
        return {"code": self.code, "why": self.why, "path": self.path, "where": self.where, "cure": self.cure}


# Cures that errors in several modules share.

DOWNLOAD_OR_WRITE_AGAIN = "Download the file again, or write it again with the tool that made it"
INJECT_INSTEAD = "Inject the adapter into a live model instead"
PASS_AN_ADAPTER = "Pass at least one adapter"
PASS_BASE = "Pass --base BASE (base=)"
PASS_BASE_WITH_CONFIG = "Pass the base, with its config.json: --base BASE (base=)"
PASS_ONE_WEIGHT_EACH = "Pass one weight for each adapter: repeat --weight W (weights=[...])"
SAVE_WITH_PEFT = "Save the adapter again with PEFT"
USE_EXPORTED_BASE = "Use the base that the graph was exported from"
USE_ITS_BASE = "Use the base that the adapter was trained on"
USE_ITS_BASE_OR_DOWNLOAD = f"{USE_ITS_BASE}. If this is that base, the adapter's file is damaged: download it again"
USE_ITS_CONFIG = "Use the config that was saved with this file"
USE_ITS_CONFIG_AND_BASE = f"{USE_ITS_CONFIG}, and the base that the adapter was trained on"
WRITE_ADAPTERKIT = "Write adapterkit's format: --to adapterkit (format='adapterkit')"
WRITE_AGAIN = "Write the file again with the tool that made it"


class UsageError(AdapterkitError):
    """The call itself is invalid. For example, two options exclude each other, or the number of weights is wrong."""

    code = "usage"


class Malformed(AdapterkitError):
    """A file violates the rules of its container or format, or an update violates the rules of its method."""

    code = "malformed"


class UnknownFormat(AdapterkitError):
    """No format recognises the input, or several formats do."""

    code = "unknown-format"


class ShapeMismatch(AdapterkitError):
    """A tensor's shape or dtype does not fit its update or its base."""

    code = "shape-mismatch"


class TargetNotFound(AdapterkitError):
    """A target matches no weight of the base, or several weights."""

    code = "target-not-found"


class Unsupported(AdapterkitError):
    """The input is well-formed, but uses a method, a format version or an option that adapterkit does not support."""

    code = "unsupported"
    exit_code = 3


class NotMergeable(AdapterkitError):
    """An update cannot be merged into the weights, or its method has no formula for what the caller asks of it."""

    code = "not-mergeable"
    exit_code = 3


class Unrepresentable(AdapterkitError):
    """A format cannot express the adapter.

    Attributes:
        items: one line for each update or value that the format cannot express.
        places: the refused updates that `on_loss="promote"` tries to convert to another method. Each update is given as
            a pair of its target and its index among the target's updates.
    """

    code = "unrepresentable"
    exit_code = 3

    def __init__(
        self, why: str, *, items: Sequence[str] = (), path: Path | None = None, cure: str | None = None,
        places: Iterable[tuple[Any, int]] = (),
    ):  # fmt: skip
        super().__init__(why + "".join(f"\n  - {item}" for item in items), path=path, cure=cure)
        self.items = tuple(map(public, items))
        self.places = tuple(places)


class CheckFailed(AdapterkitError):
    """A check, such as a verification of a merge, ran to the end and failed."""

    code = "check-failed"
    exit_code = 1


class Miswritten(CheckFailed):
    """A format's writer has a bug: when the written files are read back, the adapter differs from the original."""

    code = "miswritten"


class Corrupt(AdapterkitError):
    """The bytes of a file are not the expected bytes: a digest, a length or a journal does not match."""

    code = "corrupt"
    exit_code = 4


class StorageError(AdapterkitError):
    """A path cannot be read or written: the disk is full, access is denied, or the path is missing or is taken."""

    code = "storage"
    exit_code = 6


class NetworkError(AdapterkitError):
    """A hub could not be reached, refused the request, or sent an invalid reply."""

    code = "network"
    exit_code = 5


class AccessDenied(NetworkError):
    """A hub denies access: it requires a token, another token, or acceptance of a licence."""

    code = "access"


class RemoteNotFound(NetworkError):
    """A hub does not have the repository, revision or file."""

    code = "remote-not-found"


_CURES = {
    errno.ENOSPC: "Free some space on that file system or write elsewhere, then run the same command again",
    errno.EDQUOT: "Raise the quota or write elsewhere, then run the same command again",
    errno.EACCES: "Check the owner and the permissions of that path",
    errno.EPERM: "Check the owner and the permissions of that path",
    errno.EEXIST: "The path must be a folder, but the path or one of its parents is a file; move this file",
    errno.ENOTDIR: "The path must be a folder, but the path or one of its parents is a file; move this file",
    errno.ENOENT: "Check the spelling of the path",
    errno.EISDIR: "Pass a file, not a folder",
    errno.EROFS: "The file system is mounted read-only; write elsewhere",
}


def storage_error(error: OSError, path: Path) -> StorageError:
    """Return a `StorageError` for an `OSError` that was raised while `path` was read or written."""
    reason = (error.strerror or str(error)).lower()
    return StorageError(reason, path=path, cure=_CURES.get(error.errno or 0, "Check the disk and its file system"))


P = ParamSpec("P")
R = TypeVar("R")


def places_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that uses a file, so that each error of the function names the path of the file.

    The function's first argument must be this path, or an object whose `root` is this path. Errors that already name a
    file stay unchanged. A `UsageError` also stays unchanged, because it is about the call and not about a file.
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


def shown(value: object, most: int = 120) -> str:
    """Return the `repr` of a value from a file, for an error message. It is cut to at most `most` characters.

    Large integers are described by their size: Python refuses to print more than 4300 digits, and YAML and numpy
    headers can contain such integers in hexadecimal.
    """
    return _cut(_SHOWN.repr(value), most)


class _Repr(Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()
        return repr(x) if bits <= 128 else f"an integer of {bits} bits"


_SHOWN = _Repr()


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the error's type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, among: Iterable[str], count: int = 3, *, before: str = "") -> str:
    """Return the text "Nearest: ..." with similar names, for the cure of an error; "" if no name is similar.

    Args:
        name: the name that does not exist.
        among: the names that exist.
        count: the maximum number of names to list.
        before: text to put before each name.
    """
    import difflib

    close = difflib.get_close_matches(name, list(among), n=count, cutoff=0.6)
    return f"Nearest: {', '.join(before + each for each in close)}" if close else ""
