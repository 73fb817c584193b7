"""Merges PEFT adapters into tiny bases of many model types and compares with PEFT: right, refused or wrong.

    python tools/foreign/check_bases.py [MODEL_TYPE...] [--live] [--json FILE]

A base is a tiny random model that transformers saved with `save_pretrained`, in the layout of models on hubs. The
adapter is PEFT's, on every linear layer and on every stack of experts (`target_parameters`). adapterkit merges it, and
transformers loads the result. `right`: every parameter and the logits equal those of PEFT's model within 1e-4 of the
largest. `refused`: adapterkit raised one of its errors. Anything else is `wrong`. A base of another family must be
refused.

With `--live`, the adapter is injected into the live model instead of merged: under PEFT's names, and under the names of
the base on disk (`Adapter.bind`). The logits of both must equal those of PEFT's model. If a model cannot be called with
the inputs of this script, it is compared layer by layer: each adapted linear layer is called with random inputs, and
all parameters after `merge_` must equal those of PEFT's merged model.

Needs transformers 5.24 and PEFT 0.21.2.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent / "architectures"))

import torch  # noqa: E402
import transformers  # noqa: E402
from families import FAMILIES  # noqa: E402
from peft.tuners.lora import Linear  # noqa: E402
from peft_models import adapted, logits_of  # noqa: E402
from tiny import tiny  # noqa: E402

import adapterkit  # noqa: E402
from adapterkit.errors import AdapterkitError  # noqa: E402

LIMIT = 1e-4


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of a parameter over its largest value, and whose it is."""
    worst, where = 0.0, ""
    for name, tensor in one.items():
        if name not in other:
            return float("inf"), f"{name} is missing"
        scale = float(tensor.abs().max()) if tensor.numel() else 0.0
        distance = float((tensor - other[name]).abs().max()) / (scale or 1.0) if tensor.numel() else 0.0
        if math.isnan(distance):
            return float("inf"), f"{name} is not a number"
        if distance > worst:
            worst, where = distance, name
    return worst, where


def round_trip(model_type: str, kind: Any, base: Path) -> tuple[set[str], set[str]]:
    """(parameters that differ, keys that are missing or unexpected) where transformers loads a base that it saved."""
    again, told = kind.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, trust_remote_code=False
    )
    given, found = dict(tiny(model_type).named_parameters()), dict(again.named_parameters())
    differing = {name for name, each in given.items() if name not in found or not torch.equal(each, found[name])}
    return differing, {*told["missing_keys"], *told["unexpected_keys"]}


def exact_difference(model_type: str, kind: Any, merged: Path) -> float:
    """The difference of logits over the largest in float64: some models enlarge what float32 rounds off."""
    peft = adapted(tiny(model_type)).double()
    again = kind.from_pretrained(merged, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False)
    again = again.double().eval()
    torch.set_default_dtype(torch.float64)  # What the models are called with is drawn in this type.
    try:
        expected, found = logits_of(peft), logits_of(again)
    finally:
        torch.set_default_dtype(torch.float32)
    if expected is None or found is None:
        return float("inf")
    return float((expected - found).abs().max() / expected.abs().max())


def check_live(model_type: str, folder: Path) -> tuple[str, str]:
    """(verdict, detail) of one model type, injected."""
    base, adapter = folder / "base", folder / "adapter"
    model = tiny(model_type)
    model.save_pretrained(base)
    kind = type(model)
    plain = kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False).eval()
    peft = adapted(model)
    peft.save_pretrained(adapter, save_embedding_layers=False)
    expected = logits_of(peft)
    if expected is None:
        return check_layers(peft, plain, adapter, base)
    merged = logits_of(peft.merge_and_unload())
    largest, details = float(expected.abs().max()), []
    noise = 0.0 if merged is None else float((expected - merged).abs().max()) / largest
    given = adapterkit.read(adapter, base=base)
    before = logits_of(plain)
    for said, make in (("live", lambda: given), ("stored", lambda: given.bind(base))):
        try:
            handle = adapterkit.torch.inject(plain, make())
        except AdapterkitError as error:
            return "refused", f"{said}: {type(error).__name__}: {error}"
        found = logits_of(plain)
        handle.remove()
        difference = float("inf") if found is None else float((expected - found).abs().max()) / largest
        details.append(f"{said} {difference:.1e}")
        if LIMIT < difference <= 3 * noise:
            details[-1] += f" (PEFT's own merge {noise:.1e})"
        elif not difference <= LIMIT:
            return "wrong", ", ".join(details)
    effect = float((expected - before).abs().max()) / largest if before is not None else 0.0
    after = logits_of(plain)
    if before is None or after is None or not torch.equal(before, after):
        return "wrong", "removing the adapter does not restore the model"
    return ("right" if effect > LIMIT else "wrong"), f"{', '.join(details)} (the adapter's effect {effect:.1e})"


