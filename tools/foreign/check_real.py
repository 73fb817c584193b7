"""Compares adapterkit's merges of real adapters with PEFT's results and with float64 formulas.

    python tools/foreign/check_real.py BASE ADAPTERS

ADAPTERS is the folder that `make_peft_adapters.py` made from BASE. The command line merges every adapter twice. The
merge in float32 is compared with PEFT: its weights, its text, and its logits, which are evaluated in float32 and
float64. Every element of the merge in the base's dtype is compared with formulas.py. The script exits with 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import results
import torch
from formulas import LIMIT, Rounding, read_formulas
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
LOGITS = 1e-4
"""Largest absolute difference of a logit between the merged model and PEFT's unmerged one, in float32 and float64.

The column `PEFT f32` shows, beside it, how far PEFT's own evaluation in float32 is from its evaluation in float64.
"""
WEIGHTS = 1e-6
"""Largest difference of a weight from PEFT's merge, over the largest weight of its tensor."""


@dataclass(slots=True)
class Verdict:
    """What was seen for one adapter; `wrong` lists, in words, what was not as it should be."""

    name: str
    logits: float = float("nan")
    exact: float = float("nan")
    noise: float = float("nan")
    text: str = "-"
    weights: float = float("nan")
    changed: int = 0
    rounding: Rounding = field(default_factory=Rounding)
    wrong: list[str] = field(default_factory=list)

    def expect(self, holds: bool, otherwise: str) -> None:
        """Notes `otherwise` unless `holds`."""
        if not holds:
            self.wrong.append(otherwise)


class MergeFailed(Exception):
    """The command under test did not exit with 0."""


def check(base: Path, adapter: Path, command: list[str]) -> Verdict:
    """Merges `adapter` into `base` with `command` and compares, in a folder that is removed at the end."""
    verdict = Verdict(adapter.name)
    with tempfile.TemporaryDirectory(prefix="adapterkit-check-") as scratch:
        try:
            compare_float32(
                verdict, base, adapter, merge(command, base, adapter, Path(scratch, "f32"), "--dtype", "F32")
            )
            compare_rounding(verdict, base, adapter, merge(command, base, adapter, Path(scratch, "own")))
        except MergeFailed as error:
            verdict.wrong.append(str(error))
    return verdict


def merge(command: list[str], base: Path, adapter: Path, out: Path, *options: str) -> Path:
    """Runs the command under test, with this checkout's adapterkit ahead of an installed one."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, str(base), str(adapter), "-o", str(out), *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["(it said nothing)"]
        raise MergeFailed(f"merge {' '.join(options)} exited with {done.returncode}: {words[-1]}")
    return out


def compare_float32(verdict: Verdict, base: Path, adapter: Path, merged: Path) -> None:
    """Logits and text of the float32 merge with PEFT's unmerged ones, its weights with PEFT's merge."""
    expected = results.load(adapter)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, trust_remote_code=False).eval()
    answers = results.ask(model, AutoTokenizer.from_pretrained(base, trust_remote_code=False))
    verdict.logits, verdict.exact = answers.logit_error(expected), answers.exact_error(expected)
    verdict.noise = expected.noise()
    verdict.text = "same" if answers.same_text(expected) else "differs"
    verdict.weights = largest_relative_error(read_weights(merged), peft_weights(base, adapter))
    verdict.expect(verdict.logits <= LOGITS, f"logits differ by {verdict.logits:.2e}, allowed {LOGITS:.0e}")
    verdict.expect(verdict.exact <= LOGITS, f"logits in float64 differ by {verdict.exact:.2e}, allowed {LOGITS:.0e}")
    verdict.expect(verdict.text == "same", f"text differs: {answers.text} instead of {expected.text}")
    verdict.expect(verdict.weights <= WEIGHTS, f"weights differ by {verdict.weights:.2e}, allowed {WEIGHTS:.0e}")


def peft_weights(base: Path, adapter: Path) -> dict[str, Tensor]:
    """What PEFT's own `merge_and_unload` makes of a float32 base."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False), str(adapter)
    )
    merged: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return merged


