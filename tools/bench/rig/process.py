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
"""Seconds between two looks at /proc."""


class ProcessFailed(Exception):
    """The measured command did not exit with 0."""


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run; memory in bytes.

    Attributes:
        seconds: wall time from start to exit.
        cpu: processor time, of all threads; steadier than wall time where other processes run too.
        peak: largest resident size, as wait4 reports it; pages of mapped files count.
        high_water: the same by VmHWM, as last seen before the exit.
        anonymous: largest part of it that is not backed by a file, as seen every `INTERVAL`.
        stdout: what the command printed.
    """

    seconds: float
    cpu: float
    peak: int
    high_water: int
    anonymous: int
    stdout: str


def measure(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Run:
    """Runs `command` to its end; its output goes to files, `log` with .out and .err.

    The measuring process must be small: a child's peak in wait4 starts at what its parent holds when it forks.

    Raises:
        ProcessFailed: with the last lines the command wrote.
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
    """Reads every file once, so that no contender pays for the disk alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """This process's environment and `env`; compiled modules are kept, as every installed package keeps them."""
    return {key: value for key, value in {**os.environ, **env}.items() if key != "PYTHONDONTWRITEBYTECODE"}


class Watch:
    """Keeps the largest values of /proc/PID/status while a process lives."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._peaks: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def peak(self, name: str) -> int:
        """Largest value seen of the line `name`, in bytes."""
        return self._peaks.get(name, 0)

    def stop(self) -> None:
        """Ends the watching."""
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