def layer_outputs(model: torch.nn.Module, widths: dict[str, int]) -> dict[str, torch.Tensor]:
    """What some layers of a model give for random inputs of their widths, by their names."""
    made = torch.Generator().manual_seed(4)
    with torch.no_grad():
        return {
            name: model.get_submodule(name)(torch.randn(3, width, generator=made)) for name, width in widths.items()
        }


def check_layers(peft: Any, plain: Any, adapter: Path, base: Path) -> tuple[str, str]:
    """(verdict, detail) of an injected model that cannot be run as a whole: layer by layer, and merged."""
    inner = peft.base_model.model
    widths = {name: module.in_features for name, module in inner.named_modules() if type(module) is Linear}
    expected, before = layer_outputs(inner, widths), layer_outputs(plain, widths)
    whole = {name: each.clone() for name, each in peft.merge_and_unload().named_parameters()}
    given, details = adapterkit.read(adapter, base=base), []
    for said, make in (("live", lambda: given), ("stored", lambda: given.bind(base))):
        try:
            handle = adapterkit.torch.inject(plain, make())
        except AdapterkitError as error:
            return "refused", f"{said}: {type(error).__name__}: {error}"
        distance, where = far(expected, layer_outputs(plain, widths))
        handle.remove()
        details.append(f"{said} {distance:.1e}")
        if distance > LIMIT:
            return "wrong", f"{', '.join(details)} at {where}"
    after = layer_outputs(plain, widths)
    if not all(torch.equal(each, after[name]) for name, each in before.items()):
        return "wrong", "removing the adapter does not restore the model"
    adapterkit.torch.inject(plain, given).merge_()
    distance, where = far(whole, dict(plain.named_parameters()))
    details.append(f"merged {distance:.1e}")
    if distance > LIMIT:
        return "wrong", f"{', '.join(details)} at {where}"
    effect = min((float((each - before[name]).abs().max()) for name, each in expected.items()), default=0.0)
    detail = f"{', '.join(details)}, {len(widths)} layers (the smallest effect {effect:.1e})"
    return ("right" if effect > LIMIT else "wrong"), detail


def check(model_type: str, folder: Path) -> tuple[str, str]:
    """(verdict, detail) of one model type."""
    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    model = tiny(model_type)
    model.save_pretrained(base)
    peft = adapted(model)
    peft.save_pretrained(adapter, save_embedding_layers=False)
    expected = logits_of(peft)
    whole = {k: v.clone() for k, v in peft.merge_and_unload().named_parameters()}
    merged_logits = logits_of(peft.base_model.model)
    noise = 0.0 if expected is None or merged_logits is None else float((expected - merged_logits).abs().max())
    try:
        report = adapterkit.merge(base, adapter, merged)
    except AdapterkitError as error:
        return "refused", f"{type(error).__name__}: {error}"
    kind = type(model)
    again, told = kind.from_pretrained(
        merged, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, trust_remote_code=False
    )
    lost = sorted({*told["missing_keys"], *told["unexpected_keys"]})
    distance, where = far(whole, dict(again.named_parameters()))
    if distance > LIMIT or lost:
        # What transformers itself loses of the base between saving and loading it is not the merge's.
        own, known = round_trip(model_type, kind, base)
        lost = [name for name in lost if name not in known]
        whole = {name: each for name, each in whole.items() if name not in own}
        distance, where = far(whole, dict(again.named_parameters()))
    detail = f"{report.plan.targets} tensors, weights {distance:.1e}"
    if distance > LIMIT or lost:
        return "wrong", f"{detail} at {where}; keys {lost[:3]}"
    found = logits_of(again.eval())
    if expected is not None and found is not None:
        largest = float(expected.abs().max())
        difference = float((expected - found).abs().max()) / largest
        detail += f", logits {difference:.1e}"
        if difference > LIMIT and difference > 3 * noise / largest:
            exact = exact_difference(model_type, kind, merged)
            detail += f", in float64 {exact:.1e}"
            if exact > LIMIT:
                return "wrong", detail
        elif difference > LIMIT:
            detail += " (PEFT's own merge is as far)"
    else:
        detail += ", no logits"
    return "right", detail


def main() -> int:
    """Check the model types that were asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--live", action="store_true", help="inject instead of merging")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    types = arguments.types or [t for several in FAMILIES.values() for t in several]
    counts: dict[str, int] = {}
    records = {}
    for model_type in types:
        with tempfile.TemporaryDirectory() as folder:
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    verdict, detail = (check_live if arguments.live else check)(model_type, Path(folder))
            except Exception as error:  # A model type that cannot be built or run is counted apart.
                verdict, detail = "not run", f"{type(error).__name__}: {str(error)[:140]}"
        counts[verdict] = counts.get(verdict, 0) + 1
        records[model_type] = [verdict, detail]
        print(f"{verdict:8} {model_type:24} {' '.join(detail.split())[:200]}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))
    return 1 if counts.get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