def largest_relative_error(merged: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """max |d| / max |reference|, the worst tensor's; infinite where one is not in the reference, or not a number."""
    errors = torch.tensor([relative_error(merged[name], reference.get(name)) for name in merged])
    return float(errors.nan_to_num(nan=torch.inf).max())


def relative_error(merged: Tensor, reference: Tensor | None) -> float:
    """max |d| / max |reference| of one tensor."""
    if reference is None or merged.shape != reference.shape:
        return torch.inf
    return float((merged.double() - reference.double()).abs().max() / reference.double().abs().max())


def compare_rounding(verdict: Verdict, base: Path, adapter: Path, merged: Path) -> None:
    """Every element of a merge in the base's own dtype with the float64 formula; the rest with the base, bit by bit."""
    weights, got, formulas = read_weights(base), read_weights(merged), read_formulas(adapter)
    verdict.changed = len(formulas)
    verdict.expect(got.keys() == weights.keys(), f"names differ: {sorted(got.keys() ^ weights.keys())}")
    verdict.expect(formulas.keys() <= weights.keys(), f"not in the base: {sorted(formulas.keys() - weights.keys())}")
    for name in sorted(got.keys() & weights.keys()):
        same_kind = (got[name].dtype, got[name].shape) == (weights[name].dtype, weights[name].shape)
        verdict.expect(same_kind, f"{name}: is {got[name].dtype} {tuple(got[name].shape)}")
        if name in formulas and same_kind:
            verdict.rounding.add(name, got[name], formulas[name](weights[name].double()))
        elif name not in formulas:
            verdict.expect(torch.equal(got[name], weights[name]), f"{name}: changed, but no update applies to it")
    r = verdict.rounding
    words = f"{r.over_limit} elements are over {LIMIT} ulp; worst {r.worst:.3f} in {r.where}"
    verdict.expect(r.worst <= LIMIT, words)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file in `folder`."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


COLUMNS = (
    "adapter",
    "changed",
    "logits",
    "in f64",
    "PEFT f32",
    "text",
    "weights",
    "elements",
    "worst ulp",
    "> 0.5",
    f"> {LIMIT}",
    "",
)


def show(verdicts: list[Verdict]) -> None:
    """Prints one table, and below it what was wrong."""
    rows = [COLUMNS, *map(cells, verdicts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        print(
            first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)), sep="  "
        )
    for verdict in verdicts:
        for words in verdict.wrong:
            print(f"{verdict.name}: {words}")


def cells(verdict: Verdict) -> tuple[str, ...]:
    """One row of the table."""
    r = verdict.rounding
    logits = (f"{verdict.logits:.1e}", f"{verdict.exact:.1e}", f"{verdict.noise:.1e}")
    others = (verdict.text, f"{verdict.weights:.1e}")
    rounding = (f"{r.elements:,}", f"{r.worst:.6f}", f"{r.over_half:,}", f"{r.over_limit:,}")
    return (verdict.name, str(verdict.changed), *logits, *others, *rounding, "FAIL" if verdict.wrong else "ok")


def main() -> int:
    """Runs the command line; 0 all as it should be, 1 not, 2 nothing to check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path, help="the base of the adapters")
    parser.add_argument("adapters", type=Path, help="the folder that make_peft_adapters.py made")
    parser.add_argument("--only", action="append", metavar="NAME", help="check this adapter; may be repeated")
    parser.add_argument(
        "--command",
        default=shlex.join([sys.executable, "-m", "adapterkit", "merge"]),
        help="the command to test, called as COMMAND BASE ADAPTER -o OUT [--dtype F32]; default: %(default)s",
    )
    options = parser.parse_args()
    logging.disable_progress_bar()
    folders = sorted(path.parent for path in options.adapters.glob("*/adapter_config.json"))
    chosen = [path for path in folders if not options.only or path.name in options.only]
    if not chosen:
        print(f"check_real: no such adapter in {options.adapters}; there are {[path.name for path in folders]}")
        return 2
    verdicts = [check(options.base, path, shlex.split(options.command)) for path in chosen]
    show(verdicts)
    return int(any(verdict.wrong for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
