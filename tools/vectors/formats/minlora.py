"""minLoRA: parametrizations in a torch file; alpha in minlora.json. Layout: minlora/model.py of its repository."""

from __future__ import annotations

from fused import wanted
from sample import Sample, Wanted, f32, pair
from torch_file import torch_file

STEM = ".parametrizations.weight.0.lora_"


def samples() -> dict[str, Sample]:
    """A linear layer, and an embedding, whose factors stand the other way round."""
    A, B = pair("minlora.q", 16, 16)
    C, D = pair("minlora.embed", 16, 12)
    keys = {
        f"model.embed_tokens{STEM}A": f32(C.T), f"model.embed_tokens{STEM}B": f32(D.T),
        f"model.layers.0.self_attn.q_proj{STEM}A": f32(A), f"model.layers.0.self_attn.q_proj{STEM}B": f32(B),
    }  # fmt: skip
    embedding = Wanted("model.embed_tokens", {"A": C, "B": D}, {"scaling": 2.0}, layout="in out *k")
    files = {"lora.pt": torch_file(keys), "minlora.json": b'{"alpha": 4}'}
    return {"lora": Sample(files, [embedding, wanted("0.self_attn.q_proj", A, B, 2.0)])}
