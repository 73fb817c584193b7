"""Merges PEFT adapters into tiny bases of many model types and compares with PEFT: right, refused or wrong.

    python tools/foreign/check_bases.py [MODEL_TYPE...] [--keep FOLDER]

A base is a tiny random model that transformers wrote by `save_pretrained`, as it is on hubs. The adapter is PEFT's, on
every linear layer and on every stack of experts (`target_parameters`). adapterkit merges it; the result is loaded by
transformers again. `right`: every parameter and the logits equal those of PEFT's model within 1e-4 of the largest.
`refused`: adapterkit raised one of its errors. Anything else is `wrong`. A base of another family must be refused.

Needs transformers 5.24 and PEFT 0.21.2.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
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
from peft import LoraConfig, get_peft_model  # noqa: E402
from tiny import tiny  # noqa: E402

import adapterkit  # noqa: E402
from adapterkit.errors import AdapterkitError  # noqa: E402

LIMIT = 1e-4


def experts_of(model: torch.nn.Module) -> list[str]:
    """Names of the 3-D parameters that PEFT adapts as stacks of experts."""
    found = [name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name]
    return [name for name in found if name.endswith(("gate_up_proj", "down_proj"))]


def linears_of(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers, without heads and routers that share a tensor with an embedding."""
    # PEFT refuses the output projection of Mamba, and subclasses of a linear layer that do more than one.
    off = "out_proj" if "mamba" in repr(model).lower() else "?"
    found = [
        (n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "Linear" in type(m).__name__
    ]
    found += [(n, m) for n, m in model.named_modules() if isinstance(m, transformers.pytorch_utils.Conv1D)]
    tied = {id(model.get_input_embeddings().weight)} if _embeds(model) else set()
    return [n for n, m in found if id(m.weight) not in tied and not n.endswith(off)]


def _embeds(model: Any) -> bool:
    try:
        return getattr(model.get_input_embeddings(), "weight", None) is not None
    except NotImplementedError:
        return False


def adapted(model: Any) -> Any:
    """PEFT's model with random factors at every linear layer and every stack of experts."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=linears_of(model), target_parameters=experts_of(model) or None,
        init_lora_weights=False,
    )  # fmt: skip
    found = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return found.eval()


def logits_of(model: Any) -> torch.Tensor | None:
    """What the model gives for a few tokens; None for a model that does not take tokens alone."""
    tokens = torch.arange(40, 52).reshape(2, 6)
    for extra in ({}, {"decoder_input_ids": tokens[:, :3]}):
        with torch.no_grad(), contextlib.suppress(Exception):
            given = model(input_ids=tokens, **extra)
            found = getattr(given, "logits", None)
            found = getattr(given, "last_hidden_state", None) if found is None else found
            if found is not None and torch.isfinite(found).all():
                return found
    return None


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of a parameter over its largest value, and whose it is."""
    worst, where = 0.0, ""
    for name, tensor in one.items():
        if name not in other:
            return float("inf"), f"{name} is missing"
        scale = float(tensor.abs().max()) if tensor.numel() else 0.0
        distance = float((tensor - other[name]).abs().max()) / (scale or 1.0) if tensor.numel() else 0.0
        if not distance <= worst:
            worst, where = distance, name
    return worst, where


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
    detail = f"{report.plan.targets} tensors, weights {distance:.1e}"
    if distance > LIMIT or lost:
        return "wrong", f"{detail} at {where}; keys {lost[:3]}"
    found = logits_of(again.eval())
    if expected is not None and found is not None:
        largest = float(expected.abs().max())
        difference = float((expected - found).abs().max()) / largest
        detail += f", logits {difference:.1e}"
        if difference > LIMIT and difference > 3 * noise / largest:
            return "wrong", detail
        if difference > LIMIT:
            detail += " (PEFT's own merge is as far)"
    else:
        detail += ", no logits"
    return "right", detail


def main() -> int:
    """Check the model types that were asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--json", type=Path)
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
                    verdict, detail = check(model_type, Path(folder))
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
