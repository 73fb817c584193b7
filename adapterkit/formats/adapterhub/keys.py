"""Keys: `<module>.<kind>.<name of the adapter>.<slot>`.

The module is where the library hangs the adapter, in the names of the class that saved it: `encoder.layer.0.output` of
a bare model, `bert.encoder.layer.0.output` of one with a head; nothing for what the whole model shares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import Malformed
from ...io.lazy import Lazy

KINDS = {
    "adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "attention_text_task_adapters": "adapters",
    "invertible_adapters": "invertible_adapters",
    "invertible_lang_adapters": "invertible_adapters",
    "layer_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "loras": "loras",
    "prefix_gates": "prefix_gates",
    "prefix_tunings": "prefix_tunings",
    "prompt_tunings": "prompt_tunings",
    "refts": "refts",
    "shared_parameters": "shared_parameters",
}
"""Word in a key -> the word that the library writes since adapter-transformers 2."""

_KEY = re.compile(
    rf"(?:(?P<path>.+)\.)?(?P<kind>{'|'.join(sorted(KINDS, key=len, reverse=True))})\.(?P<name>[^.]+)\.(?P<slot>.+)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a file of tensors.

    Attributes:
        text: the key itself.
        path: the module's path, empty for the model itself.
        kind: one of the values of `KINDS`.
        slot: what follows the adapter's name.
    """

    text: str
    path: str
    kind: str
    slot: str


def parse_keys(tensors: Mapping[str, Lazy], name: str) -> dict[Key, Lazy]:
    """The parsed keys, in file order.

    Raises:
        Malformed: a key is not one of an adapter of this name.
    """
    return {parse_key(text, name): tensor for text, tensor in tensors.items()}


def parse_key(text: str, name: str) -> Key:
    """One key, taken apart.

    Raises:
        Malformed: it is not of an adapter of this name.
    """
    found = _KEY.fullmatch(text)
    if found is None:
        why, cure = f"not a key of the adapter {name!r}", "Take the tensor out, or save the adapter again"
        raise Malformed(why, where=text, cure=cure)
    if found["name"] != name:
        why = f"of an adapter {found['name']!r}, where the config is of {name!r}"
        raise Malformed(why, where=text, cure="Save one adapter a folder")
    return Key(text, found["path"] or "", KINDS[found["kind"]], found["slot"])
