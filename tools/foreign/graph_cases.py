"""Runs cases of changed graphs: this checkout changes them, a tool in its own environment compares them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import adapterkit as ak
from adapterkit.errors import AdapterkitError

COLUMNS = ("tool", "model", "type", "mode", "method", "result", "difference", "note")


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that made graphs and runs them.

    Attributes:
        name: its name in the table.
        python: the interpreter of its environment.
        script: the program that makes its models (`make DIR`) and compares folders with PEFT (`compare DIR ...`).
        home: the folder of models and of the table.
    """

    name: str
    python: str
    script: Path
    home: Path

    def make(self, chosen: Sequence[str] = ()) -> None:
        """Make the chosen models, or all, that are not there yet."""
        words = [self.python, self.script, "make", self.home / "models", *chosen]
        subprocess.run(words, check=True, capture_output=True)

    def compare(self, case: Case, folder: Path) -> dict[str, Any]:
        """Return what the tool's comparison with PEFT says."""
        words: list[Any] = [case.model]
        if self.name == "genai":
            words.append(case.kind)
        words += [case.method, folder]
        if self.name == "genai":
            words += folder.glob("*.onnx_adapter")
        running = _process(self)
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        running.stdin.flush()
        for line in running.stdout:
            if line.startswith("told "):
                told: dict[str, Any] = json.loads(line.removeprefix("told "))
                return told
        _process.cache_clear()
        return {"error": f"the process ended with {running.wait()}"}


@cache
def _process(tool: Tool) -> subprocess.Popen[str]:
    """Start the tool's program once, since importing its libraries takes longer than a comparison."""
    words = [tool.python, tool.script, "compare", tool.home / "models"]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@dataclass(frozen=True, slots=True)
class Case:
    """One change of one model.

    Attributes:
        model: the model.
        kind: the type of its numbers.
        method: the adapter's method.
        mode: `constant` or `slots` of `inject`, `merge`, or `export` with a mode of it.
        source: the folder of graphs, relative to the models.
        limit: the largest difference that the type explains.
    """

    model: str
    kind: str
    method: str
    mode: str
    source: str
    limit: float


def run_cases(tool: Tool, cases: Sequence[Case]) -> int:
    """Run all cases, and write the table; return 1 if one is wrong."""
    rows: list[tuple[Any, ...]] = []
    for case in cases:
        rows.append((tool.name, case.model, case.kind, case.mode, case.method, *_result(tool, case)))
        print(*rows[-1], sep="\t", flush=True)
        table = ["\t".join(COLUMNS), *("\t".join(map(str, row)) for row in rows)]
        (tool.home / f"{tool.name}.tsv").write_text("\n".join(table) + "\n", encoding="utf-8")
    counts = Counter(row[5] for row in rows)
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return int(counts["wrong"] + counts["false alarm"] > 0)


def _result(tool: Tool, case: Case) -> tuple[str, str, str]:
    """Return the result, the difference from PEFT and a note.

    A refusal says why; a failed check where the graph is right is a false alarm.
    """
    models, out = tool.home / "models", tool.home / "changed"
    shutil.rmtree(out, ignore_errors=True)
    graphs, adapter = models / case.source, models / case.model / case.method
    # A graph does not show whether it stores a norm as its weight or as 1 + weight.
    base = models / case.model / "base" if case.method == "ln" else None
    try:
        if case.mode.startswith("export"):
            whole, mode = models / case.model / "base", case.mode.removeprefix("export ")
            report = ak.onnx.export_pretrained(whole, out, adapter=adapter, mode=mode)
        elif case.mode == "merge":
            quantized = "dequantize" if case.kind.startswith("int4") else None
            report = ak.onnx.merge(graphs, adapter, out, base_weights=base, quantized=quantized)
        else:
            report = ak.onnx.inject(graphs, adapter, out, base_weights=base, mode=case.mode)
    except AdapterkitError as error:
        return (
            ("false alarm" if error.code == "check-failed" else "refused"),
            "",
            str(error).replace(str(tool.home), ""),
        )
    unchecked = f"not checked: {report.note}" if report.difference is None else ""
    told = tool.compare(case, out)
    if told.get("difference", float("inf")) <= case.limit:
        return "right", f"{told['difference']:.2g}", unchecked
    alone = _base(tool, replace(case, method="none", mode="none"))
    if alone is not None:
        return alone
    if "error" in told:
        return "not run", "", str(told["error"])
    return "wrong", f"{told['difference']:.2g}", unchecked


@cache
def _base(tool: Tool, case: Case) -> tuple[str, str, str] | None:
    """Compare the tool's own graph with the torch model without an adapter; return what is wrong with it, or None."""
    told = tool.compare(case, tool.home / "models" / case.source)
    if "error" in told:
        return "base does not run", "", str(told["error"])
    far = told["difference"] > case.limit
    return ("base is wrong", f"{told['difference']:.2g}", "without an adapter") if far else None
