"""Define the data that all decoders share: keys, the parsed tensor file, and the updates that decoders yield."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ...core.updates import Update
from ...methods import METHODS
from ...naming.binding.fitting import live_shape
from .._format import FORMULA

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy, Leaf, Shape
    from .settings import Settings


_WRAPPERS = re.compile(r"\.(?:base_layer|token_adapter)(?=\.|$)")
_OUTERMOST = re.compile(r"(?:\.base_layer)*$")


class Key(NamedTuple):
    """A parsed key of a tensor file.

    Attributes:
        text: the complete key.
        stem: the text before the part, including words of wrappers. For a parameter of the base, the whole path; for a
            tensor that all modules share, empty.
        part: the kind of tensor, such as `lora_A` or `ia3_l`; empty for a parameter of the base.
        leaf: the text after the part: `weight`, `bias` or empty.
        adapter: the adapter's name, if the key contains it.
        copy: `modules_to_save` or `original_module` if the key has this word of a wrapper; otherwise empty.
    """

    text: str
    stem: str
    part: str = ""
    leaf: str = ""
    adapter: str | None = None
    copy: str = ""

    @property
    def word(self) -> str:
        """Return the part and the leaf, such as `lora_A.weight`."""
        return f"{self.part}.{self.leaf}" if self.leaf else self.part

    @property
    def path(self) -> str:
        """Return the module's dotted path in the base, without words of wrappers."""
        return _WRAPPERS.sub("", self.stem) if self.wrapped else self.stem

    @property
    def wrapped(self) -> bool:
        """Whether the stem contains words of PEFT's wrappers."""
        return ".base_layer" in self.stem or ".token_adapter" in self.stem

    @property
    def depth(self) -> int:
        """Count the PEFT wrappers around this one; each wrapper adapts another parameter of the same module."""
        if not self.wrapped:
            return 0
        found = _OUTERMOST.search(self.stem)
        return 0 if found is None else found.group().count(".base_layer")

    @property
    def module(self) -> str:
        """Return the path of the outermost wrapped module.

        For an attention's output projection, that is the attention.
        """
        if not self.wrapped:
            return self.stem
        inside = _OUTERMOST.sub("", self.stem)
        return _WRAPPERS.sub("", inside.partition(".base_layer.")[0])


@dataclass(frozen=True, eq=False)
class File:
    """A parsed tensor file.

    Attributes:
        settings: the settings in the config.
        tensors: the tensors by key, in the file's order.
        base: the base, or None.
        compat: the caller's `compat`; see `Format`.
        parameters: a map from stems to parameters of the base, if the caller knows them; the file may not show them.
        known: the update that is expected at each path, if a file that was just written is read for a check.
        omitted: shared tensors that are not in the file, by word of the key; the caller provides them.
    """

    settings: Settings
    tensors: Mapping[Key, Lazy]
    base: Checkpoint | None = None
    compat: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    known: Mapping[str, Update] = field(default_factory=dict)
    omitted: Mapping[str, Lazy] = field(default_factory=dict)

    @property
    def by_formula(self) -> bool:
        """Whether to apply the paper's formula where PEFT's forward differs from it."""
        return self.compat == FORMULA

    def groups(self, parts: Iterable[str]) -> dict[str, dict[tuple[str, str], Key]]:
        """Return the keys with one of these parts, as stem -> (part, leaf) -> key."""
        parts = frozenset(parts)
        found: dict[str, dict[tuple[str, str], Key]] = {}
        for key in self.tensors:
            if key.part in parts:
                group = found.get(key.stem)
                if group is None:
                    group = found[key.stem] = {}
                group[key.part, key.leaf] = key
        return found

    def modules(self, parts: Iterable[str]) -> dict[str, dict[str, Key]]:
        """Return the keys whose words match one of these patterns, as stem -> word -> key; a star matches one word."""
        wanted = re.compile("|".join(re.escape(part).replace(r"\*", "[^.]+") for part in parts) or "(?!)")
        found: dict[str, dict[str, Key]] = {}
        for key in self.tensors:
            if key.stem and wanted.fullmatch(key.word):
                found.setdefault(key.stem, {})[key.word] = key
        return found

    @cached_property
    def shared(self) -> dict[str, Key]:
        """Return the keys of tensors that all modules share, by word of the key."""
        return {key.word: key for key in self.tensors if not key.stem}

    def attentions(self) -> set[str]:
        """Return the path of each `nn.MultiheadAttention` whose output projection is adapted; PEFT then adapts both."""
        wrapped = (key for key in self.tensors if key.wrapped and key.part.startswith("lora_"))
        return {key.module for key in wrapped if key.module != key.path}

    def base_shape(self, name: str) -> Shape | None:
        """Return the shape of the base's tensor `name`, or else of the only tensor whose name ends with `name`."""
        return None if self.base is None else base_shape(self.base, name)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """An update that a decoder found in a file.

    Attributes:
        path: the path of the update's target.
        update: the update; its tensors are those of the file, and may be reshaped.
        keys: a map from each field of the update to its key.
        layout: the target's layout, as far as the file shows it.
        rows: the rows of the target, or None for all rows.
    """

    path: str
    update: Update
    keys: Mapping[str, Key]
    layout: str = "out *in"
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A key whose tensor does not affect the computed function. It is stored so that the writer can write it again."""

    key: Key


def base_shape(base: Checkpoint, name: str) -> Shape | None:
    """Return the shape that a tensor has in the loaded model.

    The base's tensor is called `name`, or is the only tensor whose name ends with `name`. If a base stores the parts of
    a tensor that the loaded model fuses, the shape is computed from the parts, by the family's table.
    """
    if name in base.tensors:
        return base.tensors[name].shape
    longer = [other for other in _by_ending(base).get(_ending(name), ()) if other.endswith(f".{name}")]
    return base.tensors[longer[0]].shape if len(longer) == 1 else live_shape(base, name)


def _ending(name: str) -> str:
    """Return the last two words of a dotted name; a name with one word is returned unchanged."""
    return ".".join(name.rsplit(".", 2)[-2:])


@lru_cache(maxsize=1)
def _by_ending(base: Checkpoint) -> dict[str, list[str]]:
    """Index a base's tensors by the last word, and by the last two words, of their names, for many fast look-ups."""
    found: dict[str, list[str]] = {}
    for name in base.tensors:
        two = _ending(name)
        for ending in {two, two.rpartition(".")[2]}:
            found.setdefault(ending, []).append(name)
    return found


Findings = Iterator[Found | Kept]


def make(method: str, leaves: Mapping[str, Leaf], **attributes: float) -> Update:
    """Create an update from a method's name and tensors that are not loaded yet."""
    return METHODS[method](**leaves, **attributes)
