"""NeMo 1: a tar of a config and a torch file. Layout: nemo/collections/nlp/modules/common/megatron/adapters."""

from __future__ import annotations

import io
import tarfile

from fused import qkv, wanted
from sample import Sample, f32, pair
from torch_file import torch_file

CONFIG = """\
hidden_size: 16
kv_channels: 4
num_attention_heads: 4
num_layers: 2
num_query_groups: 2
peft:
  lora_tuning:
    adapter_dim: 2
    adapter_dropout: 0.0
    alpha: 4
    target_modules: [attention_qkv, mlp_fc2]
    variant: nemo
  peft_scheme: lora
pipeline_model_parallel_size: 1
tensor_model_parallel_size: 1
"""


def samples() -> dict[str, Sample]:
    """q, k and v fused, and a plain module."""
    A, B, updates = qkv("nemo.qkv", 0, 2.0)
    C, D = pair("nemo.fc2", 16, 24)
    factors = {"self_attention.adapter_layer.lora_kqv_adapter": (A, B), "mlp.adapter_layer.lora_4htoh_adapter": (C, D)}
    keys = {
        f"model.decoder.layers.0.{module}.{end}.weight": f32(factor)
        for module, both in factors.items()
        for end, factor in zip(("linear_in", "linear_out"), both, strict=True)
    }
    members = {"./model_config.yaml": CONFIG.encode(), "./model_weights.ckpt": torch_file(keys)}
    return {"lora": Sample({"adapter.nemo": _tar(members)}, [*updates, wanted("0.mlp.down_proj", C, D, 2.0)])}


def _tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()
