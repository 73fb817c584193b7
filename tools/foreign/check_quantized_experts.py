"""Quantizes tiny mixtures of experts with GPTQModel, merges PEFT adapters into the files and compares with PEFT.

    python tools/foreign/check_quantized_experts.py [gptq|awq]... [--types MODEL_TYPE...]

The base is a model that GPTQModel saved, with one packed weight per expert. The adapter is PEFT's, on the attention and
on the stacks of experts. `right` means two things. Merged into the dequantized base, every weight equals that of PEFT's
model on the weights that GPTQModel's layers dequantize, within `LIMITS` of the largest (the layers compute in 16 bits).
Quantized again, GPTQModel's layers read the file, and every weight is closer to the merged weight than the base's
weight is.

Needs gptqmodel 7.7, transformers 5.24 and PEFT 0.21.2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

# GPTQModel's pools of threads want more of them than a machine of two processors gives.
os.cpu_count = lambda: 8  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "architectures")]

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft_models import experts_of  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny import tiny  # noqa: E402

import adapterkit as ak  # noqa: E402

# PEFT asks for Optimum where GPTQModel is there, also for a model that is not quantized.
for _module in [each for name, each in sys.modules.items() if name.startswith("peft.")]:
    for _name in ("is_gptqmodel_available", "is_auto_gptq_available", "is_auto_awq_available"):
        if hasattr(_module, _name):
            setattr(_module, _name, lambda: False)

GROUP = 32
LIMITS = {"gptq": 1e-3, "awq": 1e-5}
"""How far the layers' own rounding to 16 bits may take a weight, over the largest.

GPTQModel saves AWQ's scales in the base's bfloat16, and its layers multiply in the type of their input: in float16 the
weights are the formula's rounded to float16, 2.9e-3 from those in bfloat16. The model is loaded in the file's type.
"""
WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32}


ON_HUBS = {"mixtral": {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}}
"""Model type -> words that GPTQModel writes in its experts' names -> those that transformers loads."""


def held_in(folder: Path, model_type: str) -> dict[str, torch.Tensor]:
    """Load all tensors of a folder, under names that transformers loads."""
    words, found = ON_HUBS.get(model_type, {}), dict[str, torch.Tensor]()
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return {".".join(words.get(word, word) for word in name.split(".")): each for name, each in found.items()}


def quantize(kind: str, base: Path, out: Path) -> None:
    """Let GPTQModel quantize a base over drawn tokens."""
    from gptqmodel import GPTQModel, QuantizeConfig

    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 95, (1, 64), generator=draw) for _ in range(32)]
    config = QuantizeConfig(
        bits=4, group_size=GROUP, sym=False, desc_act=False, quant_method=kind, device="cpu",
        format="gptq" if kind == "gptq" else "gemm",
    )  # fmt: skip
    model = GPTQModel.load(str(base), config)
    model.quantize([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens], batch_size=1)
    model.save(str(out))


def with_tokenizer(folder: Path) -> None:
    """Put a tokenizer of words beside a base: GPTQModel does not load one without."""
    from tokenizers import Tokenizer, models

    words = {**{f"w{n}": n for n in range(95)}, "<unk>": 95}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    kept = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="w1", eos_token="w2"
    )
    kept.save_pretrained(folder)


