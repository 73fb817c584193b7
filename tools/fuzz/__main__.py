"""Feeds adapterkit mutated files and reports what it should not have done: `python tools/fuzz --seconds 1200 --seed 1`.

Each worker is a process of its own with 2 GB of memory, 20 seconds an input, and an audit hook. An input is made from
the seed and its number, so `--first N --inputs 1` makes one again. Failing inputs are kept, one folder for each kind of
fault; `--replay FOLDER...` runs kept ones again. The exit code is 1 where something was found.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

PATIENCE = 10
"""Wall seconds for each second of processor time that an input may take: other programs may have the processor."""


@dataclass
class Worker:
    """A process, the number of the input that it is at, and since when."""

    process: subprocess.Popen[str]
    job: int
    log: Path
    at: Any = None
    since: float = field(default_factory=time.monotonic)
    asleep: int = 0

    def stuck(self, limit: float) -> bool:
        """Whether it waits for something that never comes: asleep at four looks in turn after the limit."""
        taken = time.monotonic() - self.since
        if self.at is None or taken < limit:
            self.asleep = 0
            return False
        state = Path(f"/proc/{self.process.pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]
        self.asleep = self.asleep + 1 if state in "SD" else 0
        return self.asleep > 3 or taken > PATIENCE * limit


class Run:
    """Workers and what they found.

    Args:
        chosen: the options of the command line.
        keep: the folder for failing inputs.
    """

    def __init__(self, chosen: argparse.Namespace, keep: Path) -> None:
        self.chosen, self.keep = chosen, keep
        self.lines: queue.Queue[tuple[Worker, str | None]] = queue.Queue()
        self.workers: list[Worker] = []
        self.findings: Counter[str] = Counter()
        self.details: dict[str, dict[str, Any]] = {}
        self.steps: Counter[str] = Counter()
        self.results: list[dict[str, Any]] = []
        self.inputs = 0
        self.end = time.monotonic() + chosen.seconds if chosen.seconds else float("inf")

    def start(self, job: int, first: int, replay: list[str]) -> None:
        """Starts a worker at an input."""
        log = self.keep / f".native-{job}.log"
        options = {
            "keep": str(self.keep), "hang": self.chosen.hang, "seed": self.chosen.seed, "only": self.chosen.only,
            "first": first, "stop": self.chosen.first + self.chosen.inputs, "jobs": self.chosen.jobs, "replay": replay,
        }  # fmt: skip
        code = (
            f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parents[1])]!r}\nimport worker\nworker.main({options!r})"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL,
                text=True, env=environment, start_new_session=True,
            )  # fmt: skip
        worker = Worker(process, job, log)
        self.workers.append(worker)
        threading.Thread(target=self._listen, args=[worker], daemon=True).start()

    def _listen(self, worker: Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self.lines.put((worker, line))
        self.lines.put((worker, None))

    def go(self) -> None:
        """Runs until time is up or the inputs are."""
        if self.chosen.replay:
            self.start(0, 0, [str(Path(path).resolve()) for path in self.chosen.replay])
        else:
            for job in range(self.chosen.jobs):
                self.start(job, self.chosen.first + job, [])
        try:
            while self.workers and time.monotonic() < self.end:
                self._turn()
        finally:
            for worker in self.workers:
                _stop(worker.process)

    def _turn(self) -> None:
        try:
            worker, line = self.lines.get(timeout=0.5)
        except queue.Empty:
            worker, line = None, ""
        if worker is not None and worker in self.workers:
            if line is None:
                self._ended(worker)
            else:
                self._heard(worker, json.loads(line))
        for stuck in [worker for worker in self.workers if worker.stuck(self.chosen.hang)]:
            os.kill(stuck.process.pid, signal.SIGUSR1)
            time.sleep(0.5)
            _stop(stuck.process)
            self._lost(stuck, "hang", "Stuck")

    def _heard(self, worker: Worker, record: dict[str, Any]) -> None:
        if "start" in record:
            worker.at, worker.since = record["start"], time.monotonic()
        elif "done" in record:
            worker.at = None
            self.inputs += 1
            self.steps.update(
                step.partition(":")[0] + (": refused" if step.endswith("refused") else "") for step in record["steps"]
            )
            for finding in record["findings"]:
                self._add(finding, record["done"])
            if self.chosen.replay:
                self.results.append(record)
        elif "end" in record:
            worker.at = None

    def _add(self, finding: dict[str, Any], at: Any) -> None:
        key = finding["key"]
        self.findings[key] += 1
        if key not in self.details:
            self.details[key] = {**finding, "at": at}
            print(f"[{self.inputs} inputs] {key} ({finding['step']}, input {at})", file=sys.stderr, flush=True)

    def _ended(self, worker: Worker) -> None:
        """Drop a worker that is done; report and replace one that died at an input."""
        code = worker.process.wait()
        if worker.at is None:
            self.workers.remove(worker)
            if code:
                raise SystemExit(f"a worker ended with {code} outside any input; see {worker.log}")
            return
        self._lost(worker, "died", f"signal_{-code}" if code < 0 else f"exit_{code}")

    def _lost(self, worker: Worker, kind: str, error: str) -> None:
        self.workers.remove(worker)
        stack = worker.log.read_text("utf-8", "replace") if worker.log.exists() else ""
        place = next(
            (line.strip() for line in stack.splitlines() if "/adapterkit/" in line and "site-packages" not in line), "?"
        )
        file, _, function = place.partition(" in ")
        named = f"{file.rpartition('/adapterkit/')[2].partition('.py')[0]}.{function}" if function else "?"
        key = f"{kind}-{error}-{named}".replace("/", ".")
        finding = {"key": key, "kind": kind, "error": error, "place": named, "step": "?", "detail": stack[:4000]}
        self.inputs += 1
        self._add(finding, worker.at)
        if self.chosen.replay:
            self.results.append({"done": worker.at, "steps": [], "findings": [finding]})
            names = [Path(path).name for path in self.chosen.replay]
            rest = [str(Path(path).resolve()) for path in self.chosen.replay[names.index(worker.at) + 1 :]]
            if rest:
                self.start(0, 0, rest)
            return
        self._keep(key, worker.at, finding)
        if worker.at + self.chosen.jobs < self.chosen.first + self.chosen.inputs:
            self.start(worker.job, worker.at + self.chosen.jobs, [])

    def _keep(self, key: str, number: int, finding: dict[str, Any]) -> None:
        from seeds import seeds
        from worker import Maker

        if not (self.keep / key).exists():
            note = {"number": number, "run_seed": self.chosen.seed, "finding": finding, "key": key}
            Maker(seeds(), self.chosen.seed, self.chosen.only).make(number).keep(self.keep / key, note)


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends a worker with its children: it is the leader of a session of its own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    """Runs, and prints what was found."""
    parser = argparse.ArgumentParser(prog="tools/fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, help="stop after this time; without it, after --inputs")
    parser.add_argument("--inputs", type=int, help="how many inputs to run; 400, or as many as there is time for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the number of the first input")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--only", default="", metavar="GROUP", help="groups of seeds that start so: adapter-peft, base, graph, recipe"
    )
    parser.add_argument(
        "--hang", type=float, default=20, metavar="SECONDS", help="processor time that an input may take"
    )
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-findings"), metavar="DIR", help="where failing inputs go"
    )
    parser.add_argument("--replay", nargs="+", metavar="FOLDER", help="run kept inputs again")
    parser.add_argument("--json", action="store_true", help="print results as JSON")
    parser.add_argument("--differential", action="store_true", help="compare both readers of adapterkit files instead")
    chosen = parser.parse_args()
    if chosen.differential:
        from differential import run as compare

        return compare(chosen.inputs or 20_000, chosen.seed, chosen.first, chosen.keep)
    chosen.inputs = chosen.inputs or (10**9 if chosen.seconds else 400)
    chosen.keep.mkdir(parents=True, exist_ok=True)
    run = Run(chosen, chosen.keep.resolve())
    started = time.monotonic()
    try:
        run.go()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    if chosen.json:
        print(
            json.dumps(
                {
                    "inputs": run.inputs,
                    "findings": run.findings,
                    "details": run.details,
                    "results": run.results,
                    "steps": run.steps,
                }
            )
        )
    else:
        _report(run, time.monotonic() - started)
    return 1 if run.findings else 0


def _report(run: Run, seconds: float) -> None:
    print(f"{run.inputs} inputs in {seconds:.0f} s, {sum(run.findings.values())} faults at {len(run.findings)} places")
    for key, count in run.findings.most_common():
        print(f"{count:6}  {key}  (first: input {run.details[key]['at']}, {run.details[key]['step']})")
    if run.findings:
        print(f"one input for each is in {run.keep}")


if __name__ == "__main__":
    sys.exit(main())
