"""Make inputs for a trial run of a graph, with sizes that match each other."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import AdapterkitError
from ..io.inputs import read_input
from .building import Array

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue
    from .providers import OrtInput, OrtSession

SIZES = ((2, 4, 4, 4), (1, 4, 4, 4), (2, 3, 16, 16), (1, 1, 1, 1), (2, 32, 32, 32), (1, 576, 16, 16))
"""Sizes for dynamic axes. The first entry of a row is the size of an input's first axis, and so on. The check tries the
rows in order. Some rows have batch size 1, because onnxruntime's GroupQueryAttention accepts a past together with
several new tokens only for a batch of one text."""

_TYPES = {
    "bool": np.bool_,
    "float": np.float32,
    "float16": np.float16,
    "double": np.float64,
    "int64": np.int64,
    "int32": np.int32,
}

STATE = "past."
"""Prefix of the names of state inputs in the graphs that onnxruntime-genai's builder writes. A state is, for example,
the last inputs that a convolution read. In layers with a state, these graphs do not mask padding."""

STATES = (STATE, "past_conv.", "past_ssm.", "past_recurrent.")
"""Prefixes of the names of a language model's state inputs. `STATE` is onnxruntime-genai's prefix. The others
are the prefixes that transformers.js expects and `adapterkit export` writes."""

Feeds = Mapping[str, Array]

Sizes = Mapping[str, int]
"""Sizes from the configs in a graph's folder, by name. `head_size`, `heads` and `window` are sizes of the past;
`channels`, `height` and `width` are sizes of images."""


def sizes_beside(graph: Path | None) -> dict[str, int]:
    """Read sizes from onnxruntime-genai's `genai_config.json` and transformers' `config.json` in a graph's folder.

    Some graphs declare a size as dynamic, but run only with one value of this size. Examples are the head size in
    onnxruntime-genai's graphs, and the channels, height and width in the graphs of image models.
    """
    if graph is None:
        return {}
    model = _config(graph.parent / "genai_config.json").get("model")
    found_decoder = model.get("decoder") if isinstance(model, dict) else None
    decoder = found_decoder if isinstance(found_decoder, dict) else {}
    window = decoder.get("sliding_window")
    config = _config(graph.parent / "config.json")
    image = config.get("image_size", config.get("sample_size"))
    height, width = image[:2] if isinstance(image, list) and len(image) > 1 else (image, image)
    channels = config.get("num_channels", config.get("in_channels"))
    sizes = {
        "head_size": decoder.get("head_size"), "heads": decoder.get("num_key_value_heads"), "channels": channels,
        "height": height, "width": width, "window": window.get("window_size") if isinstance(window, dict) else None,
    }  # fmt: skip
    return {word: size for word, size in sizes.items() if isinstance(size, int) and 0 < size < 1 << 16}


def windows_beside(graph: Path) -> dict[str, int]:
    """Return a map from the input name of each sliding-window cache to the window's length in tokens.

    `genai_config.json` lists the layers that have such a cache. In onnxruntime-genai's graphs, the cache always has the
    window's length.
    """
    model = _config(graph.parent / "genai_config.json").get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    window = decoder.get("sliding_window") if isinstance(decoder, dict) else None
    if not isinstance(window, dict):
        return {}
    size, layers = window.get("window_size"), window.get("layers")
    if not isinstance(size, int) or not isinstance(layers, list) or not 0 < size < 1 << 16:
        return {}
    return {f"past_key_values.{layer}.{part}": size for layer in layers for part in ("key", "value")}


def _config(file: Path) -> dict[str, JsonValue]:
    """Return a config; an empty one if the file is missing or damaged, because the sizes in it are optional."""
    try:
        config = json.loads(read_input(file).decode("utf-8"))
    except (OSError, ValueError, RecursionError, AdapterkitError):
        return {}
    return config if isinstance(config, dict) else {}


def trial_inputs_for(session: OrtSession, sizes: Sequence[int], known: Sizes | None = None) -> dict[str, Array]:
    """Return random inputs for a graph. All dynamic axes with the same name have the same size.

    Args:
        session: an onnxruntime session of the graph.
        sizes: the sizes of an input's dynamic axes by position, like a row of `SIZES`.
        known: the sizes from configs that `sizes_beside` returned. They take precedence over `sizes`.
    """
    rng, named = np.random.default_rng(0), dict[str, int]()
    feeds: dict[str, Array] = {}
    entries = session.get_inputs()
    for entry in entries:
        _name_sizes(entry, known or {}, named)
    shapes = {entry.name: [_size(axis, n, named, sizes) for n, axis in enumerate(entry.shape)] for entry in entries}
    _count_past(shapes)
    for entry in entries:
        shape = shapes[entry.name]
        name = entry.type.removeprefix("tensor(").removesuffix(")")
        if name == "bool" or (name in ("int64", "int32") and "mask" in entry.name):
            # Do not mask tokens in onnxruntime-genai's graphs. These graphs compute the number of tokens from the mask.
            # If the last token is masked, the graphs leave some elements of the outputs uninitialized.
            whole = "head_size" in (known or {})
            feeds[entry.name] = (np.ones(shape) if whole else _mask(shape)).astype(_TYPES[name])
        elif name in ("int64", "int32"):
            # Use 0 and 1, which are valid tokens, token types and masks for any model.
            feeds[entry.name] = rng.integers(0, 2, shape).astype(_TYPES[name])
        else:
            feeds[entry.name] = rng.normal(size=shape).astype(_TYPES[name])
    return feeds


def _name_sizes(entry: OrtInput, known: Sizes, named: dict[str, int]) -> None:
    """Copy the sizes of an input's dynamic axes from `known` to `named`. The keys of `named` are the axes' names."""
    if len(entry.shape) != 4:
        return
    past = "past" in entry.name
    # A sliding-window cache must have the window's length, and other caches may have it. So if the configs contain
    # this length, use it for all caches.
    words = (None, "heads", "window", "head_size") if past else (None, "channels", "height", "width")
    if not past and not any(word in entry.name for word in ("pixel", "image", "sample", "input")):
        return
    for axis, word in zip(entry.shape, words, strict=True):
        if word is not None and word in known and isinstance(axis, str):
            named.setdefault(axis, known[word])


def _count_past(shapes: dict[str, list[int]]) -> None:
    """Set the length of a causal language model's mask to the length of the past plus the number of new tokens."""
    past = next(
        (
            shape[2] for name, shape in shapes.items()
            if "past" in name and len(shape) == 4 and not name.startswith(STATES)
        ),
        None,
    )  # fmt: skip
    mask, tokens = shapes.get("attention_mask"), shapes.get("input_ids")
    if past is not None and mask is not None and tokens is not None and len(mask) == len(tokens) == 2:
        mask[1] = past + tokens[1]


def _mask(shape: Sequence[int]) -> Array:
    """Return a mask of ones whose last entry is 0.

    Some graphs ignore the tokens whose mask entry is 0; others ignore the tokens whose mask entry is 1. With this mask,
    some tokens stay visible in both cases.
    """
    mask = np.ones(shape, dtype=bool)
    if mask.ndim and mask.shape[-1] > 1:
        mask[..., -1] = False
    return mask


def _size(axis: object, position: int, named: dict[str, int], sizes: Sequence[int]) -> int:
    if isinstance(axis, int):
        return axis
    return named.setdefault(str(axis), sizes[min(position, len(sizes) - 1)])


def numbers_in(feeds: Feeds) -> int:
    """Return the total number of elements in all inputs."""
    return sum(math.prod(np.shape(array)) for array in feeds.values())
