"""Parse keys: `<prefix><module>.<part>[.<adapter name>][.weight|.bias]`, or `<prefix><parameter of the base>`.

A tensor that a family shares over all modules has the key `base_model.<part>`, or `<part>`. PEFT adapts a module by
wrapping it, so a path can hold names of wrappers: `base_layer`, one for each adapted parameter; `token_adapter`;
`modules_to_save.<adapter name>` in state dicts that were saved by hand.
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
"""LoRA-XS's R: a module called `default_lora_latent_mapping`; PEFT removed its `.default` as the adapter's name."""
SHARED_PREFIX = "base_model."

_SAVED = re.compile(r"(?P<stem>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<rest>.+)", re.DOTALL)
_COPY = re.compile(r"(?P<stem>.+)\.(?P<copy>modules_to_save|original_module)\.(?P<rest>weight|bias)", re.DOTALL)
"""Keys that `save_embedding_layers` copies from PEFT's wrapper of a trained module, without the adapter's name."""
_LATENT = re.compile(r"(?P<stem>.+?)(?:\.default)?_lora_latent_mapping\.weight", re.DOTALL)
_PLAIN = re.compile(
    rf"{re.escape(PREFIX)}(?P<stem>.+)\.(?P<part>(?:lora|ia3|ln_tuning|trainable_tokens)_\w+)(?:\.(?P<leaf>weight|bias))?",
    re.DOTALL,
)
"""Matches most keys. No family has parts or shared words that begin or end like these, so none is imported for them."""


def prefix_of(peft_type: str) -> str:
    """Return the prefix that PEFT writes before the base's own names in a file of this type."""
    family = family_of_type(peft_type)
    return PREFIX if family is None else family.prefix


def parse_keys(tensors: Mapping[str, Lazy], usual: str = PREFIX) -> tuple[str, dict[Key, Lazy]]:
    """Return the prefix that all keys share, and the parsed keys in file order.

    Args:
        tensors: key -> tensor.
        usual: the prefix that all keys have, or none has.

    Raises:
        Malformed: only some keys have the prefix, or they belong to several adapters.
    """
    prefix = usual if any(text.startswith(usual) and not _stands_alone(text) for text in tensors) else ""
    for text in tensors:
        if (not text.startswith(prefix) or text == prefix) and not _stands_alone(text):
            raise Malformed(f"does not begin with {usual!r} as other keys do", where=text, cure=_REWRITE)
    keys = {parse_key(text, prefix): tensor for text, tensor in tensors.items()}
    _check_names(keys)
    return prefix, keys


def _stands_alone(text: str) -> bool:
    """Whether a key is of a tensor that a family shares over all modules."""
    return _PLAIN.fullmatch(text) is None and _shared().fullmatch(text) is not None


@lru_cache(maxsize=1 << 14)
def parse_key(text: str, prefix: str) -> Key:
    """Parse one key. The result is cached, because a written file is read back at once to prove it."""
    if prefix == PREFIX and (found := _PLAIN.fullmatch(text)):
        # The two or three keys of a module share one stem, and all keys share the few words.
        return Key(text, intern(found["stem"]), intern(found["part"]), found["leaf"] or "")
    return parse_by_families(text, prefix)


def parse_by_families(text: str, prefix: str) -> Key:
    """Parse one key by the words of all families."""
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
    """Return one expression for words of keys without their leaf; a star is one word. Without words it never matches.

    Longer words come first, because one may be the prefix of another.
    """
    bare = sorted({re.sub(r"\.(?:weight|bias)$", "", pattern) for pattern in patterns}, key=len, reverse=True)
    return "|".join(re.escape(pattern).replace(r"\*", "[^.]+") for pattern in bare) or "(?!)"


def _tail(rest: str) -> tuple[tuple[str | None, str], str]:
    """Split `.default.weight` and the like into (adapter name, rest of the part), leaf."""
    names = rest.split(".")[1:]
    leaf = names.pop() if names and names[-1] in ("weight", "bias") else ""
    adapter = names.pop(0) if names else None
    return (adapter, "".join(f".{name}" for name in names)), leaf


def _check_names(keys: Iterable[Key]) -> None:
    """Check that no key holds an adapter's name, or all hold the same; keys of the base's parameters never need one."""
    named: dict[str | None, Key] = {}
    for key in keys:
        if key.part in _NAMED or (key.part and _family_part().fullmatch(key.part)):
            named.setdefault(key.adapter, key)
    if len(named) > 1:
        first, second = list(named.values())[:2]
        raise Malformed(f"not of the same adapter as {first.text}", where=second.text, cure="Save one adapter a file")


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
