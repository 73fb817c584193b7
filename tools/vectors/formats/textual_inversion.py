"""Embeddings of new tokens: what diffusers, kohya's trainer, SDXL's and AUTOMATIC1111 write.

Layouts: diffusers' loaders/textual_inversion.py; sd-scripts' train_textual_inversion.py and its sdxl_ twin; modules/
textual_inversion of AUTOMATIC1111's web UI.
"""

from __future__ import annotations

from container import layout, numbers, pack
from sample import Sample, Wanted, f32
from torch_file import torch_file

FIRST = "text_encoder.text_model.embeddings.token_embedding"
SECOND = "text_encoder_2.text_model.embeddings.token_embedding"


def samples() -> dict[str, Sample]:
    """One sample a format."""
    one, two, wide = (numbers(f"inversion.{n}", n, d) for n, d in ((1, 8), (3, 8), (2, 12)))
    automatic = {
        "string_to_token": {"*": 265}, "string_to_param": {"*": f32(two)}, "name": "cat", "step": 99,
        "sd_checkpoint": None, "sd_checkpoint_name": None,
    }  # fmt: skip
    return {
        "diffusers": Sample({"learned_embeds.safetensors": _file({"<cat>": one[0]})}, [_wanted(FIRST, one, "<cat>")]),
        "kohya": Sample({"cat.safetensors": _file({"emb_params": two})}, [_wanted(FIRST, two, "cat")]),
        "sdxl": Sample(
            {"cat.safetensors": _file({"clip_g": wide, "clip_l": two})},
            [_wanted(SECOND, wide, "cat"), _wanted(FIRST, two, "cat")],
        ),
        "automatic1111": Sample({"x.pt": torch_file(automatic)}, [_wanted(FIRST, two, "cat")]),
    }


def _file(tensors: dict[str, object]) -> bytes:
    return pack(*layout({name: f32(array) for name, array in tensors.items()}))  # type: ignore[arg-type]


def _wanted(path: str, rows: object, token: str) -> Wanted:
    return Wanted(path, {"P": rows}, {"token": token}, "textual_inversion")  # type: ignore[dict-item]