def dequantize(kind: str, folder: Path, out: Path) -> None:
    """Write the weights of a quantized base by GPTQModel's own layers, in float32, and the others as they are."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    held: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        held |= load_file(file)
    found = {name: each.float() for name, each in held.items() if name.endswith(".weight")}
    for name in [name for name in held if name.endswith(".qweight")]:
        stem = name.removesuffix("qweight")
        width = held[f"{stem}scales"].shape[1]
        in_ = held[name].shape[0] * (8 if kind == "gptq" else 1)
        dtype = torch.float16 if kind == "gptq" else held[f"{stem}scales"].dtype
        layer: Any = (TorchLinear if kind == "gptq" else AwqTorchLinear)(
            bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=in_, out_features=width, bias=False,
            register_buffers=True, **({} if kind == "gptq" else {"dtype": dtype}),
        )  # fmt: skip
        for part, buffer in layer.named_buffers():
            buffer.copy_(held[f"{stem}{part}"])
        layer.optimize = lambda *_, **__: None
        if kind == "gptq":  # The file has zero points less one; its loader adds it, and the layer computes without.
            convert_gptq_v1_to_v2_format_module(layer, 4, torch.int32)
        layer.post_init()
        # What the layer makes of the unit vectors is its weight, whatever it calls it.
        with torch.no_grad():
            found[f"{stem}weight"] = layer(torch.eye(in_, dtype=dtype)).T.float()
    out.mkdir()
    save_file({name: each.contiguous() for name, each in found.items()}, out / "model.safetensors", {"format": "pt"})


def apart(step: str, kind: str, *folders: Path) -> None:
    """Run a step in its own process: where GPTQModel is imported, it takes transformers' stacks of experts apart."""
    subprocess.run(
        [sys.executable, __file__, kind, "--step", step, *map(str, folders)], check=True, stdout=subprocess.DEVNULL
    )


def check(kind: str, model_type: str, folder: Path) -> str:
    """The verdict on one method and model type."""
    plain = tiny(model_type, **WIDE)
    plain.save_pretrained(folder / "base")
    with_tokenizer(folder / "base")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "o_proj"], target_parameters=experts_of(plain))
    tuned = get_peft_model(plain, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    tuned.save_pretrained(folder / "adapter")
    apart("quantize", kind, folder / "base", folder / "quantized")
    apart("dequantize", kind, folder / "quantized", folder / "dense")
    before = held_in(folder / "dense", model_type)
    save_file(before, folder / "dense/model.safetensors", {"format": "pt"})
    (folder / "dense/config.json").write_bytes((folder / "base/config.json").read_bytes())
    dense = type(plain).from_pretrained(folder / "dense", dtype=torch.float32)
    PeftModel.from_pretrained(dense, folder / "adapter").merge_and_unload().save_pretrained(folder / "peft")
    expected = held_in(folder / "peft", model_type)
    ak.merge(folder / "quantized", folder / "adapter", folder / "merged", quantized="dequantize", dtype="float32")
    got = held_in(folder / "merged", model_type)
    changed = [name for name, each in expected.items() if not torch.equal(each, before[name])]
    far = max(float((expected[name] - got[name]).abs().max() / expected[name].abs().max()) for name in expected)
    ak.merge(folder / "quantized", folder / "adapter", folder / "again", quantized="requantize")
    apart("dequantize", kind, folder / "again", folder / "after")
    after = held_in(folder / "after", model_type)
    left = [float((after[n] - expected[n]).norm() / (before[n] - expected[n]).norm()) for n in changed]
    verdict = "right" if far < LIMITS[kind] and set(got) == set(expected) and max(left) < 1 else "wrong"
    return f"{verdict}: {len(changed)} weights, dequantized {far:.1e}, quantized again at most {max(left):.2f} lost"


def main() -> int:
    """Check the methods and model types that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["gptq", "awq"])
    parser.add_argument("--types", nargs="+", default=["qwen3_moe", "mixtral"])
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.step:
        step, given, out = arguments.step
        {"quantize": quantize, "dequantize": dequantize}[step](arguments.kinds[0], Path(given), Path(out))
        return 0
    transformers.logging.set_verbosity_error()
    failed = 0
    for kind in arguments.kinds:
        for model_type in arguments.types:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = check(kind, model_type, Path(folder))
                except Exception as error:  # What the library cannot quantize here is said, and the others go on.
                    found = f"not run: {type(error).__name__}: {str(error)[:200]}"
            failed += found.startswith("wrong")
            print(f"{kind:5} {model_type:12} {found}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
