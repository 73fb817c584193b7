"""NOLA's reference implementation: seeds of torch's generator in a torch file. Layout: gpt2 of its repository.

The numbers are drawn by numpy's Mersenne twister, which torch's generator on the CPU is as well: of each word of 32
bits the lower 24, over 2^24, put between -1 and 1.
"""

from __future__ import annotations

import numpy as np
from container import numbers, stored
from layers import Array
from sample import Sample, Wanted, f32
from torch_file import torch_file


def samples() -> dict[str, Sample]:
    """The value of an attention: the last third of the outputs of GPT-2's fused weight."""
    A, B, alpha, beta = (
        numbers(f"nola.file.{n}", *s) for n, s in (("A", (2, 8)), ("B", (8, 2)), ("a", (3,)), ("b", (2,)))
    )
    keys = {}
    for factor, weight, seed, mix in (("A", A, 7, alpha), ("B", B, 12345678901, beta)):
        stem = f"transformer.h.0.attn.nola_value.lora_{factor}"
        keys |= {
            f"{stem}.weight": f32(weight), f"{stem}.seed": stored(np.array([seed]), "I64"),
            f"{stem}.coefficients": f32(mix),
        }  # fmt: skip
    tensors = {
        "alpha": alpha, "beta": beta, "A_bases": drawn(7, 3, 2, 8), "B_bases": drawn(12345678901, 2, 8, 2),
        "A0": A, "B0": B,
    }  # fmt: skip
    update = Wanted("transformer.h.0.attn.c_attn", tensors, {"scaling": 3.0}, "nola", "in out *k", (16, 24))
    files = {"model.pt": torch_file({"model_state_dict": keys}), "nola.json": b'{"alpha": 6, "device": "cpu"}'}
    return {"value": Sample(files, [update])}


def drawn(seed: int, *shape: int) -> Array:
    """`torch.empty(shape).uniform_(-1, 1)` behind `manual_seed(seed)`, on the CPU."""
    words = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 1 << 32, int(np.prod(shape)), dtype=np.uint64)
    return ((words & 0xFFFFFF).astype("f4") / np.float32(1 << 24) * np.float32(2) - np.float32(1)).reshape(shape)
