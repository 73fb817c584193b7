"""Everything that adapterkit does with a file that somebody sent, and what counts as a fault while it does it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from cases import Case, located
from sandbox import MEMORY, Forbidden, Hang, Sandbox, peak

LONGEST = 4000
"""Characters of an error: a file's own text, repeated in full, would fill a terminal or a log."""

_OF_FILES = frozenset({"detect", "read", "open", "layers", "inject", "recipe", "plan", "command"})
"""First words of the steps that are given a path, which their errors must name."""

GROWTH = 1 << 30
"""Bytes that one small input may make the process grow by."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault.

    Attributes:
        kind: `untyped`, `hang`, `memory`, `forbidden`, `pathless`, `long`, `leftover`, `miswritten` or `died`.
        error: the exception's type, or what was seen.
        place: file and function of the library where it came from: findings are told apart by kind, error and place.
        step: what was being done.
        detail: the traceback or the message.
    """

    kind: str
    error: str
    place: str
    step: str
    detail: str

    @property
    def key(self) -> str:
        return f"{self.kind}-{self.error}-{self.place}".replace("/", ".").replace(" ", "_")[:150]


class Exercise:
    """Runs a case through the library, step by step, in a scratch folder of its own.

    Args:
        sandbox: the sandbox that the process is in; None checks without one.
        scratch: the folder for inputs and outputs.
        commands: how often a case goes through the command line too, from 0 to 1.
    """

    def __init__(self, sandbox: Sandbox, scratch: Path, commands: float = 0.05) -> None:
        self.sandbox, self.scratch, self.commands = sandbox, scratch, commands
        self.out = scratch / "out"
        self.findings: list[Finding] = []
        self.done: list[str] = []

    def run(self, case: Case, rng: Random) -> list[Finding]:
        """All findings of one case."""
        self.findings, self.done = [], []
        place = self.scratch / "in"
        for folder in (place, self.out):
            _remove(folder)
        self.out.mkdir()
        source = case.write(place)
        before = _listing(place)
        recipe = case.kind == "recipe" and source.is_file()  # It may be missing, or a FIFO that blocks.
        self.sandbox.named = source.read_text("utf-8", "replace") if recipe else ""
        for name, step in _steps(case, source, self.out, rng, self.commands):
            if self._step(name, step, str(self.scratch)) is None and name == "open":
                break
        if _listing(place) != before:
            self._add("leftover", "changed", "input", "all", f"{before} became {_listing(place)}")
        home = self.scratch / "home"
        if home.is_dir() and any(home.iterdir()):
            self._add("leftover", "temporary", "home", "all", f"left in TMPDIR or at home: {_listing(home)[:9]}")
            for path in home.iterdir():
                _remove(path)
        return self.findings

    def _step(self, name: str, step: Callable[[], Any], scratch: str) -> Any:
        from adapterkit.errors import AdapterkitError

        before, start = sorted(self.out.rglob("*")), peak(reset=True)
        failed = False
        result = None
        seen: list[str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The handlers are outside `watch`: its timer must not interrupt the one that records a finding.
            try:
                with self.sandbox.watch() as seen:
                    result = step()
            except AdapterkitError as error:
                failed = True
                self._check_error(name, error, scratch)
            except Forbidden as error:
                self._raised("forbidden", name, error)
            except Hang as error:
                self._raised("hang", name, error)
            except MemoryError as error:
                self._raised("memory", name, error)
            except Exception as error:
                self._raised("untyped", name, error)
        if seen and not any(finding.kind == "forbidden" for finding in self.findings):
            self._add("forbidden", seen[0].partition(":")[0], "swallowed", name, seen[0])
        grown = peak() - start
        if grown > GROWTH and not any(finding.kind == "memory" for finding in self.findings):
            self._add("memory", "grew", name, name, f"by {grown >> 20} MB; the limit of a process is {MEMORY >> 20} MB")
        after = sorted(self.out.rglob("*"))
        if failed and after != before:
            left = [str(path.relative_to(self.out)) for path in after if path not in before]
            self._add("leftover", "output", name, name, f"left behind by a step that failed: {left[:9]}")
        self.done.append(name if result is not None else f"{name}: refused")
        return result

    def _check_error(self, name: str, error: Any, scratch: str) -> None:
        text = str(error)
        if type(error).__name__ == "Miswritten":
            self._raised("miswritten", name, error)
        if len(text) > LONGEST:
            self._raised("long", name, error, f"{len(text)} characters")
        if type(error).__name__ == "AdapterkitError" or not error.why:
            self._raised("untyped", name, error, "a bare error")
        about_a_file = name.partition(" ")[0] in _OF_FILES and type(error).__name__ != "UsageError"
        if about_a_file and error.path is None and scratch not in text:
            self._raised("pathless", name, error)

    def _raised(self, kind: str, step: str, error: BaseException, more: str = "") -> None:
        lines = "".join(traceback.format_exception(error))
        self._add(
            kind,
            type(error).__name__,
            _place(error),
            step,
            f"{more}\n{lines[:2000]}\n...\n{lines[-6000:]}" if len(lines) > 8000 else f"{more}\n{lines}",
        )

    def _add(self, kind: str, error: str, place: str, step: str, detail: str) -> None:
        self.findings.append(Finding(kind, error, place, step, detail))


def _place(error: BaseException) -> str:
    """The innermost function of the library on the way to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if f"{os.sep}adapterkit{os.sep}" in frame.filename and "site-packages" not in frame.filename
    ]
    if not own:
        return f"{Path(frames[-1].filename).name}.{frames[-1].name}" if frames else "?"
    last = own[-1]
    return f"{last.filename.rpartition(f'{os.sep}adapterkit{os.sep}')[2].removesuffix('.py')}.{last.name.strip('<>')}"


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and kinds of what is in a folder; links are not followed."""
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        found.append((str(path.relative_to(folder)), size, stat.S_IFMT(status.st_mode)))
    return found


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


Steps = Iterator[tuple[str, Callable[[], Any]]]


def _steps(case: Case, source: Path, out: Path, rng: Random, commands: float) -> Steps:
    """What to do with a case, as names and calls; a refused `open` ends it."""
    yield from {"adapter": _adapter, "base": _base, "graph": _graph, "recipe": _recipe}[case.kind](
        case, source, out, rng
    )
    if rng.random() < commands:
        yield "command", lambda: _command(case, source, out, rng)


def _adapter(case: Case, source: Path, out: Path, rng: Random) -> Steps:
    import adapterkit as ak
    from adapterkit.formats import FORMATS
    from adapterkit.reporting.inspecting import adapter_record

    found: dict[str, Any] = {}
    base = located(case.base) if case.base else None
    known = case.format if case.format in FORMATS else None

    def read(format: str | None) -> Any:  # noqa: A002 - the library's word
        found["adapter"] = ak.read(source, format, base)
        return found["adapter"]

    yield "detect", lambda: ak.detect(source)
    if known:
        yield "read as", lambda: read(known)
    if not found or rng.random() < 0.2:
        yield "read", lambda: read(None)
    if not found:
        return
    adapter = found["adapter"]
    yield "inspect", lambda: adapter_record(adapter, str(source), known or "")
    yield "values", lambda: adapter.check_values() or True
    yield "digest", lambda: adapter.digest()
    native = out / "native.safetensors"
    yield "write native", lambda: ak.write(adapter, native)
    if native.exists():
        yield "read back", lambda: _same(adapter, ak.read(native), native)
    target = rng.choice([*FORMATS])
    loss = rng.choice(("refuse", "fold", "drop", "promote"))
    yield f"write {target}", lambda: ak.write(adapter, out / "foreign" / _named(target), target, base, loss)
    if case.partner and rng.random() < 0.7:
        weights = rng.choice((None, [0.5]))
        merged = out / ("merged.safetensors" if case.partner.endswith(".safetensors") else "merged")
        yield "merge", lambda: ak.merge(
            case.partner, adapter, merged,
            allow_partial=True, weights=weights, device="cpu", tied="untie" if rng.random() < 0.3 else None,
        )  # fmt: skip


def _same(adapter: Any, again: Any, path: Path) -> bool:
    if adapter.digest() != again.digest():
        raise AssertionError(f"{path.name} holds another adapter than was written")
    return True


def _named(target: str) -> str:
    """A name for an output that fits the format."""
    from adapterkit.formats import FORMATS

    return FORMATS[target].file or f"{target}.safetensors"


def _base(case: Case, source: Path, out: Path, rng: Random) -> Steps:
    import adapterkit as ak
    from adapterkit.merging import plan
    from adapterkit.reporting.inspecting import base_record

    yield "detect", lambda: ak.detect(source)
    yield "inspect", lambda: base_record(source, str(source))
    if not case.partner:
        return
    how = rng.choice((None, "dequantize", "dequantize", "requantize"))
    partial = rng.random() < 0.8
    merged = out / ("merged" if source.is_dir() else f"merged{source.suffix}")
    yield "plan", lambda: plan(source, case.partner, quantized=how, allow_partial=partial)
    yield "merge", lambda: ak.merge(source, case.partner, merged, quantized=how, allow_partial=partial, device="cpu")


def _graph(_case: Case, source: Path, out: Path, rng: Random) -> Steps:
    import adapterkit as ak
    from adapterkit import onnx

    adapter = source.parent / "adapter.safetensors"
    yield "layers", lambda: onnx.layers(source)
    mode = rng.choice(("constant", "constant", "slots"))
    yield "inject", lambda: ak.onnx.inject(source, adapter, out / "injected.onnx", mode=mode, check=False)
    yield "merge", lambda: ak.onnx.merge(source, adapter, out / "merged.onnx")
    if (out / "injected.onnx").exists() and rng.random() < 0.3:
        yield "eject", lambda: onnx.eject(out / "injected.onnx", out / "ejected.onnx")


def _recipe(_case: Case, source: Path, out: Path, _rng: Random) -> Steps:
    from adapterkit.ops.recipes import read_recipe

    yield "recipe", lambda: read_recipe(source)
    yield (
        "command",
        lambda: _run(["combine", "--recipe", str(source), "-o", str(out / "made.safetensors")], source.parent),
    )


def _command(case: Case, source: Path, out: Path, rng: Random) -> int:
    """One command of the command line: any exit code but that of a bug, and no traceback."""
    name = str(source)
    given = ["--base", str(located(case.base))] if case.base else []
    words = {
        "adapter": [
            ["inspect", name, *given], ["validate", name, *given],
            ["convert", name, str(out / "c.safetensors"), "--to", "adapterkit", *given],
            ["diff", name, name, *given], ["resize", name, "--rank", "1", "-o", str(out / "r.safetensors"), *given],
        ],
        "base": [["inspect", name], ["merge", name, case.partner or name, "-o", str(out / "m"), "--allow-partial"]],
        "graph": [
            ["inspect", name], ["inject", name, str(source.parent / "adapter.safetensors"), "-o", str(out / "i.onnx")]
        ],
        "recipe": [["combine", "--recipe", name, "-o", str(out / "made.safetensors")]],
    }[case.kind]  # fmt: skip
    chosen = rng.choice(words)
    return _run([*chosen, "--json"] if rng.random() < 0.5 else chosen, out)


def _run(words: list[str], folder: Path) -> int:
    """Runs the command line in this process; an unforeseen exception goes on as it is."""
    from adapterkit.cli import _commands, adapterkit

    met: list[BaseException] = []
    typed = _commands.typed

    def heard(error: BaseException) -> Any:
        known = typed(error)
        if known.exit_code == 70:
            met.append(error)
        return known

    here = os.getcwd()
    os.chdir(folder)
    stdout, stderr = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    _commands.typed = heard
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = adapterkit.main(words, standalone_mode=False)
    finally:
        _commands.typed = typed
        os.chdir(here)
    if met:
        raise met[0]
    stderr.flush()
    told = stderr.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if "Traceback (most" in told:
        raise AssertionError(f"a traceback on standard error: {told[-2000:]}")
    if code not in (0, 1, 2, 3, 4, 5, 6):
        raise AssertionError(f"exit code {code}: {told[-2000:]}")
    return int(code)
