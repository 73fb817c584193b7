"""Which attentions the library puts prefixes at, by groups, and what a new config cannot say of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....io.checkpoint import Checkpoint

ENCODER_DECODER = ("bart", "mbart", "mt5", "plbart", "t5", "whisper")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
ATTENTIONS = {
    **dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta"), (".attention.self",)),
    **dict.fromkeys(("llama", "mistral"), (".self_attn",)),
    **dict.fromkeys(("mt5", "t5"), (".SelfAttention", ".EncDecAttention")),
    **dict.fromkeys(("bart", "mbart", "plbart"), (".self_attn", ".encoder_attn")),
    "gpt2": (".attn",),
}
"""model_type -> the attentions that new folders can be written for."""

DEPTHS = {
    "encoder_prefix": ("encoder_layers", "num_layers"),
    "self_prefix": ("decoder_layers", "num_decoder_layers", "num_layers"),
    "cross_prefix": ("decoder_layers", "num_decoder_layers", "num_layers"),
}
"""Group -> how a config with an encoder and a decoder says the number of its layers."""


def why_not(target: Target, update: Any, first: Any, model_type: str | None) -> str:
    """Why a new config cannot say it: the library fills all attentions of the layers that are not left out."""
    endings = ATTENTIONS.get(model_type or "")
    if endings is None:
        return "the library fills attentions that are left out, and which there are only the base tells"
    if not target.path.endswith(endings):
        return f"not an attention where the library puts prefixes in a {model_type}"
    if "P" in update.tensors:
        return (
            ""
            if update.P.shape[0] == 1 and update.attributes.get("step", 1) == 1
            else "keys and values of several layers"
        )
    shared = all(update.tensors[name] is first.tensors[name] for name in ("E", "W1", "b1"))
    return "" if shared and update.b2.shape[0] == 1 else "a network of its own, where the library has one for all"


def lacking(counts: Mapping[str, int], group: str, base: Checkpoint | None) -> str:
    """Why a group of a model with an encoder and a decoder is not whole: there the library leaves no layer out.

    The base's tensors are counted, because its config need not name a depth that is the default of its family.
    """
    config = {} if base is None else base.config or {}
    model_type = config.get("model_type")
    if base is None or model_type not in ENCODER_DECODER:
        return ""
    depths = _depths(base, str(model_type))
    for name in sorted({group, "self_prefix"}):
        depth = depths.get(name) or next((config[w] for w in DEPTHS[name] if isinstance(config.get(w), int)), 0)
        if counts.get(name, 0) != depth:
            return f"{counts.get(name, 0)} of {depth} attentions of the library's {name}, which it fills all"
    return ""


def _depths(base: Checkpoint, model_type: str) -> dict[str, int]:
    """Group -> how many attentions the base has of it."""
    found: dict[str, set[str]] = {}
    for name in base.tensors:
        for ending in ATTENTIONS.get(model_type, ()):
            path, inside, _ = name.rpartition(f"{ending}.")
            if inside:
                found.setdefault(group_of(path + ending, model_type), set()).add(path)
    return {group: len(paths) for group, paths in found.items()}


def unlike(update: Any, first: Any) -> str:
    shapes, others = ({n: tuple(leaf.shape) for n, leaf in u.tensors.items()} for u in (update, first))
    same = shapes == others and update.method == first.method
    return "" if same else "another form or size than the others': a config has one of each"


def group_of(path: str, model_type: str | None) -> str:
    """What the library calls the kind of an attention."""
    if path.endswith(("EncDecAttention", ".encoder_attn")) or ".crossattention" in path:
        return "cross_prefix"
    inside = "encoder" in path.split(".") and model_type in ENCODER_DECODER
    return "encoder_prefix" if inside else "self_prefix"


def layer_of(path: str) -> int:
    found = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", path)
    return int(found[1]) if found else -1
