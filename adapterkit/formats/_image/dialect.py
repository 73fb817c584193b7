"""What the formats of image models are made of: a grammar of keys, rules of scalings, names; reading and writing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...adapter import Adapter, Foreign, Step, Target
from ...errors import AdapterkitError, Malformed, Unrepresentable, UsageError
from ...tensors.lazy import Lazy, as_lazy
from ...tensors.scalars import at_once
from .._format import Format
from . import container
from .biases import check_biases, mixed_biases
from .container import Metadata
from .encode import encode, why_not
from .file import AGAIN, Found, Key, Module, Rules, Stored
from .folding import rewritten
from .hints import Hints, fingerprint, hints_of
from .laws import decode
from .leftovers import Leftovers, still
from .placing import kernel_of, placed
from .translate import Changed, Losses, in_diffusers, in_native

if TYPE_CHECKING:
    from ...tensors.checkpoint import Checkpoint
    from ...updates import Update

Updates = Mapping[Target, tuple["Update", ...]]


class ImageFormat(Format, ABC):
    """One file of tensors; a subclass says what its keys look like, and how its modules are called.

    Class attributes:
        rules: how it says scalings, and its slots.
        naming: `native` or `diffusers` where its files go by one naming; empty where they go by any.
    """

    compat = frozenset({"kohya"})
    rules: ClassVar[Rules] = Rules()
    naming: ClassVar[str] = ""

    @classmethod
    def name(cls) -> str:
        return cls.__module__.rpartition(".")[2]

    # What a dialect defines.

    @abstractmethod
    def parse(self, key: str) -> Key | None:
        """A key taken apart; None where it is of another dialect."""

    @abstractmethod
    def spell(self, stem: str, slot: str) -> str:
        """The key of a slot, in the spelling that is written."""

    @abstractmethod
    def targets(
        self, modules: Mapping[str, Module], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        """Stem -> target."""

    def stem(self, target: Target, paths: Iterable[str], update: Update) -> str | None:
        """The name of a target in keys; None where it has none."""
        return target.path if target.rows is None else None

    def rescaled(self, found: Found, stem: str, metadata: Mapping[str, str]) -> Found:
        """An update with a scaling that stands elsewhere than in the slots."""
        return found

    def renamed(self, updates: Updates, kept: Iterable[str], *, fold: bool) -> tuple[Changed, Losses]:
        """The updates in the naming of its files, and those that cannot be; targets that are kept stay as they are."""
        if self.naming == "diffusers":
            return in_diffusers(updates, kept)
        return in_native(updates, kept, fold=fold) if self.naming else (dict(updates), [])

    def metadata(self, updates: Updates, hints: Hints, stems: Mapping[str, str]) -> tuple[Metadata, bool]:
        """The metadata to write, and whether they say the scalings, so that alphas are left out."""
        return hints.metadata, False

    def chosen(self, path: Path, *, write: bool = False) -> Path:
        """The file, where a folder may be named."""
        return path

    # What is the same for all.

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        try:
            tensors, metadata = container.load(self.chosen(path))
            return self._decode(at_once(tensors), metadata, compat, base)
        except AdapterkitError as error:
            raise error.at(path=path) from None

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        tensors, metadata, lines = self._encode(adapter, on_loss, base)
        there = self.chosen(path, write=True)
        if not there.parent.is_dir():
            there.parent.mkdir(parents=True, exist_ok=True)
        container.save(there, tensors, metadata)
        return lines

    def _rules(self, compat: str | None) -> Rules:
        from dataclasses import replace

        return replace(self.rules, lenient=True) if compat else self.rules

    def _decode(
        self, tensors: Mapping[str, Lazy], metadata: Metadata, compat: str | None, base: Checkpoint | None
    ) -> Adapter:
        modules = self.modules(tensors)
        targets = self.targets(modules, dict(metadata), base)
        _check_distinct(targets)
        check_biases(modules, self.switch)
        rules, updates, hints = self._rules(compat), dict[Target, tuple["Update", ...]](), Leftovers()
        for stem, module in modules.items():
            found = [self.rescaled(each, stem, dict(metadata)) for each in decode(module, rules)]
            updates[targets[stem]] = tuple(each.update for each in found)
            hints.add(self.spell, targets[stem], module, found, rules)
        placed_there = updates if base is None else placed(updates, base)
        hints.stems |= {str(t): hints.stems[str(t)] for t in placed_there if str(t) in hints.stems}
        data = hints.made(metadata, compat)
        kept = {key: tensors[key] for key in hints.kept}
        return Adapter(placed_there, None, (Step("read", {"format": self.name()}),), Foreign(self.name(), data, kept))

    def switch(self, stem: str) -> str:
        """The part of a file in which all LoRAs have a bias, or none."""
        return ""

    def modules(self, tensors: Mapping[str, Lazy]) -> dict[str, Module]:
        """Stem -> the tensors of one module.

        Raises:
            Malformed: a key is of another dialect, or comes twice.
        """
        grouped: dict[str, dict[str, Key]] = {}
        for text in tensors:
            key = self.parse(text)
            if key is None:
                cure = f"Take it out, or convert the file that it comes from; {self.name()} has no such keys"
                raise Malformed("a key of no known slot", where=text, cure=cure)
            slots = grouped.setdefault(key.stem, {})
            if key.slot in slots:
                raise Malformed(f"the same as {slots[key.slot].text}", where=text, cure=AGAIN)
            slots[key.slot] = key
        if not grouped:
            raise Malformed("no tensors", cure=AGAIN)
        return {
            stem: Module(stem, {s: tensors[k.text] for s, k in slots.items()}, {s: k.text for s, k in slots.items()})
            for stem, slots in grouped.items()
        }

    def _encode(
        self, adapter: Adapter, on_loss: str, base: Checkpoint | None
    ) -> tuple[dict[str, Lazy], Metadata, list[str]]:
        hints = hints_of(adapter, self.name())
        kept = {} if not hints.stems or adapter.foreign is None else adapter.foreign.tensors
        updates, lines = self._expressible(adapter.updates, hints, on_loss)
        stems = self._stems(updates, hints)
        metadata, said = self.metadata(updates, hints, {str(t): stems[t, 0] for t in updates})
        tensors: dict[str, Lazy] = {}
        for target, found in updates.items():
            for position, update in enumerate(found):
                for stored in encode(update, self.rules, kernel_of(target, base)):
                    for key, leaf in self._stored(stems[target, position], stored, update, hints, kept, said).items():
                        if key in tensors and not _same(stored, tensors[key], leaf):
                            why = f"two updates have the key {key}"
                            raise Unrepresentable(why, cure="Write adapterkit's own format")
                        tensors[key] = leaf
        return tensors, metadata, lines

    def _stored(
        self, stem: str, stored: Stored, update: Update, hints: Hints, kept: Mapping[str, object], said: bool
    ) -> dict[str, Lazy]:
        """The keys and tensors of one slot: those that were kept, where they still say the same."""
        default = self.spell(stem, stored.slot)
        key, leaf = hints.keys.get(default, default), as_lazy(stored.leaf)
        if stored.field:
            sources = self._sources(stem, stored, hints, kept)
            if sources and all(hints.derived[k] == fingerprint(leaf) for k in sources):
                return sources
            shape = hints.shapes.get(key)
            return {key: leaf.reshape(*shape) if shape and _fits(leaf, shape) else leaf}
        if key in kept:
            old = as_lazy(kept[key])  # type: ignore[arg-type]
            if stored.slot != "alpha" or still(old, leaf, update):
                return {key: old}
        if stored.slot != "alpha" or key in kept:
            return {key: leaf}
        spared = stem in hints.without_alpha or not self.rules.alpha_needed
        return {} if said or (spared and getattr(update, "scaling", 1.0) == 1.0) else {key: leaf}

    def _sources(self, stem: str, stored: Stored, hints: Hints, kept: Mapping[str, object]) -> dict[str, Lazy]:
        """The tensors from which a field was computed when it was read."""
        if stored.slot != "down" or not hints.derived:
            return {}
        keys = [hints.keys.get(k, k) for k in (self.spell(stem, "down"), self.spell(stem, "mid"))]
        return {k: as_lazy(kept[k]) for k in keys if k in kept and k in hints.derived}  # type: ignore[arg-type]

    def _stems(self, updates: Updates, hints: Hints) -> dict[tuple[Target, int], str]:
        paths = [target.path for target in updates]
        found: dict[tuple[Target, int], str] = {}
        for target, each in updates.items():
            for position, update in enumerate(each):
                stem = hints.stems.get(str(target)) or self.stem(target, paths, update)
                assert stem is not None
                found[target, position] = stem
        return found

    def _expressible(self, updates: Updates, hints: Hints, on_loss: str) -> tuple[Updates, list[str]]:
        """What a file can say, and a line for each thing that was left out or rewritten."""
        updates, lines = rewritten(updates, self.rules, on_loss)
        places = [(t, i) for t, found in updates.items() for i, u in enumerate(found) if why_not(u, self.rules)]
        updates, losses = self.renamed(updates, hints.stems, fold=on_loss in ("fold", "promote"))
        losses += list(self._losses(updates, hints))
        items = [f"{target}: {why}" for target, why in dict.fromkeys(losses)]
        if items and on_loss != "drop":
            cure = "Drop them with on_loss='drop', or write adapterkit's own format"
            why = f"{self.name()} has no words for these updates"
            raise Unrepresentable(why, items=items, cure=cure, places=places)
        lost = {target for target, _ in losses}
        kept = {target: found for target, found in updates.items() if target not in lost}
        if not kept:
            why = f"nothing of this adapter fits a file of {self.name()}"
            raise Unrepresentable(why, items=items, cure="Write adapterkit's own format")
        return kept, [*lines, *(f"left out {item}" for item in items)]

    def _losses(self, updates: Updates, hints: Hints) -> Iterable[tuple[Target, str]]:
        paths = [target.path for target in updates]
        yield from mixed_biases(
            updates,
            lambda target, update: self.switch(hints.stems.get(str(target)) or self.stem(target, paths, update) or ""),
        )
        for target, found in updates.items():
            slots: set[str] = set()
            for update in found:
                why = why_not(update, self.rules)
                if not why and target.layout != "out *in" and hasattr(update, "A"):
                    why = f"{update.method} on a weight stored as {target.layout}"
                if not why and str(target) not in hints.stems and self.stem(target, paths, update) is None:
                    why = "rows of a weight" if target.rows else "a module of no part of an image model"
                if not why:
                    own = {stored.slot for stored in encode(update, self.rules)}
                    why = "several updates of one law on one module" if own & slots else ""
                    slots |= own
                if why:
                    yield target, why


def _same(stored: Stored, one: Lazy, other: Lazy) -> bool:
    """Whether two updates share an alpha: parts of one module that change apart."""
    return stored.slot == "alpha" and (one.dtype, bytes(one.fetch())) == (other.dtype, bytes(other.fetch()))


def _check_distinct(targets: Mapping[str, Target]) -> None:
    seen: dict[Target, str] = {}
    for stem, target in targets.items():
        if target in seen:
            why = f"it is the module {target}, as is {seen[target]}"
            raise Malformed(why, where=stem, cure="Take one of the two out of the file")
        seen[target] = stem


def _fits(leaf: Lazy, shape: list[int]) -> bool:
    import math

    return math.prod(leaf.shape) == math.prod(shape)


def folder_file(path: Path, names: Iterable[str]) -> Path:
    """The file of one of these names in a folder; the path itself where it is none.

    Raises:
        UsageError: the folder holds none.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in names if (path / name).exists()), None)
    if found is None:
        raise UsageError(f"no {' or '.join(names)} in this folder", path=path, cure="Name the file itself")
    return found
