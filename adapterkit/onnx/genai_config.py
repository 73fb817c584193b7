"""Write `genai_config.json` beside an exported language model, so that onnxruntime-genai can load the folder.

The graph's inputs and outputs already have the names that onnxruntime-genai uses. The config lists these names, and
adds sizes and token ids.
onnxruntime-genai's model builder writes the same format: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..io.atomic import write_bytes
from ..io.inputs import decimal_number
from .model_file import opened

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..io.strict_json import JsonValue
    from .pretrained_types import PretrainedModel

NAME = "genai_config.json"

KIND, CONVOLUTIONS = "decoder", "lfm2"
"""Values of `type` in the config: `lfm2` if the graph has convolution states but no recurrent states; `decoder` for
all other models.

onnxruntime-genai's other types differ only in the cache layout."""

LONGEST = 2048
"""Maximum length of a text in tokens, used if the model's config has no limit."""

INPUTS = ("input_ids", "attention_mask", "position_ids")

PAST, PRESENT = "past_key_values.%d.", "present.%d."
"""Patterns for the names of cached keys and values; `%d` stands for the layer's index."""

STATES = {"conv": ("past_conv.%d",), "recurrent": ("past_ssm.%d", "past_recurrent.%d")}
"""A map from each kind of state (named as in onnxruntime-genai) to the names that the graph's inputs for such states
may have; `%d` stands for the layer's index."""

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_genai_config(model: PretrainedModel, graph: Path, out: Path) -> list[Path]:
    """Write `genai_config.json` for an exported language model.

    Args:
        model: the transformers model.
        graph: the exported graph.
        out: the folder to write to.

    Returns:
        a list with the config's path. The list is empty, and no file is written, if onnxruntime-genai cannot run the
        graph. This is the case if the graph has no cached keys and values, if the sizes of keys and values differ
        between layers, if a state has an unknown name or an unexpected shape, if the graph uses two of the names in
        `STATES` for the same kind of state, or if the model's configs have no end-of-text token.
    """
    config = _config(model, opened(graph).model, graph.name)
    if config is None:
        return []
    file = out / NAME
    write_bytes(file, f"{json.dumps(config, indent=4)}\n".encode())
    return [file]


def _config(model: PretrainedModel, graph: ir.Model, name: str) -> dict[str, JsonValue] | None:
    shapes = {value.name or "": list(value.shape or ()) for value in graph.graph.inputs}
    layers = [at for at in range(len(shapes)) if f"{PAST}key" % at in shapes]
    numbers = range(len(shapes))
    states = {
        kind: name for kind, names in STATES.items() for name in names if any(name % at in shapes for at in numbers)
    }  # fmt: skip
    known = {name % at for name in (*states.values(), f"{PAST}key", f"{PAST}value") for at in numbers}
    if any(name.startswith("past") and name not in known for name in shapes):
        return None
    sizes = {tuple(shapes[f"{PAST}{part}" % at][1::2]) for at in layers for part in ("key", "value")}
    heads, width = sizes.pop() if len(sizes) == 1 else (None, None)
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    # onnxruntime-genai counts all layers, including layers without keys and values.
    count = 1 + max(decimal_number(part) or 0 for name in known & shapes.keys() for part in name.split("."))
    text_config = model.config.get_text_config()
    ids = _token_ids(model)
    if "eos_token_id" not in ids:
        return None
    longest = _whole(getattr(text_config, "max_position_embeddings", None), LONGEST)
    decoder: dict[str, JsonValue] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": name,
        "head_size": width,
        "hidden_size": _whole(getattr(text_config, "hidden_size", None), width * heads),
        "inputs": {
            **{word: word for word in INPUTS if word in shapes},
            "past_key_names": f"{PAST}key", "past_value_names": f"{PAST}value",
            **{f"past_{kind}_names": name for kind, name in states.items()},
        },
        "outputs": {
            "logits": "logits", "present_key_names": f"{PRESENT}key", "present_value_names": f"{PRESENT}value",
            **{f"present_{kind}_names": name.replace("past", "present") for kind, name in states.items()},
        },
        "num_attention_heads": _whole(getattr(text_config, "num_attention_heads", None), heads),
        "num_hidden_layers": count,
        "num_key_value_heads": heads,
    }  # fmt: skip
    alone = states.keys() == {"conv"}
    if alone:
        # onnxruntime-genai creates convolution states with shape `[batch, hidden_size, conv_cache_size]`, so the graph
        # must use this shape.
        wide = {tuple(shapes[name % at][1:]) for name in states.values() for at in numbers if name % at in shapes}
        hidden, length = wide.pop() if len(wide) == 1 else (None, None)
        if hidden != decoder["hidden_size"] or not isinstance(length, int):
            return None
        kinds = ["full_attention" if at in layers else "conv" for at in range(count)]
        decoder |= {"layer_types": [*kinds], "conv_cache_size": length}
    # The graph returns the whole cache as a new tensor, so the inputs and outputs of the cache cannot share a buffer.
    search: dict[str, JsonValue] = {"do_sample": False, "max_length": longest, "past_present_share_buffer": False}
    whole: dict[str, JsonValue] = {
        **ids, "context_length": longest, "decoder": decoder,
        "type": CONVOLUTIONS if alone else KIND,
        "vocab_size": _whole(getattr(text_config, "vocab_size", None), 0),
    }  # fmt: skip
    return {"model": whole, "search": search}


def _token_ids(model: PretrainedModel) -> dict[str, JsonValue]:
    """Return the ids of special tokens. The generation config takes precedence; padding defaults to the end token."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config(), model.config)
    ids: dict[str, JsonValue] = {}
    for name in TOKENS:
        given = next((value for one in configs if (value := getattr(one, name, None)) is not None), None)
        if given is not None:
            ids[name] = given
    end = ids.get("eos_token_id")
    ids.setdefault("pad_token_id", end[0] if isinstance(end, list) and end else end)
    return ids


def _whole(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise
