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
"""Sizes for dynamic axes; the check tries one row after the other. The entries of a row are the sizes of an input's
first axis, second axis, and so on. Some rows have batch size 1, because onnxruntime's GroupQueryAttention accepts
several tokens after a past only for a single text."""

_TYPES = {
    "bool": np.bool_,
    "float": np.float32,
    "float16": np.float16,
    "double": np.float64,
    "int64": np.int64,
    "int32": np.int32,
}

STATE = "past."
"""Prefix of the names of state inputs in graphs of onnxruntime-genai's builder. A state is, for example, the last
inputs of a convolution. These graphs do not mask padding in layers that have a state."""

STATES = (STATE, "past_conv.", "past_ssm.", "past_recurrent.")
"""Prefixes of the names of a language model's state inputs. All but the first begin names that transformers.js expects
and `adapterkit export` writes."""

Feeds = Mapping[str, Array]

Sizes = Mapping[str, int]
"""Sizes from the configs in a graph's folder: `head_size`, `heads` and `window` of the past; `channels`, `height` and
`width` of images."""


def sizes_beside(graph: Path | None) -> dict[str, int]:
    """Return the sizes from onnxruntime-genai's and transformers' configs in a graph's folder.

    Some graphs declare sizes as dynamic, but run only if these sizes have one certain value. Examples are the head size
    in onnxruntime-genai's graphs, and the channels, height and width in the graphs of image models.
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
    """Return a map from the name of each sliding-window cache to the window's length in tokens.

    In onnxruntime-genai's graphs, such a cache always has this length. `genai_config.json` lists the
    layers with such caches.
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
        session: the graph in onnxruntime.
        sizes: the sizes of dynamic axes, a row such as those of `SIZES`.
        known: sizes from configs; see `sizes_beside`.
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
            # Do not mask tokens in onnxruntime-genai's graphs. These graphs take the number of tokens from the mask. If
            # the last token is masked, they leave some memory of the outputs unwritten.
            whole = "head_size" in (known or {})
            feeds[entry.name] = (np.ones(shape) if whole else _mask(shape)).astype(_TYPES[name])
        elif name in ("int64", "int32"):
            # Use 0 and 1, which are valid tokens, token types and masks for any model.
            feeds[entry.name] = rng.integers(0, 2, shape).astype(_TYPES[name])
        else:
            feeds[entry.name] = rng.normal(size=shape).astype(_TYPES[name])
    return feeds


def _name_sizes(entry: OrtInput, known: Sizes, named: dict[str, int]) -> None:
    """Add the sizes that the configs give for an input's dynamic axes to `named`, by the axes' names."""
    if len(entry.shape) != 4:
        return
    past = "past" in entry.name
    # A sliding-window cache must have the window's length, so give all caches this length.
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
    """Return a mask of ones whose last entry is 0: some tokens stay visible, whether a graph masks zeros or ones."""
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
