"""Writes tests/data/adapterhub_blocks: outputs of the `adapters` library for compositions of adapters.

    python tools/foreign/adapterhub_blocks.py [DEST]

The model is the BERT of tests/data/adapterhub_outputs. Adapters and fusions are folders that the library saved; its
outputs are in `expected.safetensors`, in float64. Run it in an environment with `adapters` 1.3.0.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import adapters
import torch
from adapters import BnConfig
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack
from safetensors.torch import save_file
from transformers import AutoModel

DATA = Path(__file__).resolve().parents[2] / "tests" / "data"
CONFIGS = {
    "a": BnConfig(mh_adapter=True, output_adapter=True, reduction_factor=4, non_linearity="relu"),
    "b": BnConfig(mh_adapter=True, output_adapter=True, reduction_factor=2, non_linearity="gelu_new", scaling=0.5),
    "c": BnConfig(
        mh_adapter=False, output_adapter=True, reduction_factor=4, non_linearity="tanh", original_ln_before=True,
        residual_before_ln=False,
    ),
}  # fmt: skip
FUSIONS = {
    "dynamic": ("a,b", "dynamic"),
    "static": ("b,a", "static"),
    "before": ("a,b", {"residual_before": True, "query_before_ln": True, "value_before_softmax": False}),
    "normed": ("c,d", "dynamic"),
}
SETUPS = {
    "stack": Stack("a", "b"),
    "stack_back": Stack("b", "a"),
    "average": Average("a", "b", weights=[0.25, 0.75]),
    "split": Split("a", "b", splits=[2, 3]),
    "batch_split": BatchSplit("b", "a", batch_sizes=[1, 2]),
    "parallel": Parallel("a", "b"),
}
TREES = {
    **SETUPS,
    "average": Average("a", "b", weights=[1, 3]),
    "nested": Stack(Average("a", Split("b", "c", splits=[1, 4]), weights=[1, 1]), "d"),
    "parallel": Parallel("a", Stack("b", "c")),
    "dynamic": Fuse("a", "b"),
}
"""Compositions whose description is kept, as the library writes it."""

IDS = torch.tensor([[1, 5, 9, 2, 4], [2, 2, 7, 1, 0], [8, 3, 3, 10, 6]])


def fresh() -> torch.nn.Module:
    """The model with all adapters, in training by none."""
    torch.manual_seed(3)
    model = AutoModel.from_pretrained(DATA / "adapterhub_outputs" / "models" / "bert", trust_remote_code=False).double()
    model.config._name_or_path = model.config.name_or_path = "bert"  # Not the folder, which is another everywhere.
    adapters.init(model)
    for name, config in {**CONFIGS, "d": CONFIGS["c"]}.items():
        model.add_adapter(name, config)
    return model.double()


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model after everything but the base has values of its own."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name or "adapter_fusion_layer" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def main() -> int:
    """Writes all, each folder anew."""
    dest = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA / "adapterhub_blocks"
    shutil.rmtree(dest, ignore_errors=True)
    dest.mkdir(parents=True)
    model, expected = moved(fresh()), {"input_ids": IDS}
    for name in (*CONFIGS, "d"):
        model.save_adapter(str(dest / name), name)
    for name, setup in SETUPS.items():
        model.set_active_adapters(setup)
        expected[name] = model(IDS).last_hidden_state.detach().clone()
    for name, (names, config) in FUSIONS.items():
        model = moved(fresh())
        for adapter in (*CONFIGS, "d"):
            model.load_adapter(str(dest / adapter))
        own = config if isinstance(config, str) else adapters.AdapterFusionConfig.load("dynamic", **config)
        model.add_adapter_fusion(names.split(","), own)
        model.double()
        moved_fusion(model)
        model.set_active_adapters(Fuse(*names.split(",")))
        model.save_adapter_fusion(str(dest / name), names)
        expected[name] = model(IDS).last_hidden_state.detach().clone()
    version = "adapters." + adapters.__version__
    trees = {n: {"adapter_setup": t.to_dict(), "head_setup": None, "version": version} for n, t in TREES.items()}
    (dest / "setups.json").write_text(json.dumps(trees, indent=2), "utf-8")
    save_file(expected, dest / "expected.safetensors")
    return 0


def moved_fusion(model: torch.nn.Module) -> None:
    """Values for the attentions; their temperature, which sinks with each call, is at its end."""
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter_fusion_layer" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


if __name__ == "__main__":
    sys.exit(main())
