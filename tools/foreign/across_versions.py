"""Checks PEFT adapters across transformers 4 and transformers 5, on tiny models of many types.

    OLD/bin/python tools/foreign/across_versions.py make FOLDER [MODEL_TYPE...]
    python tools/foreign/across_versions.py check FOLDER [MODEL_TYPE...]
    OLD/bin/python tools/foreign/across_versions.py back FOLDER [MODEL_TYPE...]

`make` runs with transformers 4 and a matching PEFT. It writes a tiny base, an adapter on every linear layer and stack
of experts, and the outputs of PEFT's model. `check` runs with transformers 5 and adapterkit. transformers 5 saves the
base again, under its own names. The adapter is merged into both bases and injected into the live model. An adapter that
was trained with transformers 5 is merged into the base of transformers 4. `back` loads that merged model with
transformers 4. Every output must equal PEFT's within 1e-4 of the largest logit, or be as close to it as the output of
PEFT's own merge: some models use the weight of a layer without calling the layer, and an adapter there has no effect
until it is merged.

Some model types have different logits in the two versions without any adapter. For these, the model that PEFT merged in
one version is saved and loaded in the other version, and its logits are the reference. The weights of a merge are
compared with the weights of that model for every model type. `differs` marks a type whose saved model the other version
cannot load.
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


def load(model_type: str, folder: Path, **arguments: Any) -> Any:
    """A model in float32; every weight must be in the folder. `arguments` are further ones of `from_pretrained`."""
    model, told = class_of(model_type).from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **arguments
    )
    if told["missing_keys"]:
        raise KeyError(f"missing {sorted(told['missing_keys'])[:3]}")
    return model.eval()


def apart(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """The largest distance of two parameters of one name; infinite where one model has a parameter alone."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(distance(ours[name], theirs[name]) for name in ours if ours[name].numel())


def distance(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    """The largest difference over the largest value."""
    if one is None or other is None or one.shape != other.shape:
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
    unloaded = peft.merge_and_unload()
    unloaded.save_pretrained(folder / "merged4")
    whole = output_of(unloaded, inputs)
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
    peer = load(model_type, folder / "merged4")
    reference = held["merged"] if same else output_of(peer, inputs)
    adapted_there = held["adapted"] if same else reference
    assert plain is not None
    assert reference is not None
    assert adapted_there is not None
    found: dict[str, float] = {}
    try:
        for name in ("base", "base5"):
            out = folder / f"merged_{name}"
            shutil.rmtree(out, ignore_errors=True)
            adapterkit.merge(folder / name, folder / "adapter", out)
            merged = load(model_type, out)
            found[f"into {name}"] = distance(reference, output_of(merged, inputs))
            found[f"weights of {name}"] = apart(peer, merged)
        adapter = adapterkit.read(folder / "adapter", base=folder / "base")
        handle = adapterkit.torch.inject(live, adapter)
        found["live"] = distance(adapted_there, output_of(live, inputs))
        handle.remove()
        peft = adapted(load(model_type, folder / "base"))
        peft.save_pretrained(folder / "adapter5", save_embedding_layers=False)
        back = output_of(peft, inputs)
        assert back is not None
        unloaded = peft.merge_and_unload()
        unloaded.save_pretrained(folder / "merged5")
        whole = output_of(unloaded, inputs)
        assert whole is not None
        held5 = {"adapted": back, "merged": whole, "plain": plain}
        save_file({name: value.contiguous() for name, value in held5.items()}, folder / "outputs5.safetensors")
        out = folder / "merged_back"
        shutil.rmtree(out, ignore_errors=True)
        adapterkit.merge(folder / "base", folder / "adapter5", out)
        merged = load(model_type, out)
        found["5 into base"] = distance(whole, output_of(merged, inputs))
        found["weights of 5"] = apart(load(model_type, folder / "merged5"), merged)
    except AdapterkitError as error:
        return "refused", f"after {list(found)}: {type(error).__name__}: {error}"
    detail = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    detail += "" if same else f"; without adapters {distance(held['plain'], plain):.1e}"
    limit = max(LIMIT, 3 * distance(held["adapted"], held["merged"]), 3 * distance(back, whole))
    weights = max(value for name, value in found.items() if name.startswith("weights"))
    if max(found.values()) < limit and weights < LIMIT:
        return "right", detail + ("" if limit == LIMIT else " (PEFT's own merge is as far)")
    return "wrong", detail


def back(model_type: str, folder: Path) -> tuple[str, str]:
    """Load under transformers 4 what was merged from an adapter of transformers 5; (verdict, detail)."""
    held = load_file(folder / "outputs.safetensors")
    inputs = {name.removeprefix("inputs."): value for name, value in held.items() if name.startswith("inputs.")}
    held5 = load_file(folder / "outputs5.safetensors")
    merged = load(model_type, folder / "merged_back")
    found, apart_plain = distance(held5["merged"], output_of(merged, inputs)), distance(held["plain"], held5["plain"])
    detail = f"{found:.1e}"
    if found >= LIMIT:
        # The reference is PEFT's merge under transformers 5, loaded here with the config of the base.
        try:
            peer = load(model_type, folder / "merged5", config=merged.config)
        except Exception as error:
            return "differs", f"{detail}; this version cannot load what transformers 5 saved: {str(error)[:80]}"
        found = distance(output_of(peer, inputs), output_of(merged, inputs))
        detail += f", from PEFT's merge loaded here {found:.1e}, weights {apart(peer, merged):.1e}"
        detail += f"; without adapters {apart_plain:.1e}"
        found = max(found, apart(peer, merged))
    return ("right" if found < max(LIMIT, 3 * distance(held5["adapted"], held5["merged"])) else "wrong"), detail


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
