"""Runs a command as a process, and measures its wall time and memory from outside. Linux."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.01
"""Seconds between two reads of /proc."""


class ProcessFailed(Exception):
    """The measured command failed."""


@dataclass(frozen=True, slots=True)
class Run:
    """The measurements of one run; memory is in bytes.

    Attributes:
        seconds: the wall time from start to exit.
        cpu: the processor time of all threads, which varies less than wall time if other processes run.
        peak: the largest resident size by wait4, including pages of mapped files.
        high_water: the largest resident size by VmHWM, at the last read before the exit.
        anonymous: the largest resident size without pages of files, read every `INTERVAL`.
        stdout: the output of the command.
    """

    seconds: float
    cpu: float
    peak: int
    high_water: int
    anonymous: int
    stdout: str


def measure(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Run:
    """Run `command` to its end; its output goes to files, `log` with .out and .err.

    The measuring process must be small, because a child's peak by wait4 includes the parent's memory at the fork.

    Raises:
        ProcessFailed: the command failed; the error has its last lines of output.
    """
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL, env=environment(env)
        )
        watch = Watch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    watch.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = "\n".join(err.read_text(errors="replace").splitlines()[-5:])
        raise ProcessFailed(f"{' '.join(command)}\nexited with {process.returncode}; the end of {err}:\n{last}")
    peaks = (usage.ru_maxrss * 1024, watch.peak("VmHWM"), watch.peak("RssAnon"))
    return Run(seconds, usage.ru_utime + usage.ru_stime, *peaks, out.read_text(errors="replace"))


def warm(folder: Path) -> None:
    """Read every file once, so that the first contender does not have to read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with `env`; Python may write bytecode, as for installed packages."""
    return {key: value for key, value in {**os.environ, **env}.items() if key != "PYTHONDONTWRITEBYTECODE"}


class Watch:
    """Keeps the largest values of /proc/PID/status while a process runs."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._peaks: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def peak(self, name: str) -> int:
        """Return the largest value of the line `name`, in bytes."""
        return self._peaks.get(name, 0)

    def stop(self) -> None:
        """Stop watching."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(INTERVAL):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            for name, _, value in (line.partition(":") for line in lines if line.endswith(" kB")):
                self._peaks[name] = max(self._peaks.get(name, 0), int(value.split()[0]) * 1024)
