"""What the families of tensors share: the parsed file they read from, and what they find in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from ...core.updates import Update
from ...methods import METHODS
from ...naming.binding.fitting import live_shape
from .._format import FORMULA
from .keys import Key

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy, Leaf, Shape
    from .config import Settings


@dataclass(frozen=True, eq=False)
class File:
    """A parsed file of tensors.

    Attributes:
        settings: what its config says.
        tensors: key -> tensor, in file order.
        base: the base, if the caller gave one.
        compat: the reading that was asked for, see `Format`.
        parameters: stem -> parameter of the base, where the caller knows what the file does not say.
        known: path -> the update that the file is to say there, when it is read to prove what is written.
        omitted: word -> tensor that all modules share and the file leaves out, where the caller knows it.
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
        """Whether the paper's formula is to be read where PEFT's forward departs from it."""
        return self.compat == FORMULA

    def groups(self, parts: Iterable[str]) -> dict[str, dict[tuple[str, str], Key]]:
        """Stem -> (part, leaf) -> key, for the keys of these parts."""
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
        """Stem -> word -> key, for the keys whose words match these patterns, a star being one word."""
        wanted = re.compile("|".join(re.escape(part).replace(r"\*", "[^.]+") for part in parts) or "(?!)")
        found: dict[str, dict[str, Key]] = {}
        for key in self.tensors:
            if key.stem and wanted.fullmatch(key.word):
                found.setdefault(key.stem, {})[key.word] = key
        return found

    @cached_property
    def shared(self) -> dict[str, Key]:
        """Word -> key, for what all modules share."""
        return {key.word: key for key in self.tensors if not key.stem}

    def attentions(self) -> set[str]:
        """Paths of the `nn.MultiheadAttention`s whose output projection is adapted inside them, as PEFT does."""
        wrapped = (key for key in self.tensors if key.wrapped and key.part.startswith("lora_"))
        return {key.module for key in wrapped if key.module != key.path}

    def base_shape(self, name: str) -> Shape | None:
        """The shape of a tensor of the base, found by its name or by the one name that ends with it."""
        return None if self.base is None else base_shape(self.base, name)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """One update of a file.

    Attributes:
        path: its target's.
        update: with leaves as the file holds them, but for their shapes.
        keys: field of the update -> the key it came from.
        layout: of the target, as far as the file tells.
        rows: of the target.
    """

    path: str
    update: Update
    keys: Mapping[str, Key]
    layout: str = "out *in"
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A key whose tensor changes nothing that the adapter computes, and is kept to be written back."""

    key: Key


def base_shape(base: Checkpoint, name: str) -> Shape | None:
    """The shape that a live model's tensor has, by its name in a base, the one name that ends with it, or its family.

    A base may store in parts what a live model has in one tensor: then the parts tell its shape.
    """
    if name in base.tensors:
        return base.tensors[name].shape
    longer = [other for other in _by_ending(base).get(_ending(name), ()) if other.endswith(f".{name}")]
    return base.tensors[longer[0]].shape if len(longer) == 1 else live_shape(base, name)


def _ending(name: str) -> str:
    """The last two words of a name, or the only one."""
    return ".".join(name.rsplit(".", 2)[-2:])


@lru_cache(maxsize=1)
def _by_ending(base: Checkpoint) -> dict[str, list[str]]:
    """Names of a base's tensors by their last word, and by their last two: stacks ask for each parameter's shape."""
    found: dict[str, list[str]] = {}
    for name in base.tensors:
        two = _ending(name)
        for ending in {two, two.rpartition(".")[2]}:
            found.setdefault(ending, []).append(name)
    return found


Findings = Iterator[Found | Kept]


def make(method: str, leaves: Mapping[str, Leaf], **attributes: float) -> Update:
    """An update of a method over leaves that are not read yet."""
    return METHODS[method](**leaves, **attributes)
