"""The base class of the formats of image models: grammar of keys, rules of scalings, names of modules."""

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
        "an alpha that is missing or 0 stands for the rank, so that the factor is 1",
        "alpha / r: without an alpha the file is refused, and an alpha of 0 is the factor 0",
    )
}
"""The rule of the trainers sd-scripts and LyCORIS: `alpha = lora_dim if alpha is None or alpha == 0 else alpha`."""


def zero_padded(update: Update, layer: LayerFacts) -> Update:
    """Return the update as its trainer's forward computes it at a convolution that does not pad with zeros.

    Raises:
        Unsupported: no method here computes that function.
    """
    if not layer.padding.startswith("padding_mode") or update.kind not in ("additive", "weight", "output"):
        return update
    changed = lora_among_zeros(update)
    if changed is None or "dilation" in layer.padding:
        raise refused(update, layer, "its trainer")
    return changed


PADDING = {
    "convolution_padding": Departure(
        "at a convolution whose padding_mode is not zeros, which only a live layer tells: the change reads zeros "
        "around the input; methods other than LoRA are refused there",
        "the change of the weight, with the padding of the layer, as it is merged",
        zero_padded,
    )
}
"""Trainers run a convolution of their own beside the base's forward; it copies only the layer's amount of padding."""


class ImageFormat(Format, ABC):
    """A format with one file of tensors; a subclass defines its keys and the names of its modules.

    Class attributes:
        rules: its rules for scalings, and its slots.
        naming: `native` or `diffusers` if its files use one naming; empty if they use any.
        bundles: whether its files can have embeddings of tokens beside the LoRAs.
        rows: whether its files can adapt some rows of a fused weight.
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

    # A subclass defines these methods.

    @abstractmethod
    def parse(self, key: str) -> ImageKey | None:
        """Split a key into module name and slot; None if it is another format's."""

    @abstractmethod
    def spell(self, stem: str, slot: str) -> str:
        """Return the key of a slot, spelled as the writer spells it."""

    @abstractmethod
    def targets(
        self, modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        """Return stem -> target."""

    def stem(self, target: Target, paths: Iterable[str], update: Update) -> str | None:
        """Return the name of a target in keys; None if it has none."""
        return target.path if target.rows is None else None

    def rescaled(self, found: ImageUpdate, stem: str, metadata: Mapping[str, str]) -> ImageUpdate:
        """Apply a scaling that is stored outside the slots to an update."""
        return found

    def renamed(self, updates: Updates, kept: Collection[str], origin: Origin, *, fold: bool) -> tuple[Changed, Losses]:
        """Move updates into the naming of its files; return them and those that cannot move. Kept targets stay."""
        from .deciding import FAMILIES
        from .translate import in_diffusers, in_naming

        if self.naming == "diffusers":
            return in_diffusers(updates, kept, origin)
        if not self.naming:
            return dict(updates), []
        if own := FAMILIES.get(self.name()):
            # All files of this format are of these families, so other families are not meant.
            origin = replace(origin, families=own)
        return in_naming(updates, self.naming, kept, origin, fold=fold, rows=self.rows)

    def prepared(self, updates: Updates) -> Updates:
        """Rewrite updates, without changing the function, into forms that only this format has."""
        return updates

    def why_not(self, target: Target, update: Update, rules: Rules) -> str:
        """Say why its files cannot express an update at a target; empty if they can."""
        from .encode import why_not

        return why_not(update, rules)

    def metadata(self, updates: Updates, hints: ImageHints, stems: Mapping[str, str]) -> tuple[Metadata, bool]:
        """Return the metadata to write, and whether they state the scalings, so that alphas are left out."""
        return hints.metadata, False

    def chosen(self, path: Path, *, write: bool = False) -> Path:
        """Return the file to use if the path is a folder."""
        return path

    def rules_in(self, file: Path, hints: ImageHints) -> Rules:
        """Return the rules for writing a file of this name."""
        return self.rules

    # These methods are the same for all subclasses.

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
        """Return the part of a file in which all LoRAs have a bias, or none."""
        return ""

    def modules(self, tensors: Mapping[str, Lazy]) -> dict[str, ImageModule]:
        """Return stem -> the tensors of one module.

        Raises:
            Malformed: a key is another format's, or is there twice.
            Unsupported: a key is of an embedding that belongs in another file.
        """
        grouped: dict[str, dict[str, ImageKey]] = {}
        for text in tensors:
            key = self.parse(text)
            if key is None and text.startswith(PREFIX):
                why = f"an embedding of a token, which {self.name()} has no place for in a file of LoRAs"
                raise Unsupported(why, where=text, cure="Take the keys bundle_emb.* out into a file of their own")
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
            stem: ImageModule(
                stem, {s: tensors[k.text] for s, k in slots.items()}, {s: k.text for s, k in slots.items()}
            )
            for stem, slots in grouped.items()
        }


def folder_file(path: Path, names: Iterable[str]) -> Path:
    """Return the file of one of these names in a folder; the path itself if it is not a folder.

    Raises:
        UsageError: the folder holds none.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in names if (path / name).exists()), None)
    if found is None:
        raise UsageError(f"no {' or '.join(names)} in this folder", path=path, cure="Name the file itself")
    return found
