"""Checks adapters in live layers of quantization libraries on the CPU: a table of forward, training and merging.

    python tools/foreign/check_quantized_live.py

Needs some of bitsandbytes, torchao, optimum-quanto, hqq, autoawq and gptqmodel; the script lists libraries that are
missing, or that cannot quantize on this machine. transformers 5 loads GPTQ and AWQ models with gptqmodel's layers;
`BUILD_CUDA_EXT=0 pip install --no-build-isolation gptqmodel` builds gptqmodel without CUDA. The reference is the
formula on the weights that the library computes with. `right`: the result is as close to the reference as the library's
own forward, up to a thousandth more. `refused`: adapterkit raised one of its errors.
"""

from __future__ import annotations

import sys
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

INPUTS, OUTPUTS = 256, 64


def base() -> nn.Sequential:
    """One linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, OUTPUTS))


def bitsandbytes() -> dict[str, Callable[[], nn.Module]]:
    """4 bits and 8 bits."""
    import bitsandbytes as bnb

    def loaded(layer: nn.Module) -> nn.Module:
        layer.load_state_dict(base()[0].state_dict())
        return nn.Sequential(layer).to("cpu")

    return {
        "bitsandbytes nf4": lambda: loaded(
            bnb.nn.Linear4bit(INPUTS, OUTPUTS, compute_dtype=torch.float32, quant_type="nf4")
        ),
        "bitsandbytes int8": lambda: loaded(bnb.nn.Linear8bitLt(INPUTS, OUTPUTS, has_fp16_weights=False)),
    }


def torchao() -> dict[str, Callable[[], nn.Module]]:
    """Integers and float8, by its configs."""
    from torchao import quantization

    def quantized(config: Any, dtype: torch.dtype) -> nn.Module:
        model = base().to(dtype)
        quantization.quantize_(model, config())
        return model

    names = (
        "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Int4WeightOnlyConfig",
        "Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig", "IntxWeightOnlyConfig",
    )  # fmt: skip
    found = [(name, getattr(quantization, name)) for name in names if hasattr(quantization, name)]
    dtypes = {"Int4WeightOnlyConfig": torch.bfloat16}
    return {
        f"torchao {name}": lambda config=config, name=name: quantized(config, dtypes.get(name, torch.float32))
        for name, config in found
    }


def quanto() -> dict[str, Callable[[], nn.Module]]:
    """Frozen layers, and layers that quantize in each forward."""
    from optimum import quanto

    def quantized(name: str, frozen: bool) -> nn.Module:
        model = base()
        quanto.quantize(model, weights=getattr(quanto, name))
        if frozen:
            quanto.freeze(model)
        return model

    return {
        f"quanto {name}{'' if frozen else ', not frozen'}": lambda name=name, frozen=frozen: quantized(name, frozen)
        for name in ("qint8", "qint4", "qint2", "qfloat8")
        for frozen in (True, False)
    }


def hqq() -> dict[str, Callable[[], nn.Module]]:
    """4 bits in groups of 32."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def quantized() -> nn.Module:
        config = BaseQuantizeConfig(nbits=4, group_size=32)
        return nn.Sequential(HQQLinear(base()[0], config, compute_dtype=torch.float32, device="cpu"))

    return {"hqq": quantized}


def awq() -> dict[str, Callable[[], nn.Module]]:
    """AutoAWQ's layer for GEMM, as transformers puts it in; its scales by the largest weight of a group."""
    from awq.modules.linear import gemm
    from awq.modules.linear.gemm import WQLinear_GEMM

    gemm.TRITON_AVAILABLE = False  # With Triton beside it, 0.2.9 takes that on the CPU too, and fails by itself.

    def quantized() -> nn.Module:
        layer = base()[0].half()
        scales = (layer.weight.data.view(OUTPUTS, -1, 32).abs().amax(2) / 7).half()
        zeros = torch.full_like(scales, 8)
        return nn.Sequential(WQLinear_GEMM.from_linear(layer, 4, 32, scales=scales.t(), zeros=zeros.t()))

    return {"autoawq": quantized}


