"""Parse a file's keys, select the keys that belong to one config, and compose keys for a writer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import Malformed
from ...io.lazy import Lazy
from ...methods import METHODS
from ...naming.layouts import stored_in_out
from .._format import FORMULA

if TYPE_CHECKING:
    from ...core.adapter import Target
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Leaf
    from .settings import Settings


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
"""A map from words in old keys to the words that the adapters library has written since adapter-transformers 2."""

_KEY = re.compile(
    rf"(?:(?P<path>.+)\.)?(?P<kind>{'|'.join(sorted(KINDS, key=len, reverse=True))})\.(?P<name>[^.]+)\.(?P<slot>.+)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class AdapterHubKey:
    """One key of a tensor file.

    Attributes:
        text: the complete key.
        path: the module's path; empty for the model itself.
        kind: one of the values of `KINDS`.
        slot: the part of the key after the adapter's name.
    """

    text: str
    path: str
    kind: str
    slot: str


def parse_keys(tensors: Mapping[str, Lazy], name: str) -> dict[AdapterHubKey, Lazy]:
    """Parse the keys, in the file's order.

    Raises:
        Malformed: a key does not belong to an adapter with this name.
    """
    return {parse_key(text, name): tensor for text, tensor in tensors.items()}


def parse_key(text: str, name: str) -> AdapterHubKey:
    """Parse one key.

    Raises:
        Malformed: the key does not belong to an adapter with this name.
    """
    found = _KEY.fullmatch(text)
    if found is None:
        why, cure = f"this is not a key of the adapter {name!r}", "Remove the tensor, or save the adapter again"
        raise Malformed(why, where=text, cure=cure)
    if found["name"] != name:
        why = f"the key belongs to the adapter {found['name']!r}, but the config to {name!r}"
        raise Malformed(why, where=text, cure="Save each adapter in its own folder")
    return AdapterHubKey(text, found["path"] or "", KINDS[found["kind"]], found["slot"])


# Besides the target, a key contains the adapter's name, and the base's path inside the saved model.


INNER = ("blocks", "decoder", "embeddings", "encoder", "h", "layer", "layers", "transformer.layer")
"""First parts of paths in a model without a head, whose base has no path prefix."""


@dataclass(frozen=True, slots=True)
class AdapterHubNaming:
    """The names that occur in all keys of one file.

    Attributes:
        name: the adapter's name.
        model_type: the model type of the base, or None.
        root: the path of the base inside the saved model; empty if the saved model is the base.
    """

    name: str
    model_type: str | None = None
    root: str = ""

    def key(self, path: str, kind: str, slot: str) -> str:
        """Return the key of a module's slot."""
        return ".".join(part for part in (path, kind, self.name, slot) if part)

    def at_root(self, name: str = "") -> str:
        """Return the path that keys have for a tensor that the whole model shares."""
        return ".".join(part for part in (self.root, name) if part)


def root_of(paths: Iterable[str]) -> str:
    """Return the path of the base inside the saved model, judged by the first parts of the targets' paths."""
    first = {path.partition(".")[0] for path in paths if path}
    return first.pop() if len(first) == 1 and not first & {*INNER} else ""


# The part of a file that one config describes. Its family searches this part with the functions below.


@dataclass(frozen=True, slots=True, eq=False)
class AdapterHubPart:
    """The part of a file that one config describes: the whole file, or one member of a union.

    Attributes:
        settings: the settings outside the sub-dict `config`.
        own: the fields of this config.
        tensors: the tensors by parsed key, in the file's order.
        base: the base, or None.
        compat: the caller's `compat`; see `Format`.
        at: the location of this config in the file's config: `config` or, in a union, for example `config.configs[1]`.
        heads: the number of heads of a prefix's keys and values, if it is known without the base.
    """

    settings: Settings
    own: Any
    tensors: Mapping[AdapterHubKey, Lazy]
    base: Checkpoint | None = None
    compat: str | None = None
    at: str = "config"
    heads: int | None = None

    @property
    def by_formula(self) -> bool:
        """Whether to apply the paper's formula in cases where the adapters library's forward computes another."""
        return self.compat == FORMULA

    def groups(self, kind: str) -> dict[str, dict[str, AdapterHubKey]]:
        """Group the keys of one kind by module, then by slot.

        Raises:
            Malformed: two keys have the same meaning.
        """
        found: dict[str, dict[str, AdapterHubKey]] = {}
        for key in self.tensors:
            if key.kind != kind:
                continue
            slots = found.setdefault(key.path, {})
            if key.slot in slots:
                why = f"this key means the same as {slots[key.slot].text}"
                raise Malformed(why, where=key.text, cure="Save the adapter again with one release of adapters")
            slots[key.slot] = key
        return found

    def layout(self, path: str) -> str:
        """Return the layout in which models of the base's type store the weights of linear layers."""
        turned = stored_in_out(f".{path}", {"model_type": self.settings.model_type})
        return "in out *k" if turned else "out *in"


@dataclass(frozen=True, slots=True, eq=False)
class AdapterHubUpdate:
    """One update in a file, and the keys of its tensors."""

    target: Target
    update: Update
    keys: tuple[AdapterHubKey, ...]


@dataclass(frozen=True, slots=True, eq=False)
class KeptKey:
    """A key whose tensor does not affect the computed function. It is stored so that the writer can write it again."""

    key: AdapterHubKey


Findings = Iterator[AdapterHubUpdate | KeptKey]


def joined(leaves: list[Lazy]) -> Lazy:
    """Concatenate tensors of one dtype along the first axis."""
    first = leaves[0]
    if len(leaves) == 1:
        return first
    shape = (sum(leaf.shape[0] for leaf in leaves), *first.shape[1:])
    return Lazy(shape, first.dtype, lambda: b"".join(bytes(leaf.fetch()) for leaf in leaves))


def sliced(leaf: Lazy, start: int, stop: int) -> Lazy:
    """Return the slice `start:stop` of a tensor's first axis; the tensor itself if the slice is the whole axis."""
    if (start, stop) == (0, leaf.shape[0]):
        return leaf
    return leaf.map(lambda values: values[start:stop], (stop - start, *leaf.shape[1:]))


def make(method: str, leaves: Mapping[str, Leaf], **attributes: object) -> Update:
    """Create an update from a method's name and tensors that are not loaded yet."""
    return METHODS[method](**leaves, **attributes)


def take(part: AdapterHubPart, slots: Mapping[str, AdapterHubKey], fields: Mapping[str, str]) -> dict[str, Lazy]:
    """Return the tensors of several slots, by field; `fields` maps slots to fields.

    Raises:
        Malformed: the file lacks one of the slots.
    """
    missing = next((slot for slot in fields if slot not in slots), None)
    if missing is not None:
        where = next(iter(slots.values())).text
        raise Malformed(f"the file lacks the matching tensor: {missing}", where=where, cure=AGAIN)
    return {field: part.tensors[slots[slot]] for slot, field in fields.items()}


def check_same(part: AdapterHubPart, one: AdapterHubKey, other: AdapterHubKey) -> None:
    """Check that the tensors of two keys are equal, because the adapters library saves one tensor under both keys.

    Raises:
        Malformed: the values differ.
    """
    a, b = part.tensors[one], part.tensors[other]
    if a.span is not None and a.span == b.span:
        return
    if a.shape != b.shape or bytes(a.fetch()) != bytes(b.fetch()):
        why = f"the values differ from {other.text}, which is the same tensor in the adapters library"
        raise Malformed(why, where=one.text, cure=AGAIN)


AGAIN = "Save the adapter again with the adapters library"
