"""Runs the configurations of PEFT's tests/test_custom_models.py, and compares adapterkit with PEFT's forward.

    python tools/foreign/check_peft_models.py PEFT/tests/test_custom_models.py [-k WORD] [--json FILE]

The test file must be that of the installed release of PEFT (0.21.2; it is in the source distribution). The script only
executes its list of cases and its models. Each case is one adapter:

1. PEFT adapts the model, and every trained tensor is changed; PEFT's forward gives the expected output of each leaf
module. 2. PEFT saves the adapter; adapterkit reads it with the base and default options. 3. In the base with the
adapter injected, and in the merged base, each of these modules must give the same output for
   the input that it had in PEFT's forward, within 1e-5 of the largest number of that output.
4. Written back in PEFT's format, the folder has the same bytes.

If PEFT does not merge a method (Lily, LoRA on grouped convolutions), step 3 only checks the injection. The script
prints one line per failed case: WRONG with the error, or REFUSED with adapterkit's message. The exit code is 1 if a
case is wrong, or is refused and not listed in LACKING.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit as ak
from adapterkit.errors import AdapterkitError, NotMergeable

TOLERANCE = 1e-5

_PATCHES = "a weight that does the same: PEFT's forward turns overlapping patches of the input"

LACKING: dict[str, str] = {
    **{f"Conv2d {n} OFT": _PATCHES for n in (1, 3, 4, 5)},
}
"""Case -> what it lacks, so that it is refused; of OFT on convolutions only the merge is."""

FAINT = {"Conv2d 3 OFT", "Conv2d 5 OFT"}
"""Cases whose adapter can change next to nothing: COFT holds every block within a small eps."""


def cases(path: Path) -> tuple[list[tuple[str, str, type, dict[str, Any]]], type]:
    """The list of cases and the class that makes models, executed without the tests around them."""
    tree = ast.parse(path.read_text("utf-8"))
    kept = [node for node in tree.body if _needed(node)]
    scope: dict[str, Any] = {"__name__": "test_custom_models"}
    exec(compile(ast.Module(kept, []), str(path), "exec"), scope)
    return scope["TEST_CASES"], scope["MockTransformerWrapper"]


def _needed(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level == 0
    if isinstance(node, ast.ClassDef):
        return node.name == "MockTransformerWrapper" or any(ast.unparse(base) == "nn.Module" for base in node.bases)
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "TEST_CASES" for target in node.targets)
    return isinstance(node, ast.Import)


def trained(model: nn.Module, config: Any) -> nn.Module:
    """The model adapted by PEFT, every trained tensor moved by random numbers."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return wrapped.eval()


Calls = dict[str, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]
"""Path of a module -> arguments and output of its call."""


@torch.no_grad()
def calls(wrapped: nn.Module, names: Collection[str]) -> Calls:
    """What PEFT's forward gave modules of the base, by their names, and what they made of it."""
    found: Calls = {}
    root = wrapped.base_model.model
    handles = [
        root.get_submodule(name).register_forward_hook(partial(_keep, found, name), with_kwargs=True) for name in names
    ]
    wrapped(torch.arange(90).view(9, 10))
    for handle in handles:
        handle.remove()
    return found


def _keep(found: Calls, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    whole = output[0] if isinstance(output, tuple) else output
    found[name] = (copy.deepcopy(args), copy.deepcopy(kwargs), whole.detach().clone())


@torch.no_grad()
def largest_error(model: nn.Module, expected: Calls) -> float:
    """The largest relative difference of a module's output from the expected one."""
    errors = [0.0]
    for name, (args, kwargs, wanted) in expected.items():
        got = model.get_submodule(name)(*args, **kwargs)
        got = got[0] if isinstance(got, tuple) else got
        errors.append(float((got.double() - wanted).abs().max() / wanted.double().abs().max()))
    return max(errors)


def problems(model: nn.Module, config: Any, folder: Path) -> Iterator[str]:
    """What is not right about one case."""
    wrapped = trained(model, config)
    whole = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    inside = [name for name, module in model.named_modules() if name.startswith(tuple(f"{w}." for w in whole))]
    leaves = [name for name, module in model.named_modules() if name and not [*module.children()]]
    expected = calls(wrapped, [name for name in (*leaves, *whole) if name not in inside])
    wrapped.save_pretrained(str(folder / "peft"))
    save_file(model.state_dict(), folder / "base.safetensors", {"format": "pt"})
    torch.save(model.state_dict(), folder / "base.bin")  # A torch file keeps the order of the modules.
    if largest_error(model, expected) < 100 * TOLERANCE:
        yield "WEAK the adapter changes next to nothing"
    try:
        adapter = ak.read(folder / "peft", base=folder / "base.bin")
        adapted = copy.deepcopy(model)
        ak.torch.inject(adapted, adapter)
        yield from _compared("injected", largest_error(adapted, expected))
        try:
            ak.merge(folder / "base.safetensors", adapter, folder / "merged.safetensors")
        except NotMergeable as error:
            if _merges(wrapped):
                yield f"REFUSED merge: {error}"
        else:
            merged = copy.deepcopy(model)
            merged.load_state_dict(load_file(folder / "merged.safetensors"))
            yield from _compared("merged", largest_error(merged, expected))
        ak.write(adapter, folder / "back", "peft", base=folder / "base.bin")
    except AdapterkitError as error:
        yield f"REFUSED {type(error).__name__}: {error}"
        return
    yield from _same_files(folder)


def _compared(what: str, error: float) -> Iterator[str]:
    if not error <= TOLERANCE:
        yield f"WRONG {what}: {error:.1e}"


def _merges(wrapped: Any) -> bool:
    try:
        wrapped.merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def _same_files(folder: Path) -> Iterator[str]:
    one, other = ({p.name: p.read_bytes() for p in (folder / n).glob("adapter_*")} for n in ("peft", "back"))
    if one != other:
        yield f"WRONG written back: {', '.join(sorted(n for n in one | other if one.get(n) != other.get(n)))} differ"


def main() -> int:
    """Runs every case; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", type=Path, help="test_custom_models.py of the installed release of PEFT")
    parser.add_argument("-k", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the failed cases to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    found, models = cases(args.tests)
    bad: dict[str, list[str]] = {}
    count = right = 0
    for name, model_id, config_cls, kwargs in found:
        if args.k not in name:
            continue
        count += 1
        with tempfile.TemporaryDirectory() as folder:
            model = models.from_pretrained(model_id).eval()  # type: ignore[attr-defined]
            config = config_cls(base_model_name_or_path=model_id, **copy.deepcopy(kwargs))
            lines = [line for line in problems(model, config, Path(folder)) if name not in FAINT or "WEAK" not in line]
        right += not lines
        for line in lines:
            bad.setdefault(name, []).append(line)
            print(f"{name}: {line}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(bad, indent=1))
    lacking = [name for name in bad if name in LACKING and all(line.startswith("REFUSED") for line in bad[name])]
    print(f"{count} cases, {right} right, {len(lacking)} refused for what they lack, {len(bad) - len(lacking)} others")
    return int(len(bad) > len(lacking))


if __name__ == "__main__":
    sys.exit(main())
