"""Parse keys: `<prefix><module>.<part>[.<adapter name>][.weight|.bias]`, or `<prefix><parameter of the base>`.

A tensor that all modules of a family share has the key `base_model.<part>` or `<part>`. PEFT adapts a module by
wrapping it, so a path may contain words of wrappers: `base_layer`, once for each further adapted parameter;
`token_adapter`; and `modules_to_save.<adapter name>`, in state dicts that users saved without PEFT's function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from sys import intern

from ...errors import Malformed
from ...io.lazy import Lazy
from .families import FAMILIES, Family, family_of_type
from .file import Key

PREFIX = "base_model.model."
LATENT = "lora_latent_mapping"
"""The part of a key for LoRA-XS's R. PEFT removes `.default` from R's module name as if it were an adapter's name."""
SHARED_PREFIX = "base_model."

_SAVED = re.compile(r"(?P<stem>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<rest>.+)", re.DOTALL)
_COPY = re.compile(r"(?P<stem>.+)\.(?P<copy>modules_to_save|original_module)\.(?P<rest>weight|bias)", re.DOTALL)
"""Matches keys without an adapter's name that `save_embedding_layers` copies from the wrapper of a trained module."""
_LATENT = re.compile(r"(?P<stem>.+?)(?:\.default)?_lora_latent_mapping\.weight", re.DOTALL)
_PLAIN = re.compile(
    rf"{re.escape(PREFIX)}(?P<stem>.+)\.(?P<part>(?:lora|ia3|ln_tuning|trainable_tokens)_\w+)(?:\.(?P<leaf>weight|bias))?",
    re.DOTALL,
)
"""Matches most keys. They belong to no family, so they are parsed without importing the families."""


def prefix_of(peft_type: str) -> str:
    """Return the prefix that PEFT writes before the base's module names in a file with this `peft_type`."""
    family = family_of_type(peft_type)
    return PREFIX if family is None else family.prefix


def parse_keys(tensors: Mapping[str, Lazy], usual: str = PREFIX) -> tuple[str, dict[Key, Lazy]]:
    """Return the prefix of all keys, and the tensors by parsed key, in the file's order.

    Args:
        tensors: the tensors by key.
        usual: the usual prefix; either all keys or no keys must have it.

    Raises:
        Malformed: only some keys have the prefix, or keys belong to several adapters.
    """
    prefix = usual if any(text.startswith(usual) and not _stands_alone(text) for text in tensors) else ""
    for text in tensors:
        if (not text.startswith(prefix) or text == prefix) and not _stands_alone(text):
            raise Malformed(f"the key does not begin with {usual!r}, but others do", where=text, cure=_REWRITE)
    keys = {parse_key(text, prefix): tensor for text, tensor in tensors.items()}
    _check_names(keys)
    return prefix, keys


def _stands_alone(text: str) -> bool:
    """Whether a key belongs to a tensor that all modules of a family share."""
    return _PLAIN.fullmatch(text) is None and _shared().fullmatch(text) is not None


@lru_cache(maxsize=1 << 14)
def parse_key(text: str, prefix: str) -> Key:
    """Parse one key. The result is cached, because a file is read again right after it was written, for a check."""
    if prefix == PREFIX and (found := _PLAIN.fullmatch(text)):
        # Intern the strings to save memory: all keys of a module have the same stem, and all keys share a few words.
        return Key(text, intern(found["stem"]), intern(found["part"]), found["leaf"] or "")
    return parse_by_families(text, prefix)


def parse_by_families(text: str, prefix: str) -> Key:
    """Parse one key, using the words of all families."""
    if found := _shared().fullmatch(text):
        names, leaf = _tail(found["rest"])
        return Key(text, "", found["part"] + names[1], leaf, names[0])
    body = text[len(prefix) :]
    if LATENT in body and (found := _LATENT.fullmatch(body)):
        return Key(text, found["stem"], LATENT, "weight")
    if found := _part().fullmatch(body):
        names, leaf = _tail(found["rest"])
        return Key(text, found["stem"], found["part"] + names[1], leaf, names[0])
    if found := _SAVED.fullmatch(body):
        return Key(text, f"{found['stem']}.{found['rest']}", adapter=found["name"], copy="modules_to_save")
    if found := _COPY.fullmatch(body):
        return Key(text, f"{found['stem']}.{found['rest']}", copy=found["copy"])
    return Key(text, body)


@cache
def _part() -> re.Pattern[str]:
    own = _words(pattern for f in _families() for pattern in f.parts)
    words = rf"(?:lora|ia3|ln_tuning|trainable_tokens)_\w+|{own}"
    return re.compile(rf"(?P<stem>.+)\.(?P<part>{words})(?P<rest>(?:\.[^.]+)*)", re.DOTALL)


@cache
def _shared() -> re.Pattern[str]:
    words = _words(pattern for f in _families() for pattern in f.shared)
    return re.compile(rf"(?:{re.escape(SHARED_PREFIX)})?(?P<part>{words})(?P<rest>(?:\.[^.]+)*)")


@cache
def _family_part() -> re.Pattern[str]:
    return re.compile(_words(pattern for f in _families() for pattern in (*f.parts, *f.shared)))


def _families() -> Iterable[type[Family]]:
    return FAMILIES.values()


def _words(patterns: Iterable[str]) -> str:
    """Return a regular expression for the parts of keys; it matches nothing if `patterns` is empty.

    In a pattern, `*` stands for one word.

    Longer words come first, because a word may be the beginning of another.
    """
    bare = sorted({re.sub(r"\.(?:weight|bias)$", "", pattern) for pattern in patterns}, key=len, reverse=True)
    return "|".join(re.escape(pattern).replace(r"\*", "[^.]+") for pattern in bare) or "(?!)"


def _tail(rest: str) -> tuple[tuple[str | None, str], str]:
    """Split a key's ending, such as `.default.weight`, into the adapter's name, the rest of the part, and the leaf."""
    names = rest.split(".")[1:]
    leaf = names.pop() if names and names[-1] in ("weight", "bias") else ""
    adapter = names.pop(0) if names else None
    return (adapter, "".join(f".{name}" for name in names)), leaf


def _check_names(keys: Iterable[Key]) -> None:
    """Check that all keys have the same adapter's name, or that none has one.

    Keys of the base's parameters may lack the adapter's name.
    """
    named: dict[str | None, Key] = {}
    for key in keys:
        if key.part in _NAMED or (key.part and _family_part().fullmatch(key.part)):
            named.setdefault(key.adapter, key)
    if len(named) > 1:
        first, second = list(named.values())[:2]
        raise Malformed(
            f"this key and {first.text} belong to different adapters",
            where=second.text,
            cure="Save each adapter in its own file",
        )


_NAMED = (
    "ia3_l",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "trainable_tokens_delta",
)
_REWRITE = "Write the adapter again with PEFT"
