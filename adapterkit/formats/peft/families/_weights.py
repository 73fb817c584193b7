"""Shared code of families: layouts and sizes of the base's weights, patterns of sizes, and the order of modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....errors import PASS_BASE, USE_ITS_BASE, USE_ITS_CONFIG, ShapeMismatch, UsageError
from ....naming.moves import stored_in_out
from ..file import Key, base_shape
from ..patterns import matches
from ..spelling import is_embedding

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue
    from ..file import File


# Look up layouts and sizes of the base's weights, and convert sizes to patterns in the config and back.


def layout(file: File, path: str) -> str:
    """Return the layout in which the base stores a weight.

    Look up the layout in the table of the base's model family. If the layout is not in the table, follow the config's
    `fan_in_fan_out`.
    """
    known = stored_in_out(path, None if file.base is None else file.base.config)
    turned = file.settings.fan_in_fan_out if known is None else known
    return "in out *k" if turned else "out *in"


def weight_shape(file: File, key: Key, why: str) -> tuple[int, int]:
    """Return (outputs, inputs) of the weight of the module to which `key` belongs.

    Raises:
        UsageError: only the base shows the sizes, and no base is given. The message begins with `why`, which names the
            values that depend on the sizes.
        ShapeMismatch: the base has no linear layer at this path.
    """
    if key.path in file.known:
        dims: Any = file.known[key.path].dims()
        return dims["out"], dims["in"]
    if file.base is None:
        raise UsageError(f"{why}, which the file does not state", where=key.path, cure=PASS_BASE)
    shape = file.base_shape(f"{key.path}.weight")
    if shape is None or len(shape) != 2:
        shape_text = "nothing" if shape is None else str(list(shape))
        raise ShapeMismatch(
            f"the weight must have two axes, but the base has {shape_text}", where=key.path, cure=USE_ITS_BASE
        )
    return (shape[1], shape[0]) if layout(file, key.path) == "in out *k" else (shape[0], shape[1])


def weight_in(base: Checkpoint | None, path: str, why: str) -> tuple[int, ...]:
    """Return the shape of the weight at a path, as the base stores it.

    Raises:
        UsageError: no base is given, or the base does not have this weight.
    """
    shape = None if base is None else base_shape(base, f"{path}.weight")
    if shape is None:
        raise UsageError(f"{why}, which the adapter does not state", where=path, cure=PASS_BASE)
    return shape


def not_linear(target: Target, method: str) -> str:
    """Return why PEFT does not support a method at a target; empty for a linear layer or a Conv1D."""
    if target.layout == "in out *k":
        return not_embedded(target, method)
    return "" if target.layout == "out *in" else f"PEFT does not support {method} on a weight stored as {target.layout}"


def not_embedded(target: Target, method: str) -> str:
    """Return the reason why PEFT refuses a method on an embedding; empty if the target is not an embedding."""
    return f"PEFT does not support {method} on an embedding" if is_embedding(target) else ""


def unlike(scalings: Mapping[str, float]) -> list[str]:
    """Return all paths if their scalings differ, otherwise an empty list.

    Families use this function if their config has only one scaling for all modules.
    """
    return [] if len(set(scalings.values())) < 2 else list(scalings)


def size_at(size: int, pattern: Mapping[str, int] | None, path: str) -> int:
    """Look up a module's size in `pattern`; if no key of `pattern` fits the module's `path`, return `size`.

    Each key of `pattern` is a regular expression for the end of `path`. The matched end must begin after a dot: for
    example, the key `q_proj` matches the path `layers.0.q_proj`. The first key that matches is used. If none matches,
    the key that equals `path` is used.
    """
    pattern = pattern or {}
    fitting = (name for name in pattern if matches(rf".*\.{name}$", path))
    return pattern.get(next(fitting, path), size)


def size_fields(sizes: Mapping[str, int], field: str) -> dict[str, JsonValue]:
    """Return two config fields: the most common size, and a map from path to size for modules with another size."""
    common = min(Counter(sizes.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    return {field: common, f"{field}_pattern": {path: size for path, size in sizes.items() if size != common}}


def side(tensor: Lazy, axis: int, axes: int) -> int:
    """Return the size of one axis of a tensor; -1 if the tensor does not have exactly `axes` axes."""
    return tensor.shape[axis] if len(tensor.shape) == axes else -1


def check_size(key: Key, size: int, stated: int, field: str) -> None:
    """Check a size in the file against a field in the config.

    Raises:
        ShapeMismatch: the sizes differ.
    """
    if size != stated:
        why = f"the tensor's size is {size}, but the config has {field} = {stated}"
        raise ShapeMismatch(why, where=key.text, cure=USE_ITS_CONFIG)


# Sort modules in the order in which a model defines them. The table below has the order for each `model_type`.
#
# Tools that number modules, or draw random values module by module, depend on this order. Safetensors files do not
# record the order, because their tensors are sorted by name. The table follows transformers' `modeling_*.py` files.


def declared_by(base: Checkpoint | None) -> tuple[str, ...]:
    """Return the names of a base's tensors in the order in which the model defines them.

    The order is read only from a base that is a single torch file. For any other base, the result is empty.
    """
    one = base is not None and len(base.files) == 1 and base.files[0].suffix in TORCH
    return tuple(base.tensors) if base is not None and one else ()


TORCH = frozenset({".bin", ".pt", ".pth"})
"""Suffixes of torch files. Such files keep the order of a state dict."""


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a model's modules. Each string is the end of a module's path.

    Attributes:
        before: the modules before the layers.
        inside: the modules of each layer.
        after: the modules after the layers.
    """

    before: tuple[str, ...]
    inside: tuple[str, ...]
    after: tuple[str, ...] = ("lm_head",)

    def place(self, path: str) -> tuple[int, tuple[int, ...], int] | None:
        """Return a sort key for a module's path; None if no string of this `Order` is an ending of the path."""
        for stage, endings in enumerate((self.before, self.inside, self.after)):
            for position, ending in enumerate(endings):
                if path == ending or path.endswith(f".{ending}"):
                    return stage, tuple(map(int, re.findall(r"(?<=\.)\d+(?=\.)", f".{path}"))), position
        return None


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LLAMA = Order(("embed_tokens",), (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
_NEOX = ("dense_h_to_4h", "dense_4h_to_h")
_BERT = Order(
    ("word_embeddings",),
    (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense",
    ),
    ("pooler.dense",),
)  # fmt: skip
ORDERS = {
    **dict.fromkeys(("cohere", "gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2"), _LLAMA),
    **dict.fromkeys(("qwen2", "qwen3", "stablelm"), _LLAMA),
    **dict.fromkeys(("bert", "roberta"), _BERT),
    "bloom": Order(
        ("word_embeddings",),
        ("self_attention.query_key_value", "self_attention.dense", *(f"mlp.{name}" for name in _NEOX)),
    ),
    "gpt2": Order(("wte", "wpe"), ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "gpt_neox": Order(
        ("embed_in",), ("attention.query_key_value", "attention.dense", *(f"mlp.{name}" for name in _NEOX))
    ),
    "gptj": Order(
        ("wte",), ("attn.k_proj", "attn.v_proj", "attn.q_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out")
    ),
    "opt": Order(
        ("embed_tokens", "embed_positions"),
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"),
    ),
    "phi": Order(("embed_tokens",), (*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")),
    "phi3": Order(
        ("embed_tokens",), ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ),
    "starcoder2": Order(("embed_tokens",), (*_ATTENTION, "mlp.c_fc", "mlp.c_proj")),
}  # fmt: skip
"""The order of modules for each `model_type` in a model's config."""


def in_order(
    paths: Collection[str], config: Mapping[str, object] | None, declared: Sequence[str] = ()
) -> list[str] | None:
    """Sort modules' paths in the order in which the base's model defines the modules; None if the order is unknown.

    Args:
        paths: the paths of modules.
        config: the base's config, whose `model_type` may be in `ORDERS`.
        declared: the result of `declared_by` for the base. If not empty, it is used instead of `ORDERS`.
    """
    if len(paths) == 1:
        return list(paths)
    if declared:
        position = {name.rpartition(".")[0]: i for i, name in reversed(list(enumerate(declared)))}
        return sorted(paths, key=position.__getitem__) if set(paths) <= position.keys() else None
    order = ORDERS.get(str((config or {}).get("model_type")))
    places = {} if order is None else {path: order.place(path) for path in paths}
    known = {path: place for path, place in places.items() if place is not None}
    return sorted(paths, key=lambda path: known[path]) if paths and len(known) == len(paths) else None
