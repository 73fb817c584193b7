"""Use the names of files and targets to tell which part of a model a graph holds, and which graphs hold the same part.

Folders for transformers.js and sentence-transformers contain the same model several times: `model.onnx`,
`model_fp16.onnx`, `model_q4.onnx`, `model_O2.onnx`. Each of these graphs must get the whole adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

FILE_WORDS = (
    ("vae", "vae"), ("vision", "vision"), ("visual", "vision"), ("image", "vision"), ("speech", "audio"),
    ("audio", "audio"), ("embedding", "embedding"), ("embed", "embedding"), ("decoder", "decoder"), ("text", "text"),
    ("encoder", "encoder"),
)  # fmt: skip
"""Pairs of a word in a file's or a folder's name and the part of the model that the file or folder holds. The first
word that matches decides."""

PATH_WORDS = {
    "encoder": "encoder", "decoder": "decoder", "text_decoder": "decoder", "vision_model": "vision",
    "vision_tower": "vision", "visual": "vision", "vision_encoder": "vision", "audio_tower": "audio",
    "audio_model": "audio", "speech_encoder": "audio", "audio_encoder": "audio", "language_model": "text",
    "text_model": "text", "text_encoder": "text", "vae": "vae",
}  # fmt: skip
"""A map from a segment of a target's path to the part of the model that the target belongs to. The first segment that
matches decides."""

_FORM = re.compile(
    r"[_.\-](?:[bf]p?16|fp32|float16|bfloat16|q\d(?:f16)?|bnb4|u?int\d+|qu?int8|quant(?:ized)?|dynamic|static|o[1-4]|"
    r"optimized|simplified|slim|avx2|avx512|vnni|arm64)$",
    re.IGNORECASE,
)
"""Pattern of a word at the end of a file's name, such as `fp16` or `O2`, that tells the form of the graph, not its
content."""


def role_of(name: Path) -> str | None:
    """Return the part of a model that a graph holds, from its file name relative to the model's folder, or None."""
    words = re.split(r"[_\-.]+", name.stem.lower())
    # If the file's name does not show the part, as in `model.onnx`, use the name of the folder that contains it.
    if len(name.parts) > 1 and not any(word == each for word, _ in FILE_WORDS for each in words):
        words = re.split(r"[_\-.]+", name.parts[0].lower())
    if {"encoder", "decoder"} <= {*words}:
        return None
    return next((role for word, role in FILE_WORDS if word in words), None)


def elsewhere(path: str, role: str | None, names: Iterable[str]) -> bool:
    """Whether a target is in the decoder and the graph is the encoder, or the reverse.

    Args:
        path: the target's path.
        role: the part that the graph holds, according to its file name.
        names: the names of the graph's layers. If one of these names contains the target's part, it proves more than
            the file's name.
    """
    role_here = next((PATH_WORDS[word] for word in path.split(".") if word in PATH_WORDS), None)
    if {role_here, role} != {"encoder", "decoder"}:
        return False
    return not any(role_here in name.split(".") for name in names)


def same_layers(one: Path, other: Path) -> bool:
    """Whether `other` must contain each layer of `one`, judging by their names without words such as `fp16` or `O2`.

    The names must be equal, or the name of `other` must continue the name of `one`.
    """
    if one.parent != other.parent:
        return False
    first, second = _plain(one.stem), _plain(other.stem)
    # A name that continues with other words, such as `decoder_model_merged`, is a larger graph.
    return first == second or re.match(rf"{re.escape(first)}[_.\-]", second) is not None


def _plain(stem: str) -> str:
    while (shorter := _FORM.sub("", stem)) != stem:
        stem = shorter
    return stem
