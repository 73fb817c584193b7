"""Checks adapters together with fused kernels: Liger's, in Triton's interpreter, and those of the package `kernels`.

    TRITON_INTERPRET=1 python tools/foreign/check_kernels.py

Needs `triton`, `liger-kernel` and `kernels`, but not a GPU. Each kernel is applied to a small Llama before and after
the injection. A training step must give the loss and gradients of the model without the kernel, or adapterkit must
report that the kernel bypasses the adapter. The script prints a line for each kernel, and exits with 1 if one is wrong.

Triton 3.9's interpreter refuses the floats that Liger 0.8 passes, so this script converts them to tensors. The
interpreter cannot run Liger's norm, so the norm's forward is only installed and not called.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import adapterkit as ak
from adapterkit.errors import Unsupported

LIMIT = 2e-6
IDS = torch.arange(18).reshape(2, 9) * 7 % 64
LAYERS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
Patch = Callable[[Any], None]


def llama() -> Any:
    """A small Llama, always of the same weights, that trains."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    return transformers.LlamaForCausalLM(config).train()


def made(method: str, targets: list[str]) -> Any:
    """An adapter for it whose tensors are away from where they change nothing."""
    options: dict[str, Any] = {} if method == "ia3" else {"rank": 4}
    adapter = ak.torch.create(llama(), method, targets=targets, **options)
    generator = torch.Generator().manual_seed(1)
    return adapter.map(lambda leaf: torch.as_tensor(leaf) + 0.1 * torch.randn(leaf.shape, generator=generator))


def step(model: Any) -> list[torch.Tensor]:
    """The loss, and the gradients of all that is trained."""
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def liger(model: Any) -> None:
    """Liger's loss, multilayer perceptron and rotary embedding."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(
        model=model, rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=False, swiglu=True
    )


class Norm(nn.Module):
    """A norm as a hub has them: a forward that is bound to the model's own module."""

    has_backward = can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of the module that it is bound to."""
        own: Any = self
        found: torch.Tensor = own.weight * nn.functional.rms_norm(x, (x.shape[-1],), None, own.variance_epsilon)
        return found


class Repository:
    """What `kernels` loads a layer from."""

    layer_name = "Norm"

    def load(self) -> type[nn.Module]:
        """The layer's class."""
        return Norm


def hub(model: Any) -> None:
    """A norm by way of the package `kernels`."""
    from kernels import Mode, kernelize, register_kernel_mapping

    register_kernel_mapping({"RMSNorm": {"cpu": Repository()}})
    kernelize(model, mode=Mode.TRAINING, device="cpu")
    assert "forward" in model.model.norm.__dict__, "nothing was replaced"


def prepare() -> None:
    """Let transformers 5.24 take any version of `kernels`, and Triton's interpreter take floats."""
    import triton.language as tl
    from transformers.utils import import_utils
    from triton.runtime import interpreter

    # transformers decides when a model's module is imported, whether its layers carry names for `kernels`.
    versions: Any = import_utils.is_kernels_available
    versions.__wrapped__.__defaults__ = ("0", "99")
    known = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if type(value) is not float:
            return known(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = converted


CASES: list[tuple[str, Patch, str, list[str], str]] = [
    ("Liger", liger, "lora", LAYERS, ""),
    ("Liger", liger, "dora", LAYERS, ""),
    ("Liger", liger, "lora", ["lm_head"], "before and after"),
    ("Liger", liger, "dora", ["lm_head"], "before and after"),
    ("kernels", hub, "lora", LAYERS, ""),
    ("kernels", hub, "ia3", ["input_layernorm"], "after"),
]
"""Kernel, what puts it there, method, targets, and when it must be noticed that the kernel goes past the adapter."""


def main() -> int:
    """Run all cases; return the exit code."""
    warnings.simplefilter("ignore")
    prepare()
    wrong = 0
    for name, patch, method, targets, noticed in CASES:
        plain, adapter = llama(), made(method, targets)
        ak.torch.inject(plain, adapter, trainable=True)
        wanted = step(plain)
        for when in ("before", "after"):
            model = llama()
            if when == "before":
                patch(model)
            ak.torch.inject(model, adapter, trainable=True)
            if when == "after":
                patch(model)
            try:
                got = step(model)
                apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True))
                right, told = apart <= LIMIT and when not in noticed, f"apart by {apart:.1e}"
            except Unsupported as error:
                right, told = when in noticed, f"noticed: {error.args[0] if error.args else error}"
            wrong += not right
            print(f"{name} {when}, {method} at {', '.join(targets)}: {told}{'' if right else '  WRONG'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
