"""What a worker may do while it reads a hostile file: limits of memory and time, and an audit hook that watches.

An audit hook cannot be removed, so a process that entered the sandbox stays in it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MEMORY = 2 << 30
"""Bytes of private memory that a process may hold."""

_CODE = tuple(
    {
        os.path.realpath(path)
        for path in (
            sys.prefix,
            sys.base_prefix,
            sys.exec_prefix,
            *sysconfig.get_paths().values(),
            *filter(None, sys.path),
            REPOSITORY,
        )
    }
)
"""Folders whose code may run and whose files may be read."""

_READ = ("/dev/null", "/dev/urandom", "/proc", "/sys", "/usr", "/lib", "/etc/localtime", "/etc/ssl", "/etc/mime.types")

_RUNS = frozenset({"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
                   "subprocess.Popen", "os.startfile", "ctypes.dlopen", "pickle.find_class", "code.__new__",
                   "marshal.loads", "os.kill", "signal.pthread_kill"})  # fmt: skip
_CHANGES = frozenset({
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.chown",
    "os.truncate", "os.utime", "os.setxattr", "os.removexattr", "os.chflags",
})  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


_IMPORTS = frozenset({
    "adapterkit", "array_api_compat", "click", "huggingface_hub", "ml_dtypes", "msgspec", "numpy", "onnx",
    "onnx_ir", "onnxscript", "onnxruntime", "yaml", "rich", "safetensors", "threadpoolctl", "torch", "org", "_wmi",
})  # fmt: skip
"""Modules that may be imported at any time: the dependencies, `org`, which the pickle module tries to import, and
`_wmi`, which Python's own `platform` tries to import since 3.12; only Windows has it."""


class Forbidden(BaseException):
    """Something that reading a file must never do. Not an `Exception`, so that no handler hides it."""


class Hang(BaseException):
    """An input takes more processor time than it may."""


class Sandbox:
    """The audit hook and its findings; `enter` once, then `watch` each input.

    Args:
        scratch: the one folder that may be written to.
        seconds: processor time that one input may take.
    """

    def __init__(self, scratch: Path, seconds: float = 20) -> None:
        self.scratch, self.seconds = os.path.realpath(scratch), seconds
        self.seen: list[str] = []
        self.named = ""
        """Text of a recipe: its author is the user, so the paths in it may be read."""
        self._watching = False
        self._roots: frozenset[str] = frozenset()

    def enter(self) -> None:
        """Sets limits, signals and the hook; call it when everything is imported that good input needs."""
        import resource

        # A native stack goes to standard error when the process dies, or when its parent asks.
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        signal.signal(signal.SIGPROF, self._hang)
        # RLIMIT_AS counts mapped libraries too, of which torch has gigabytes; RLIMIT_DATA counts private memory alone.
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MEMORY, MEMORY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        home = Path(self.scratch) / "home"
        home.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(home)
        os.environ["HOME"] = str(home)
        os.chdir(home)
        sys.dont_write_bytecode = True
        self._roots = frozenset(name.partition(".")[0] for name in sys.modules) | sys.stdlib_module_names | _IMPORTS
        sys.addaudithook(self._hook)

    @contextmanager
    def watch(self) -> Iterator[list[str]]:
        """Within it what is forbidden is refused and listed, and time is counted."""
        self.seen.clear()
        self._watching = True
        signal.setitimer(signal.ITIMER_PROF, self.seconds, 1)
        try:
            yield self.seen
        finally:
            # The signal may already be pending; `_hang` ignores it once nothing is watched.
            self._watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _hang(self, *_: object) -> None:
        if self._watching:
            raise Hang("more processor time than an input may take")

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        fault = self._fault(event, args)
        if fault:
            self._watching = False
            try:
                self.seen.append(f"{event}: {fault}"[:400])
            finally:
                self._watching = True
            raise Forbidden(self.seen[-1])

    def _fault(self, event: str, args: tuple[Any, ...]) -> str:
        if event == "open":
            return self._opened(*args[:3])
        if event in _CHANGES:
            paths = args[:2] if event in ("os.rename", "os.link") else args[1:2] if event == "os.symlink" else args[:1]
            return next((f"{path!r}" for path in paths if not self._inside(path)), "")
        if event == "ctypes.dlopen" or event in _RUNS or event.startswith("socket."):
            return self._run(event, args)
        if event == "import":
            root = str(args[0]).partition(".")[0]
            # Libraries import what they like; adapterkit imports only what it depends on.
            return "" if root in self._roots or "site-packages" in _caller(importer=True) else str(args[0])
        if event == "exec":
            return "" if not isinstance(args[0], CodeType) or _known(args[0].co_filename) else args[0].co_filename
        return ""

    def _run(self, event: str, args: tuple[Any, ...]) -> str:
        if event in ("socket.gethostname", "socket.__new__"):
            return ""
        caller = _caller()
        # Extension modules and byte code are loaded by the import system, and a module object is made of them.
        if event in ("marshal.loads", "code.__new__", "ctypes.dlopen") and _known(caller):
            return ""
        return f"{args!r} from {caller}"

    def _opened(self, path: Any, mode: Any, flags: Any) -> str:
        if isinstance(path, int):
            return ""
        if any(letter in (mode or "") for letter in "wax+") or (flags or 0) & _WRITES:
            return "" if self._inside(path) or path == "/dev/null" else f"write {path!r}"
        # A link out of the folder is the user's own: the cache of huggingface_hub is made of them.
        named = os.path.abspath(os.fsdecode(path))
        allowed = (self.scratch + os.sep, *_CODE, *_READ)
        known = f"{named}{os.sep}".startswith(allowed) or os.path.realpath(named).startswith(_CODE)
        known = known or named in self.named
        return "" if known else f"read {named}"

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        real = os.path.realpath(os.fsdecode(path))
        return real == self.scratch or real.startswith(self.scratch + os.sep)


def peak(reset: bool = False) -> int:
    """The largest resident size of this process in bytes, since the last reset where the kernel counts that."""
    if reset:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _known(name: str) -> bool:
    """Whether code of this file is the library's, the environment's or Python's own."""
    if name.startswith("<frozen "):
        return True
    if name.startswith("<"):
        # dataclasses, namedtuple and enum compile text of their own.
        return os.path.realpath(_caller()).startswith(_CODE)
    return os.path.realpath(name).startswith(_CODE)


def _caller(*, importer: bool = False) -> str:
    """The file of the innermost frame outside this module; with `importer`, of what has a module imported."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or (importer and "importlib" in frame.f_code.co_filename)
    ):
        frame = frame.f_back
    return frame.f_code.co_filename
