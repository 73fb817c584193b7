"""Find which part of a model a prefix names, so that a vision tower is not mapped to a language model."""

from __future__ import annotations

import re
from functools import lru_cache

from .architectures import is_family

_KINDS: dict[str, dict[str, str]] = {
    "modality": {
        "vision": "vision visual image img pixel",
        "text": "language text llm lang",
        "audio": "audio speech sound",
    },
    "half": {"encoder": "encoder", "decoder": "decoder"},
    "role": {"thinker": "thinker", "talker": "talker"},
}
"""A map from each kind of part to the parts of this kind, each with the words in prefixes that name the part.

Parts of one kind may have the same shapes.
"""

_KIND = {
    word: (kind, part) for kind, parts in _KINDS.items() for part, words in parts.items() for word in words.split()
}


def modalities_of(name: str) -> set[str]:
    """Return the modalities (vision, text, audio) that a name mentions."""
    return parts_of("modality", name)


def parts_of(kind: str, name: str) -> set[str]:
    """Return the parts of one kind in `_KINDS` that a name mentions."""
    return {_KIND[word][1] for word in re.split(r"[._]", name) if _KIND.get(word, ("", ""))[0] == kind}


@lru_cache(maxsize=1 << 10)
def exchangeable(off: str, on: str) -> bool:
    """Whether prefix `on` may replace `off`: the last words differ, and the prefixes do not name different parts.

    For example, `roberta.` may not replace `bert.`, and an encoder's prefix may not replace a decoder's.
    """
    ours, theirs = ({word for word in prefix.split(".") if is_family(word)} for prefix in (off, on))
    if (ours and theirs and ours.isdisjoint(theirs)) or on.split(".")[-2] == off.split(".")[-2]:
        return False
    ours, theirs = ({word for word in re.split(r"[._]", prefix) if word in _KIND} for prefix in (off, on))
    kinds = [
        ({_KIND[word][1] for word in words if _KIND[word][0] == kind}) for kind in _KINDS for words in (ours, theirs)
    ]
    # `model.` may not replace `model.vision_tower.encoder.`, because `model.` is the text part. But a further word of a
    # tower's prefix may be dropped: `model.video_tower.` may replace `model.video_tower.vision_model.`.
    kept = {*off.split(".")} & {*on.split(".")} - {"", "model", "transformer"}
    if kinds[0] - {"text"} and not kinds[1] and not kept:
        return False
    return not any(one and other and one.isdisjoint(other) for one, other in zip(kinds[::2], kinds[1::2], strict=True))


def keeps_parts(off: str, on: str) -> bool:
    """Whether the change from `off` to `on` only drops words, or drops at most the words `model` and `transformer`."""
    ours, theirs = off.split(".")[:-1], on.split(".")[:-1]
    dropped = {word for word in ours if word not in theirs}
    return dropped <= {"model", "transformer"} or all(word in ours for word in theirs)
