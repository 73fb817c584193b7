"""Find the part of a model that a prefix names: a vision tower is not a language model, an encoder not a decoder."""

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
"""Parts of models that may have the same shapes, with the words that name them in prefixes."""

_KIND = {
    word: (kind, part) for kind, parts in _KINDS.items() for part, words in parts.items() for word in words.split()
}


def modalities_of(name: str) -> set[str]:
    """Return those of vision, text and audio that a name mentions."""
    return parts_of("modality", name)


def parts_of(kind: str, name: str) -> set[str]:
    """Return which parts of models, of one kind in `_KINDS`, a name mentions."""
    return {_KIND[word][1] for word in re.split(r"[._]", name) if _KIND.get(word, ("", ""))[0] == kind}


@lru_cache(maxsize=1 << 10)
def exchangeable(off: str, on: str) -> bool:
    """Whether prefix `on` may replace `off`: their last words differ, and they do not name two different parts.

    `roberta.` is not another name of `bert.`, a vision tower is not a language model, and an encoder is not a decoder.
    """
    ours, theirs = ({word for word in prefix.split(".") if is_family(word)} for prefix in (off, on))
    if (ours and theirs and ours.isdisjoint(theirs)) or on.split(".")[-2] == off.split(".")[-2]:
        return False
    ours, theirs = ({word for word in re.split(r"[._]", prefix) if word in _KIND} for prefix in (off, on))
    kinds = [
        ({_KIND[word][1] for word in words if _KIND[word][0] == kind}) for kind in _KINDS for words in (ours, theirs)
    ]
    # `model.vision_tower.encoder.` is not `model.`, which is the text part. But a second word of a tower may be
    # dropped: `model.video_tower.vision_model.` is `model.video_tower.`.
    kept = {*off.split(".")} & {*on.split(".")} - {"", "model", "transformer"}
    if kinds[0] - {"text"} and not kinds[1] and not kept:
        return False
    return not any(one and other and one.isdisjoint(other) for one, other in zip(kinds[::2], kinds[1::2], strict=True))


def keeps_parts(off: str, on: str) -> bool:
    """Whether a change of prefixes only adds words, only drops words, or exchanges words that name no part."""
    ours, theirs = off.split(".")[:-1], on.split(".")[:-1]
    dropped = {word for word in ours if word not in theirs}
    return dropped <= {"model", "transformer"} or all(word in ours for word in theirs)
