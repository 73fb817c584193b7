"""Names of GGUF and MLX-LM for entries that transformers gave."""

from __future__ import annotations

import re

import gguf
from entries import HUB, Entries

GGUF = {
    "mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "ernie4_5": "ernie4_5", "gpt_oss": "gpt-oss",
    "hunyuan_v1_moe": "hunyuan-moe", "hunyuan_v1_dense": "hunyuan-dense", "minimax_m2": "minimax-m2",
    "smollm3": "smollm3", "cohere": "command-r", "deepseek_v3": "deepseek2", "deepseek_v2": "deepseek2",
    "glm4_moe": "glm4moe", "ernie4_5_moe": "ernie4_5-moe", "granitemoe": "granite", "gpt_neox": "gptneox",
    "phi": "phi2", "seed_oss": "seed_oss",
}  # fmt: skip
"""model_type -> general.architecture, where it is more than the name without underscores."""

ROPE = {"llama"}
"""Architectures for which llama.cpp's converter puts the rows of q and k in Meta's order."""

SHARED_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def gguf_names(entries: Entries, model_types: list[str]) -> bool:
    """Add the naming `gguf` where gguf-py has the family; says whether it has."""
    names = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    kinds = {GGUF.get(t, t.replace("_", "")) for t in model_types}
    if len(kinds) != 1 or (kind := kinds.pop()) not in names:
        return False
    table = gguf.get_tensor_name_map(names[kind], 8)
    found: dict[str, str] = {}
    for weight, places in entries.weights.items():
        name = places.get(HUB, {"name": weight})
        if "part" in name:
            continue
        own = re.sub(r"\{[nmk]\}", "5", name["name"].replace("experts.{e}.", "experts."), count=1)
        theirs = table.get_name(own)
        if theirs is not None and "{" not in own and theirs not in found:
            found[theirs] = weight
            place = {"name": theirs.replace(".5.", ".{n}.")}
            if "{e}" in weight:
                place["stacked"] = True
            heads = {"attn_q": "query", "attn_k": "kv"}.get(theirs.rpartition(".")[2])
            if kind in ROPE and heads:
                place |= {"rows": "rope", "heads": heads}
            places["gguf"] = place
    return bool(found)


def mlx_names(entries: Entries) -> bool:
    """Add the naming `mlx` for experts, which MLX-LM stacks; its other names are those of the hub."""
    found = False
    for weight, places in entries.weights.items():
        place = places.get(HUB, {"name": weight})
        hub = place["name"]
        if "half" in place:
            continue  # MLX-LM has no model with two kinds of experts in one list.
        if "experts.{e}." not in hub or "{e}" not in weight:
            continue
        leaf = weight.rpartition(".")[2]
        if leaf in SHARED_EXPERTS:
            stem = hub.partition("experts.{e}.")[0]
            places["mlx"] = {"name": f"{stem}switch_mlp.{leaf}", "stacked": True}
            found = True
    return found
