"""Find out from file names and paths which part of a model a graph holds, and which part a target belongs to.

Folders for transformers.js and sentence-transformers contain the same model several times: `model.onnx`,
`model_fp16.onnx`, `model_q4.onnx`, `model_O2.onnx`. `same_layers` finds such files, because each of these graphs must
get the whole adapter.
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
"""Pairs of a word in the name of a file or folder, and the part of the model that this file or folder holds. If a name
contains several of these words, the first matching pair decides."""

PATH_WORDS = {
    "encoder": "encoder", "decoder": "decoder", "text_decoder": "decoder", "vision_model": "vision",
    "vision_tower": "vision", "visual": "vision", "vision_encoder": "vision", "audio_tower": "audio",
    "audio_model": "audio", "speech_encoder": "audio", "audio_encoder": "audio", "language_model": "text",
    "text_model": "text", "text_encoder": "text", "vae": "vae",
}  # fmt: skip
"""A map from a segment of a target's path to the part of the model that the target belongs to. If a path contains
several of these segments, the first one in the path decides."""

_FORM = re.compile(
    r"[_.\-](?:[bf]p?16|fp32|float16|bfloat16|q\d(?:f16)?|bnb4|u?int\d+|qu?int8|quant(?:ized)?|dynamic|static|o[1-4]|"
    r"optimized|simplified|slim|avx2|avx512|vnni|arm64)$",
    re.IGNORECASE,
)
"""Matches a word such as `_fp16` or `_O2` at the end of a file's name. Such a word shows how the graph was converted,
not which part of the model the graph holds."""


def role_of(name: Path) -> str | None:
    """Return the part of a model that a graph holds, judging by the graph's path; None if the path does not show it.

    Args:
        name: the path of the graph's file, relative to the model's folder. A name that contains both `encoder` and
            `decoder` does not show the part.
    """
    words = re.split(r"[_\-.]+", name.stem.lower())
    # If the file's name does not show the part, as in `text_encoder/model.onnx`, use the first folder's name.
    if len(name.parts) > 1 and not any(word == each for word, _ in FILE_WORDS for each in words):
        words = re.split(r"[_\-.]+", name.parts[0].lower())
    if {"encoder", "decoder"} <= {*words}:
        return None
    return next((role for word, role in FILE_WORDS if word in words), None)


def elsewhere(path: str, role: str | None, names: Iterable[str]) -> bool:
    """Whether a target belongs to the decoder but the graph holds the encoder, or the other way round.

    Args:
        path: the target's path.
        role: the part that the graph holds, according to the graph's file name; see `role_of`.
        names: the names of the graph's layers. If a name contains the target's part (`encoder` or `decoder`) as a
            segment, the graph also holds this part, so the result is False.
    """
    role_here = next((PATH_WORDS[word] for word in path.split(".") if word in PATH_WORDS), None)
    if {role_here, role} != {"encoder", "decoder"}:
        return False
    return not any(role_here in name.split(".") for name in names)


def same_layers(one: Path, other: Path) -> bool:
    """Whether the graph in the file `other` must have all layers of the graph in the file `one`, judging by file names.

    Both files must be in the same folder. The names are compared without endings such as `_fp16` and `_O2`: they must
    be equal, or the name of `other` must be a longer name that starts with the name of `one`.
    """
    if one.parent != other.parent:
        return False
    first, second = _plain(one.stem), _plain(other.stem)
    # A file with a longer name holds a larger graph: `decoder_model_merged` has all layers of `decoder_model`.
    return first == second or re.match(rf"{re.escape(first)}[_.\-]", second) is not None


def _plain(stem: str) -> str:
    while (shorter := _FORM.sub("", stem)) != stem:
        stem = shorter
    return stem
