"""Takes PEFT adapters from transformers 4 to transformers 5 and back, on tiny models of many types.

    OLD/bin/python tools/foreign/across_versions.py make FOLDER [MODEL_TYPE...]
    python tools/foreign/across_versions.py check FOLDER [MODEL_TYPE...]
    OLD/bin/python tools/foreign/across_versions.py back FOLDER [MODEL_TYPE...]

`make` runs under transformers 4 and its PEFT: a tiny base, an adapter on every linear layer and stack of experts, and
what PEFT's model gives. `check` runs under transformers 5, with adapterkit: the base is saved again by transformers 5,
under its names; the adapter is merged into both bases and injected into the live model, and an adapter that was trained
under transformers 5 is merged into the base of transformers 4. `back` loads that under transformers 4 again. Every
output must equal PEFT's within 1e-4 of the largest logit, or be as near as PEFT's own merge is to PEFT's model: some
models use the weight of a layer without calling it, and an adapter there changes nothing before it is merged. `differs`
is a model type that the two versions themselves compute differently without any adapter.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "architectures"))

import torch
import transformers
from families import FAMILIES
from peft_models import adapted, output_of, run
from safetensors.torch import load_file, save_file
from tiny import class_of, tiny

LIMIT = 1e-4


def load(model_type: str, folder: Path) -> Any:
    """A model in float32; every weight must be in the folder."""
    model, told = class_of(model_type).from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if told["missing_keys"]:
        raise KeyError(f"missing {sorted(told['missing_keys'])[:3]}")
    return model.eval()


def distance(one: torch.Tensor, other: torch.Tensor | None) -> float:
    """The largest difference over the largest value."""
    if other is None or one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max()) / float(one.abs().max())


def make(model_type: str, folder: Path) -> tuple[str, str]:
    """Write a base and an adapter under this version; (verdict, detail)."""
    shutil.rmtree(folder, ignore_errors=True)
    model = tiny(model_type)
    model.save_pretrained(folder / "base")
    found = run(model)
    if found is None:
        return "not run", "no logits"
    inputs, plain = found
    peft = adapted(model)
    peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
    output = output_of(peft, inputs)
    assert output is not None
    whole = output_of(peft.merge_and_unload(), inputs)
    assert whole is not None
    held = {"plain": plain, "adapted": output, "merged": whole}
    held |= {f"inputs.{name}": value for name, value in inputs.items()}
    save_file({name: value.contiguous() for name, value in held.items()}, folder / "outputs.safetensors")
    return "made", f"{transformers.__version__}, the adapter's effect {distance(plain, output):.1e}"


def check(model_type: str, folder: Path) -> tuple[str, str]:
    """Merge and inject under transformers 5; (verdict, detail)."""
    import adapterkit
    from adapterkit.errors import AdapterkitError

    held = load_file(folder / "outputs.safetensors")
    inputs = {name.removeprefix("inputs."): value for name, value in held.items() if name.startswith("inputs.")}
    live = load(model_type, folder / "base")
    live.save_pretrained(folder / "base5")
    plain = output_of(live, inputs)
    same = distance(held["plain"], plain) < LIMIT
    found: dict[str, float] = {}
    try:
        for name in ("base", "base5"):
            out = folder / f"merged_{name}"
            shutil.rmtree(out, ignore_errors=True)
            adapterkit.merge(folder / name, folder / "adapter", out)
            found[f"into {name}"] = distance(held["merged"], output_of(load(model_type, out), inputs))
        adapter = adapterkit.read(folder / "adapter", base=folder / "base")
        handle = adapterkit.torch.inject(live, adapter)
        found["live"] = distance(held["adapted"], output_of(live, inputs))
        handle.remove()
        peft = adapted(load(model_type, folder / "base"))
        peft.save_pretrained(folder / "adapter5", save_embedding_layers=False)
        back = output_of(peft, inputs)
        assert back is not None
        whole = output_of(peft.merge_and_unload(), inputs)
        assert whole is not None
        assert plain is not None
        held5 = {"adapted": back, "merged": whole, "plain": plain}
        save_file({name: value.contiguous() for name, value in held5.items()}, folder / "outputs5.safetensors")
        out = folder / "merged_back"
        shutil.rmtree(out, ignore_errors=True)
        adapterkit.merge(folder / "base", folder / "adapter5", out)
        found["5 into base"] = distance(whole, output_of(load(model_type, out), inputs))
    except AdapterkitError as error:
        return "refused", f"after {list(found)}: {type(error).__name__}: {error}"
    detail = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    limits = dict.fromkeys(found, LIMIT) | {"live": max(LIMIT, 3 * distance(held["adapted"], held["merged"]))}
    limits["live"] = max(limits["live"], 3 * distance(back, whole))
    if all(value < limits[name] for name, value in found.items()):
        return "right", detail + ("" if limits["live"] == LIMIT else " (PEFT's own merge is as far)")
    if not same:
        return "differs", f"{detail}; without adapters {distance(held['plain'], plain):.1e}"
    return "wrong", detail


def back(model_type: str, folder: Path) -> tuple[str, str]:
    """Load under transformers 4 what was merged from an adapter of transformers 5; (verdict, detail)."""
    held = load_file(folder / "outputs.safetensors")
    inputs = {name.removeprefix("inputs."): value for name, value in held.items() if name.startswith("inputs.")}
    held5 = load_file(folder / "outputs5.safetensors")
    found = distance(held5["merged"], output_of(load(model_type, folder / "merged_back"), inputs))
    if found < LIMIT:
        return "right", f"{found:.1e}"
    apart = distance(held["plain"], held5["plain"])
    return ("wrong" if apart < LIMIT else "differs"), f"{found:.1e}; without adapters {apart:.1e}"


def main() -> int:
    """Run one of the three steps for the model types that were asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["make", "check", "back"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    step = {"make": make, "check": check, "back": back}[arguments.step]
    records: dict[str, tuple[str, str]] = {}
    for model_type in arguments.types or [t for several in FAMILIES.values() for t in several]:
        folder = arguments.folder / model_type
        if arguments.step != "make" and not (folder / "outputs.safetensors").exists():
            continue
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                verdict, detail = step(model_type, folder)
        except Exception as error:  # A model type that this version cannot build or run is counted apart.
            verdict, detail = "not run", f"{type(error).__name__}: {str(error)[:140]}"
        records[model_type] = verdict, detail
        print(f"{verdict:8} {model_type:24} {' '.join(detail.split())[:200]}", flush=True)
    counts = {verdict: [v for v, _ in records.values()].count(verdict) for verdict, _ in records.values()}
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))
    return 1 if counts.get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
