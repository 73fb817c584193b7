"""Checks adapters in whole models that transformers' `from_pretrained` loads quantized, on the CPU.

    python tools/foreign/check_quantized_models.py [--only NAME]...

Each model is a tiny Llama, which is saved by the library's quantizer or in its checkpoint layout, and loaded again. An
adapter on every linear layer except the head is injected, and compared with the formula on the weights that the loaded
model computes with. Then a new adapter is trained for a few steps, which must lower the loss and not change the base.
Then `merge_` must merge, or refuse without changing anything. The script lists libraries that are not installed or
cannot be loaded here. It exits with 1 if a cell is neither right nor refused.

GPTQ: gptqmodel and optimum. AWQ: gptqmodel. Others: torchao, optimum-quanto, bitsandbytes, hqq.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError
from adapterkit.methods import METHODS

WIDTH, INNER, GROUP = 128, 256, 32
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base() -> Any:
    """A Llama of random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def by_config(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Save the plain model, and let `from_pretrained` quantize it."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        base().to(dtype).save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=dtype, device_map="cpu"
        )


def packed(folder: str, layout: str, config: dict[str, Any]) -> None:
    """Write the model with every linear layer but the head packed in 4 bits, as GPTQ or AWQ lay them out."""
    import json

    from safetensors.torch import save_file

    model = base().half()
    state = {}
    targets = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    draw = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        if path not in targets or kind != "weight":
            state[name] = tensor.clone()
            continue
        out, into = tensor.shape
        q = torch.randint(0, 16, (into, out), generator=draw)
        zeros = torch.randint(0, 15, (into // GROUP, out), generator=draw)
        scales = (torch.rand(into // GROUP, out, generator=draw) * 0.004 + 0.002).half()
        if layout == "gptq":
            state[f"{path}.qweight"] = _bits(q.view(into // 8, 8, out).transpose(1, 2))
            state[f"{path}.qzeros"] = _bits(zeros.view(into // GROUP, out // 8, 8))  # One less, as GPTQ stores it.
            state[f"{path}.g_idx"] = torch.arange(into, dtype=torch.int32) // GROUP
        else:
            order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
            state[f"{path}.qweight"] = _bits(q.view(into, out // 8, 8)[..., order])
            state[f"{path}.qzeros"] = _bits(zeros.view(into // GROUP, out // 8, 8)[..., order])
        state[f"{path}.scales"] = scales
    state.pop("lm_head.weight") if model.config.tie_word_embeddings else None
    save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
    words = model.config.to_dict() | {"quantization_config": config, "dtype": "float16", "torch_dtype": "float16"}
    words["architectures"] = ["LlamaForCausalLM"]
    Path(folder, "config.json").write_text(json.dumps(words))


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Eight numbers of 4 bits on the last axis, as one of 32."""
    whole = torch.zeros(values.shape[:-1], dtype=torch.int64)
    for place in range(8):
        whole |= values[..., place].long() << (4 * place)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)


def by_layout(layout: str, dtype: torch.dtype) -> Any:
    """Load a checkpoint in the layout of GPTQ or AWQ."""
    import transformers

    config = {"quant_method": layout, "bits": 4, "group_size": GROUP}
    if layout == "gptq":
        config |= {"desc_act": False, "sym": False, "checkpoint_format": "gptq", "backend": "torch"}
    else:
        config |= {"zero_point": True, "version": "gemm", "backend": "torch_awq", "modules_to_not_convert": ["lm_head"]}
    with tempfile.TemporaryDirectory() as folder:
        packed(folder, layout, config)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")


def kinds() -> dict[str, Callable[[], Any]]:
    """Name -> how such a model is loaded."""
    import transformers

    def torchao(name: str) -> Any:
        from torchao import quantization

        config = transformers.TorchAoConfig(getattr(quantization, name)())
        return by_config(config, torch.bfloat16 if name.startswith(("Int4", "Float8")) else torch.float32)

    found: dict[str, Callable[[], Any]] = {
        "GPTQ, float16": lambda: by_layout("gptq", torch.float16),
        "GPTQ, bfloat16": lambda: by_layout("gptq", torch.bfloat16),
        "AWQ, float16": lambda: by_layout("awq", torch.float16),
    }
    for name in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Int4WeightOnlyConfig",
                 "Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig"):  # fmt: skip
        found[f"torchao {name}"] = lambda name=name: torchao(name)
    for name in ("int8", "int4", "int2", "float8"):
        found[f"quanto {name}"] = lambda name=name: by_config(transformers.QuantoConfig(weights=name))
    for name, told in {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True},
    }.items():
        found[f"bitsandbytes {name}"] = lambda told=told: by_config(transformers.BitsAndBytesConfig(**told))
    found["hqq 4 bits"] = lambda: by_config(transformers.HqqConfig(nbits=4, group_size=GROUP), torch.float32)
    return found


def adapter(method: str) -> Adapter:
    """One update on every linear layer but the head."""
    draw = torch.Generator().manual_seed(1)
    updates = {}
    for layer in range(2):
        for name in NAMES:
            out = INNER if name in ("gate_proj", "up_proj") else WIDTH
            into = INNER if name == "down_proj" else WIDTH
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            A, B = torch.randn(2, into, generator=draw), torch.randn(out, 2, generator=draw)
            size = torch.rand(out, generator=draw) + 0.5
            update = {
                "lora": lambda A=A, B=B: METHODS["lora"](A=A, B=B, scaling=0.02),
                "dora": lambda A=A, B=B, s=size: METHODS["dora"](A=A, B=B, magnitude=s, scaling=0.02),
                "ia3": lambda s=size: METHODS["ia3"](l=s),
            }[method]()
            updates[Target(f"model.layers.{layer}.{block}.{name}")] = (update,)
    return Adapter(updates)


IDS = torch.tensor([[3, 9, 27, 5, 5, 60, 2, 11]])


@torch.no_grad()
def plain_twin(model: Any) -> Any:
    """A float32 Llama over the weights that the quantized model computes with: each layer is read by an identity."""
    twin = base().float()
    for name, module in twin.named_modules():
        theirs = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            dtype = dtype_of(model)
            b = theirs(torch.zeros(1, module.in_features, dtype=dtype)).float()
            module.weight.copy_((theirs(torch.eye(module.in_features, dtype=dtype)).float() - b).T)
        elif hasattr(module, "weight"):
            module.weight.copy_(theirs.weight.float())
    return twin.eval()


def dtype_of(model: Any) -> torch.dtype:
    """The dtype of hidden states."""
    found: torch.dtype = model.model.embed_tokens.weight.dtype
    return found


@torch.no_grad()
def forward(load: Callable[[], Any], method: str) -> str:
    """Compare with the same adapter merged into a float32 twin; the library's own error without it is the measure."""
    model = load().eval()
    twin = plain_twin(model)
    before = model(IDS).logits.float()
    own = float((before - twin(IDS).logits).abs().max())
    handle = ak.torch.inject(model, adapter(method))
    got = model(IDS).logits.float()
    ak.torch.inject(twin, adapter(method)).merge_()
    wanted = twin(IDS).logits
    handle.remove()
    if not torch.equal(model(IDS).logits.float(), before):
        return "NOT UNDONE"
    # Int8 and float8 activations are rounded by what is in them, so that two inputs differ by their step.
    most = 4 * own + max(2e-3, 8 * torch.finfo(dtype_of(model)).eps) * float(wanted.abs().max())
    apart = float((got - wanted).abs().max())
    return f"right {apart:.0e}" if apart <= most else f"OFF by {apart:.1e}, own {own:.1e}"


def training(load: Callable[[], Any], _: Any) -> str:
    """Five steps of AdamW lower the loss, and leave the base's bits."""
    model = load()
    fresh = ak.torch.create(model, "lora", targets=list(NAMES), rank=4)
    handle = ak.torch.inject(model, fresh, trainable=True)
    model.train()
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    after = model.state_dict()
    same = all(_same(after[name], tensor) for name, tensor in bits.items())
    if not same:
        return "BASE CHANGED"
    return f"right {losses[0]:.1f}>{losses[-1]:.1f}" if losses[-1] < 0.9 * losses[0] else f"NOT TRAINED {losses}"


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(torch.equal(one, other))
    except Exception:
        return bool(torch.equal(one.dequantize(), other.dequantize()))


@torch.no_grad()
def merging(load: Callable[[], Any], _: Any) -> str:
    """`merge_`, which must change nothing where it refuses."""
    model = load().eval()
    handle = ak.torch.inject(model, adapter("lora"))
    before = model(IDS).logits
    try:
        handle.merge_()
    except AdapterkitError as error:
        return f"refused ({type(error).__name__})" if torch.equal(model(IDS).logits, before) else "CHANGED"
    return "MERGED"


def said(check: Callable[..., str], *given: Any) -> str:
    """The check's result, or the error."""
    try:
        return check(*given)
    except AdapterkitError as error:
        return f"refused ({type(error).__name__})"
    except Exception as error:
        return f"FOREIGN {type(error).__name__}: {str(error)[:60]}"


def main() -> int:
    """Print the table; 1 if anything is neither right nor refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="part of a name")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # gptqmodel compiles its unpacking, which is not what is compared.
    faults = 0
    for name, load in kinds().items():
        if options.only and not any(each in name for each in options.only):
            continue
        try:
            model = load()
            model(IDS)
            layers = sorted({type(m).__name__ for n, m in model.named_modules() if n.endswith("proj")})
            weight = getattr(model.model.layers[0].self_attn.q_proj, "weight", None)
            kind = f"{'/'.join(layers)}({type(weight).__name__})"
        except Exception as error:
            print(f"{name:46} not here: {type(error).__name__}: {str(error)[:90]}", flush=True)
            continue
        row = [said(forward, load, method) for method in ("lora", "dora", "ia3")]
        row += [said(training, load, None), said(merging, load, None)]
        faults += sum(cell.split()[0] not in ("right", "refused") for cell in row)
        print(f"{name:46} {kind:36} " + "  ".join(row), flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
