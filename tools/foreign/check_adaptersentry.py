#!/usr/bin/env python
"""Compares `adapterkit scan` with adaptersentry on the planted faults of the tests, and on clean adapters.

    pip install adaptersentry==2.0.2
    python tools/foreign/check_adaptersentry.py [--out tests/data/adaptersentry.json]

adaptersentry checks the numbers of one safetensors file of LoRA pairs, and the files beside it. Each printed line is
one case: adapterkit's findings, adaptersentry's findings, and a reason if they differ. A difference without a reason is
a failure.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "shared")]

import numpy as np  # noqa: E402
from planted_scans import PLANTED, folder, numbers  # noqa: E402

import adapterkit as ak  # noqa: E402
from adapterkit.scanning import RULES, SEVERITIES  # noqa: E402

INFORMATION = {"CONFIG_FIELDS_IGNORED", "MISSING_METADATA", "NO_REFERENCE_PROFILE", "TARGET_MODULES_MISMATCH"}
"""Its rules that say nothing against an adapter."""

WHY = {
    "template": "it reads no chat templates",
    "template-address": "it reads no chat templates",
    "code-in-config": "it reads five fields of adapter_config.json, and no other config",
    "hidden-file": "it knows files by the ends of their names: no hidden or misleading names",
    "lookalike-name": "it knows files by the ends of their names: no characters that look like others",
    "link": "it follows links",
    "other-content": "it knows files by the ends of their names, not by their content",
    "foreign-bits": "it measures concentration and spectra, not the bits of single numbers",
    "single-expert": "it compares modules with their family, not how many experts there are",
    "token-rows": "it reads LoRA pairs of PEFT's files; another format is a file without them",
    "spike": "it compares families of 16 modules or more; here a family has 12",
    "outlier": "it compares families of 16 modules or more; here a family has 12",
    "head": "it reports complete matrices of the head, not a LoRA of it",
    "pickle-call": "it knows pickles by .bin, .pt, .pth, .pkl and so on, and says of each that it may run code",
    "code-file": "it knows code by .py, .pyc, .sh, .js, .so, .dll, .dylib and .exe, beside the weights alone",
    "second-weights": "it takes every .bin for a pickle that may run code",
}
"""Rule of ours -> why adaptersentry differs in cases of it."""

OURS = {
    "RANK_MISMATCH": "a rank that the config does not name is an error of reading here: validate and read refuse it",
    "SIBLING_EXECUTABLE": "it takes archives and pickles for dangerous by their endings; we read them",
}
"""Its rule -> why we differ."""


def main() -> None:
    """Prints a line a case, and what cannot be explained."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    cases, unexplained = [], 0
    with tempfile.TemporaryDirectory() as work:
        for name, (rule, act) in {**PLANTED, **THEIRS}.items():
            path = folder(Path(work) / f"{len(cases)}")
            act(path)
            ours, theirs = by_us(path), by_them(path)
            agree = bool(ours) == bool(theirs)
            why = "" if agree else WHY.get(rule, "") if ours else "; ".join(OURS.get(each, "") for each in theirs)
            unexplained += not agree and not why
            cases.append({"case": name, "ours": ours, "theirs": theirs, "agree": agree, "why": why})
            print(f"{'same' if agree else 'differ':<7}{name:<38}{','.join(ours):<24}{','.join(theirs):<40}{why}")
        clean = folder(Path(work) / "clean")
        print("clean:", by_us(clean), by_them(clean))
    same = sum(bool(case["agree"]) for case in cases)
    print(f"{len(cases)} cases: {same} with the same answer, {len(cases) - same} explained but {unexplained}")
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({"adaptersentry": "2.0.2", "cases": cases}, indent=1) + "\n", "utf-8")
    sys.exit(bool(unexplained))


def by_us(path: Path) -> list[str]:
    """The rules of ours that a scan of the folder names, notes left out."""
    return sorted({each.rule for each in ak.scan(path).findings if SEVERITIES.index(RULES[each.rule].severity) > 0})


def by_them(path: Path) -> list[str]:
    """The rules of adaptersentry, for the first safetensors file of the folder."""
    from adaptersentry.scanner import scan

    files = [path / "adapter_model.safetensors", *sorted(path.glob("*.safetensors"))]
    result: Any = scan(next(file for file in files if file.exists()))
    found = {each.rule_id for each in result.findings} | {each.code for each in result.verdict.reasons}
    return sorted(found - INFORMATION)


# Faults that adaptersentry has rules for.


def another_rank(tensors: dict[str, Any]) -> None:
    """Four ranks more in each pair than the config says."""
    for key, value in tensors.items():
        axis = 0 if "lora_A" in key else 1
        tensors[key] = np.concatenate([value, np.take(value, range(4), axis)], axis)


def whole_head(tensors: dict[str, Any]) -> None:
    """A complete output matrix."""
    tensors["base_model.model.lm_head.weight"] = np.ones((50, 32), "f4")


THEIRS = {
    "ranks that add up": ("", numbers(another_rank)),
    "a whole head": ("head", numbers(whole_head)),
}


if __name__ == "__main__":
    main()