def gptqmodel() -> dict[str, Callable[[], nn.Module]]:
    """The layers for GPTQ and AWQ that run on a CPU, over drawn integers, in 4 and 8 bits."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    def quantized(kind: Any, bits: int, scale: float) -> nn.Module:
        draw = torch.Generator().manual_seed(2)
        layer: Any = kind(
            bits=bits, group_size=32, sym=False, desc_act=False, in_features=INPUTS, out_features=OUTPUTS, bias=True,
            register_buffers=True,
        )  # fmt: skip
        for name, held in layer.named_buffers():
            if name in ("qweight", "qzeros"):
                held.copy_(torch.randint(-(2**31), 2**31 - 1, held.shape, generator=draw))
            elif name == "scales":
                held.copy_((torch.rand(held.shape, generator=draw) + 0.5) * scale)
            elif name == "bias":
                held.copy_(torch.randn(held.shape, generator=draw))
        layer.optimize = lambda *_, **__: None  # It compiles its unpacking, which is not what is compared.
        layer.post_init()
        return nn.Sequential(layer.eval())

    return {
        "gptqmodel GPTQ, 4 bits": lambda: quantized(TorchLinear, 4, 0.01),
        "gptqmodel GPTQ, 8 bits": lambda: quantized(TorchLinear, 8, 0.001),
        "gptqmodel AWQ, 4 bits": lambda: quantized(AwqTorchLinear, 4, 0.01),
    }


def updates() -> dict[str, Any]:
    """One method of each make: beside the weight, a change of it, a scale."""
    draw = torch.Generator().manual_seed(1)
    A, B = torch.randn(2, INPUTS, generator=draw), torch.randn(OUTPUTS, 2, generator=draw)
    size = torch.rand(OUTPUTS, generator=draw) + 0.5
    return {
        "lora": METHODS["lora"](A=A, B=B, scaling=0.05),
        "dora": METHODS["dora"](A=A, B=B, magnitude=size),
        "ia3": METHODS["ia3"](l=size),
    }


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that the model takes."""
    tensors = (*model.parameters(), *model.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1), torch.float32)


@torch.no_grad()
def forward(make: Callable[[], nn.Module], update: Any) -> str:
    """Compare with the formula over the weight that the library computes with."""
    model = make()
    dtype = dtype_of(model)
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(4)).to(dtype)
    b = model(torch.zeros(1, INPUTS, dtype=dtype)).float()
    W = (model(torch.eye(INPUTS, dtype=dtype)).float() - b).T
    own = (model(x).float() - (x.float() @ W.T + b)).abs().max()
    ak.torch.inject(model, Adapter({Target("0"): (update,)}))
    wanted = x.float() @ update.new_weight(W).T + update.new_bias(b[0])
    apart = (model(x).float() - wanted).abs().max()
    most = 2 * own + max(1e-3, torch.finfo(dtype).eps * 4) * wanted.abs().max()
    return "right" if apart <= most else f"OFF by {float(apart):.1e}"


def trains_alone(make: Callable[[], nn.Module]) -> bool:
    """Whether the library's own layer has a backward pass here."""
    model = make().train()
    try:
        model(torch.ones(5, INPUTS, dtype=dtype_of(model), requires_grad=True)).float().sum().backward()
    except Exception:
        return False
    return True


def training(make: Callable[[], nn.Module], _: Any) -> str:
    """A fresh adapter gets a gradient."""
    model = make()
    handle = ak.torch.inject(model, ak.torch.create(model, "lora", targets="0", rank=2), trainable=True)
    if not trains_alone(make):  # AutoAWQ has no backward pass of its own without its CUDA code.
        model.eval()
    else:
        model.train()
    model(torch.ones(5, INPUTS, dtype=dtype_of(model))).float().square().sum().backward()
    return "right" if any(float(p.grad.abs().sum()) > 0 for p in handle.parameters()) else "NO GRADIENT"


def merging(make: Callable[[], nn.Module], update: Any) -> str:
    """`merge_`, which must change nothing where it refuses."""
    model = make()
    x = torch.ones(1, INPUTS, dtype=dtype_of(model))
    handle = ak.torch.inject(model, Adapter({Target("0"): (update,)}))
    before = model(x)
    try:
        handle.merge_()
    except AdapterkitError:
        return "refused" if torch.equal(model(x), before) else "CHANGED"
    return "merged"


def said(check: Callable[..., str], *given: Any) -> str:
    """The check's result, or the error."""
    try:
        return check(*given)
    except AdapterkitError as error:
        return f"refused ({type(error).__name__})"
    except Exception as error:
        return f"FOREIGN {type(error).__name__}"


def main() -> int:
    """Print the table; 1 if anything is neither right nor refused."""
    warnings.filterwarnings("ignore")
    print(f"{'':44} {'lora':20} {'dora':20} {'ia3':20} {'training':12} merge_")
    faults = 0
    for library in (bitsandbytes, torchao, quanto, hqq, awq, gptqmodel):
        try:
            found = library()
        except Exception as error:
            print(f"{library.__name__:44} not here: {type(error).__name__}: {str(error)[:80]}")
            continue
        for name, make in found.items():
            try:
                make()
            except Exception as error:
                print(f"{name:44} cannot be built here: {type(error).__name__}: {str(error)[:70]}")
                continue
            row = [said(forward, make, update) for update in updates().values()]
            row += [said(training, make, None), said(merging, make, updates()["lora"])]
            faults += sum(cell.split()[0] not in ("right", "refused") for cell in row)
            print(f"{name:44} {row[0]:20} {row[1]:20} {row[2]:20} {row[3]:12} {row[4]}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
