"""Run commands of the command line with a fault: a limit of file sizes, or a signal at a given point of their work.

One process imports adapterkit once, and then every module that a command has needed. Each command runs in a fork of
that process, so a fault takes milliseconds: for a command on a graph, imports take ten times as long as its work.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from faulty_disk import Disk, killing

SERVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, adapterkit.cli
from adapterkit.formats import FORMATS
for name in FORMATS:
    FORMATS[name]
from doomed_commands import met
for line in sys.stdin:
    print(json.dumps(met(json.loads(line))), flush=True)
"""


class Commands:
    """Runs commands, each in a separate process."""

    def __init__(self) -> None:
        here = str(Path(__file__).parent)
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, here], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *words: object, **fault: Any) -> Outcome:
        """Run one command.

        Args:
            words: the arguments of the command line.
            fault: either `limit`, the largest size of a file in bytes; or `at`, the number of a point of the disk below
                `folder`, and `signal`, the signal that the process gets there.
        """
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        job = {"words": [str(word) for word in words], **fault}
        self.server.stdin.write(f"{json.dumps(job, default=str)}\n")
        self.server.stdin.flush()
        return Outcome(**json.loads(self.server.stdout.readline()))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.server.communicate()


class Outcome:
    """The result of a command: its exit code, its output, and the points that it passed."""

    def __init__(self, code: int, said: str, points: list[str]) -> None:
        self.code, self.said, self.points = code, said, points

    def __repr__(self) -> str:
        return f"exit {self.code}: {self.said}"


def met(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a fork and wait for it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with open(writing, "w") as sys.stdout, open(os.dup(writing), "w") as sys.stderr:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os._exit(_run(job))
    os.close(writing)
    with open(reading) as pipe:
        lines = pipe.read().splitlines()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    points = [line.split()[1] for line in lines if line.startswith("@point ")]
    for name in [line.split()[1] for line in lines if line.startswith("@module ")]:
        with contextlib.suppress(Exception):  # Skip modules that other code added to sys.modules under other names.
            import_module(name)
    gc.collect()
    gc.freeze()  # Freeze imported objects: a garbage collection in the fork would copy their pages.
    return {"code": code, "said": "\n".join(line for line in lines if not line.startswith("@")), "points": points}


def _run(job: dict[str, Any]) -> int:
    from adapterkit import cli

    known = set(sys.modules)
    sys.argv = ["adapterkit", *job["words"]]
    os.environ |= job.get("env", {})
    acts: dict[int | None, Callable[[str, Any], None]] = {signal.SIGKILL: killing, signal.SIGTERM: _ended}
    disk = Disk(Path(job["folder"]), job.get("at"), acts.get(job.get("signal"))) if "folder" in job else None
    with _limited(job.get("limit")), disk.watched() if disk else contextlib.nullcontext():
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    # The hub's client reads these variables during its import.
    if not any(name.startswith("HF_") for name in job.get("env", ())):
        sys.stdout.write("".join(f"@module {name}\n" for name in sys.modules if name not in known))
    if disk is not None:
        sys.stdout.write("".join(f"@point {point}\n" for point in disk.points))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _ended(_call: str, _write: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _limited(size: int | None) -> Iterator[None]:
    """Limit the size of files of this process, as on a full disk; the limit also applies to torch's C++ code."""
    if size is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    yield


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything below a folder: files with their bytes, and folders."""
    found = sorted(folder.rglob("*"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in found}
