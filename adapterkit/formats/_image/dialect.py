"""Define the base class of image-model formats: grammar of keys, rules for scalings, names of modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...errors import AdapterkitError, Malformed, Unsupported, UsageError
from .._format import Departure, Format
from .._padding import lora_among_zeros, refused
from . import container
from .bundles import PREFIX
from .file import AGAIN, ImageKey, ImageModule, Rules

if TYPE_CHECKING:
    from ...core.adapter import Adapter, Target, Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy
    from .._format import LayerFacts
    from .container import Metadata
    from .deciding import Origin
    from .file import ImageUpdate
    from .hints import ImageHints
    from .translate import Changed, Losses


ALPHAS = {
    "alpha_missing_or_zero": Departure(
        "an alpha that is missing or 0 means the rank, so that the scaling is 1",
        "alpha / r: a file without an alpha is refused, and an alpha of 0 is a scaling of 0",
    )
}
"""The rule in the trainers sd-scripts and LyCORIS: `alpha = lora_dim if alpha is None or alpha == 0 else alpha`."""


def zero_padded(update: Update, layer: LayerFacts) -> Update:
    """Return the update as its trainer's forward computes it on a convolution that does not pad with zeros.

    Raises:
        Unsupported: no method computes that function.
    """
    if not layer.padding.startswith("padding_mode") or update.kind not in ("additive", "weight", "output"):
        return update
    changed = lora_among_zeros(update)
    if changed is None or "dilation" in layer.padding:
        raise refused(update, layer, "its trainer")
    return changed


PADDING = {
    "convolution_padding": Departure(
        "on a convolution whose padding_mode is not zeros, which only a live layer shows: the change reads zeros "
        "around the input; methods other than LoRA are refused there",
        "the change of the weight, with the layer's padding, as tools merge it",
        zero_padded,
    )
}
"""Trainers add a separate convolution to the base's forward, and copy only the amount of the layer's padding."""


class ImageFormat(Format, ABC):
    """A format with one tensor file; a subclass defines its keys and the names of its modules.

    Class attributes:
        rules: the rules for scalings, and the slots.
        naming: `native` or `diffusers` if all files use this naming; empty if files may use any.
        bundles: whether files can store token embeddings together with LoRAs.
        rows: whether files can adapt only some rows of a fused weight.
    """

    options: ClassVar[frozenset[str]] = frozenset({"family"})
    models: ClassVar[str] = "image"
    rules: ClassVar[Rules] = Rules()
    naming: ClassVar[str] = ""
    bundles: ClassVar[bool] = False
    rows: ClassVar[bool] = False

    @classmethod
    def name(cls) -> str:
        return cls.__module__.rpartition(".")[2]

    # Subclasses define these methods.

    @abstractmethod
    def parse(self, key: str) -> ImageKey | None:
        """Split a key into a module name and a slot; None if the key belongs to another format."""

    @abstractmethod
    def spell(self, stem: str, slot: str) -> str:
        """Return the key of a module's slot, as the writer spells it."""

    @abstractmethod
    def targets(
        self, modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        """Return the target of each module, by the module's name in keys."""

    def stem(self, target: Target, paths: Iterable[str], update: Update) -> str | None:
        """Return a target's module name in keys; None if the format cannot name it."""
        return target.path if target.rows is None else None

    def rescaled(self, found: ImageUpdate, stem: str, metadata: Mapping[str, str]) -> ImageUpdate:
        """Apply a scaling that is stored outside the slots to an update."""
        return found

    def renamed(self, updates: Updates, kept: Collection[str], origin: Origin, *, fold: bool) -> tuple[Changed, Losses]:
        """Move updates to the naming of this format's files, except `kept` targets; return the others as losses."""
        from .deciding import FAMILIES
        from .translate import in_diffusers, in_naming

        if self.naming == "diffusers":
            return in_diffusers(updates, kept, origin)
        if not self.naming:
            return dict(updates), []
        if own := FAMILIES.get(self.name()):
            # Ignore other families: files of this format belong only to these.
            origin = replace(origin, families=own)
        return in_naming(updates, self.naming, kept, origin, fold=fold, rows=self.rows)

    def prepared(self, updates: Updates) -> Updates:
        """Rewrite updates, without changing their function, into forms that only this format has."""
        return updates

    def why_not(self, target: Target, update: Update, rules: Rules) -> str:
        """Return the reason why this format's files cannot express an update at a target; empty if they can."""
        from .encode import why_not

        return why_not(update, rules)

    def metadata(self, updates: Updates, hints: ImageHints, stems: Mapping[str, str]) -> tuple[Metadata, bool]:
        """Return the metadata to write, and whether it states the scalings, so that alphas are omitted."""
        return hints.metadata, False

    def chosen(self, path: Path, *, write: bool = False) -> Path:
        """Return the file to read or write if the path is a folder; otherwise the path."""
        return path

    def rules_in(self, file: Path, hints: ImageHints) -> Rules:
        """Return the rules for writing a file with this name."""
        return self.rules

    # These methods are the same for all formats.

    def read(
        self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None, family: str | None = None
    ) -> Adapter:
        from .reading import check_family, decoded, of_family

        try:
            tensors, metadata = container.load(self.chosen(path))
            adapter = decoded(self, tensors, of_family(metadata, family), compat, base)
            if family is not None:
                check_family(adapter, family)
            return adapter
        except AdapterkitError as error:
            raise error.at(path=path) from None

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        from .writing import encoded

        there = self.chosen(path, write=True)
        tensors, metadata, lines = encoded(self, adapter, there, on_loss, base)
        if not there.parent.is_dir():
            there.parent.mkdir(parents=True, exist_ok=True)
        container.save(there, tensors, metadata)
        return lines

    def switch(self, stem: str) -> str:
        """Return the part of the file that a module belongs to; in each part all LoRAs have a bias, or none has."""
        return ""

    def modules(self, tensors: Mapping[str, Lazy]) -> dict[str, ImageModule]:
        """Group the tensors by module name.

        Raises:
            Malformed: a key belongs to another format, or occurs twice.
            Unsupported: a token embedding belongs in another file.
        """
        grouped: dict[str, dict[str, ImageKey]] = {}
        for text in tensors:
            key = self.parse(text)
            if key is None and text.startswith(PREFIX):
                why = f"{self.name()} cannot store a token embedding in a LoRA file"
                raise Unsupported(why, where=text, cure="Move the keys bundle_emb.* to a separate file")
            if key is None:
                cure = f"Remove it, or convert the file that it comes from; {self.name()} has no such keys"
                raise Malformed("the key ends in no known slot", where=text, cure=cure)
            slots = grouped.setdefault(key.stem, {})
            if key.slot in slots:
                raise Malformed(f"this key means the same as {slots[key.slot].text}", where=text, cure=AGAIN)
            slots[key.slot] = key
        if not grouped:
            raise Malformed("the file has no tensors", cure=AGAIN)
        return {
            stem: ImageModule(
                stem, {s: tensors[k.text] for s, k in slots.items()}, {s: k.text for s, k in slots.items()}
            )
            for stem, slots in grouped.items()
        }


def folder_file(path: Path, names: Iterable[str]) -> Path:
    """Return the first of these files that a folder has; the path itself if it is not a folder.

    Raises:
        UsageError: the folder has none of these files.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in names if (path / name).exists()), None)
    if found is None:
        raise UsageError(f"this folder has no {' or '.join(names)}", path=path, cure="Name the file itself")
    return found
