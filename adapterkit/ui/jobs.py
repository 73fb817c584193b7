"""Jobs: run command lines as processes, record their output and progress, and cancel them on request."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, public

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


RUNNING = 2
"""The maximum number of jobs that run at the same time. It is small, because one merge can use a disk's full speed."""

WAITING = 8
"""The maximum number of jobs that may wait."""

KEPT = 50
"""The maximum number of ended jobs that stay in the list; the oldest are removed."""

MAX_OUTPUT_CHARACTERS = 512 * 1024
"""The maximum length of a job's stored standard output. Characters after this limit are dropped."""

_PART = re.compile(r": (\d+)%(?:,|$)")


@dataclass(eq=False)
class PageJob:
    """One run of a command line: its state, output, progress and process."""

    number: int
    words: tuple[str, ...]
    page: Path | None = None
    state: str = "waiting"
    code: int | None = None
    out: str = ""
    error_lines: deque[str] = field(default_factory=lambda: deque(maxlen=400))
    part: int | None = None
    started: float = 0.0
    seconds: float = 0.0
    asked_to_end: bool = False
    process: subprocess.Popen[str] | None = None
    thread: threading.Thread | None = None

    def record(self) -> dict[str, JsonValue]:
        """Return the job as plain data."""
        seconds = time.monotonic() - self.started if self.state == "running" else self.seconds
        return {
            "number": self.number, "command": public(shlex.join(("adapterkit", *self.words))), "name": self.words[0],
            "state": self.state, "code": self.code, "out": self.out, "said": list(self.error_lines), "part": self.part,
            "seconds": round(seconds, 1), "page": self.page is not None and self.page.is_file(),
        }  # fmt: skip


class Jobs:
    """All jobs of a page.

    Args:
        folder: the working directory of the jobs' processes: the folder in which the page was started.
        temporary: the folder for reports if the user gives no output path.
    """

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.folder, self.temporary = folder, temporary
        self.jobs: OrderedDict[int, PageJob] = OrderedDict()
        self.lock = threading.Lock()
        self.next = 1
        self.closed = False

    def start(self, words: Sequence[str]) -> PageJob:
        """Start a job. If `RUNNING` jobs are already running, the new job waits until one of them ends.

        Raises:
            UsageError: the maximum number of waiting jobs, `WAITING`, is reached, or the page is being closed.
        """
        with self.lock:
            if self.closed:
                raise UsageError("the page is closing, so no job starts", cure="Start the page again: adapterkit ui")
            waiting = sum(job.state == "waiting" for job in self.jobs.values())
            if waiting >= WAITING:
                raise UsageError(f"{waiting} jobs are already waiting", cure="Wait until a job ends, or cancel a job")
            job = PageJob(self.next, tuple(words))
            self.next += 1
            out = next((word.partition("=")[2] for word in words if word.startswith("--out=")), None)
            if words[0] == "report":
                job.page = Path(out) if out else self.temporary / f"report-{job.number}.html"
            self.jobs[job.number] = job
            ended = [each.number for each in self.jobs.values() if each.state in ("done", "failed", "ended")]
            for number in ended[: max(0, len(ended) - KEPT)]:
                self._forget(self.jobs.pop(number))
        self._next()
        return job

    def _forget(self, job: PageJob) -> None:
        if job.page is not None and job.page.parent == self.temporary:
            job.page.unlink(missing_ok=True)

    def _next(self) -> None:
        with self.lock:
            free = RUNNING - sum(job.state == "running" for job in self.jobs.values())
            waiting = [job for job in self.jobs.values() if job.state == "waiting"]
            begun = [] if self.closed else waiting[: max(0, free)]
            for job in begun:
                job.state, job.started = "running", time.monotonic()
        for job in begun:
            job.thread = threading.Thread(target=self._run, args=(job,), daemon=True)
            job.thread.start()

    def _run(self, job: PageJob) -> None:
        words = list(job.words)
        if job.page is not None and not any(word.startswith("--out=") for word in words):
            words.insert(1, f"--out={job.page}")
        env = {
            **os.environ,
            "ADAPTERKIT_PROGRESS": "0.3",
            "ADAPTERKIT_PATIENCE": "1",
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
        }
        try:
            # The process runs in a new session, so Ctrl-C in the page's terminal does not reach the process. `close`
            # interrupts the process instead.
            process = subprocess.Popen(
                [sys.executable, "-m", "adapterkit", *words], cwd=self.folder, env=env, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            job.error_lines.append(f"error: the job cannot start: {error.strerror}")
            self._ended(job, 70)
            return
        with self.lock:
            job.process = process
            late = job.asked_to_end
        if late:
            self.end(job.number)
        reader = threading.Thread(target=self._listen, args=(job, process), daemon=True)
        reader.start()
        assert process.stdout is not None
        with process.stdout as out:
            while piece := out.read(8192):
                if len(job.out) < MAX_OUTPUT_CHARACTERS:
                    job.out += piece[: MAX_OUTPUT_CHARACTERS - len(job.out)]
        reader.join()
        self._ended(job, process.wait())

    def _listen(self, job: PageJob, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as errors:
            for line in errors:
                text = line.rstrip("\n")[:4000]
                match = _PART.search(text)
                if match is not None:
                    job.part = int(match[1])
                    if job.error_lines and _PART.search(job.error_lines[-1]):
                        job.error_lines.pop()
                job.error_lines.append(text)

    def _ended(self, job: PageJob, code: int) -> None:
        with self.lock:
            job.code, job.process = code, None
            job.seconds = time.monotonic() - job.started
            job.state = "done" if code == 0 else "ended" if code in (130, -signal.SIGINT) else "failed"
        self._next()

    def end(self, number: int) -> None:
        """Interrupt a job as Ctrl-C does. An interrupted merge resumes where it stopped if its command runs again.

        Raises:
            UsageError: the job does not exist.
        """
        job = self.job(number)
        with self.lock:
            job.asked_to_end = True
            if job.state == "waiting":
                job.state, job.code = "ended", 130
            process = job.process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)

    def job(self, number: int) -> PageJob:
        """Return the job with the given number.

        Raises:
            UsageError: the job does not exist.
        """
        job = self.jobs.get(number)
        if job is None:
            raise UsageError(f"job {number} does not exist", cure="Reload the page")
        return job

    def records(self) -> list[dict[str, JsonValue]]:
        """Return all jobs, the newest first."""
        with self.lock:
            jobs = list(self.jobs.values())
        return [job.record() for job in reversed(jobs)]

    def close(self) -> None:
        """Interrupt all jobs, and wait for them. A process that still runs after 10 seconds is killed."""
        with self.lock:
            self.closed = True
            jobs = list(self.jobs.values())
        for job in jobs:
            if job.state in ("running", "waiting"):
                self.end(job.number)
        for job in jobs:
            process = job.process
            if process is not None:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
        for job in jobs:
            if job.thread is not None:
                job.thread.join(10)
