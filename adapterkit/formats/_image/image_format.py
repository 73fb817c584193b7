"""Define `ImageFormat`, the base class of formats for image models: it reads and writes one tensor file."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...core.adapter import Adapter, Foreign, Step, Target, Updates
from ...core.updates import Update
from ...errors import (
    USE_ITS_BASE,
    WRITE_AGAIN,
    AdapterkitError,
    Malformed,
    TargetNotFound,
    Unsupported,
    UsageError,
    nearest,
)
from ...io.lazy import DTYPES, Lazy, as_array, as_lazy, at_once
from ...methods.dora import DoRA
from ...methods.loha import LoHa
from ...methods.lokr import LoKr
from ...methods.lora import LoRA
from ...methods.weight_norm import WeightNorm
from ...naming.image import ROOTS, families, families_with, rooted
from ...naming.moves import WRAPPERS
from .._format import Departure, Format
from .._trained import lora_among_zeros, refused
from .bundles import PREFIX, ImageBundle, split
from .deciding import FAMILY, Origin, check_stated_family, denoiser_targets, families_in
from .file import ImageKey, ImageModule, Rules, load_tensors, rules_for, save_tensors
from .hints import ImageLeftovers
from .open_clip import in_open_clip
from .slots import decode
from .translate import in_naming
from .underscores import TargetPaths, modules_of

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint
    from .._format import LayerFacts
    from .file import ImageUpdate, Metadata
    from .hints import ImageHints
    from .translate import Changed, Losses

ALPHAS = {
    "alpha_missing_or_zero": Departure(
        "if the alpha is missing or 0, the rank is used as alpha, so the scaling is 1",
        "the scaling is alpha / r; a missing alpha is an error, and an alpha of 0 gives a scaling of 0",
    )
}
"""sd-scripts and LyCORIS compute `alpha = lora_dim if alpha is None or alpha == 0 else alpha`."""


def zero_padded(update: Update, layer: LayerFacts) -> Update:
    """Return an update that has the same effect as in the trainer, even if the layer does not pad with zeros.

    Raises:
        Unsupported: no method of adapterkit computes the same function as the trainer's forward.
    """
    if not layer.padding.startswith("padding_mode") or update.kind not in ("additive", "weight", "output"):
        return update
    changed = lora_among_zeros(update)
    if changed is None or "dilation" in layer.padding:
        raise refused(update, layer, "its trainer")
    return changed


PADDING = {
    "convolution_padding": Departure(
        "if a convolution's padding_mode is not zeros (a file does not show the mode, only the live layer does), the "
        "LoRA still pads its input with zeros, and other methods are refused",
        "the change is added to the weight, as tools merge it, so the layer's own padding applies",
        zero_padded,
    )
}
"""Trainers run a convolution's LoRA as another convolution, which pads by the same width, but always with zeros."""


class ImageFormat(Format, ABC):
    """A format with one tensor file. Subclasses define the file's keys and the names of modules in the keys.

    Class attributes:
        rules: the rules for decoding and encoding, including the slots that keys may have.
        naming: the naming that all files have, such as `native` or `diffusers`; empty if files may have any naming.
        bundles: whether files can store token embeddings together with LoRAs.
        rows: whether a file can adapt only some rows of a fused weight.
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

    # Subclasses define the abstract methods, and may override the other methods.

    @abstractmethod
    def parse(self, key: str) -> ImageKey | None:
        """Split a key into a module name and a slot; None if the key belongs to another format."""

    @abstractmethod
    def spell(self, stem: str, slot: str) -> str:
        """Return the key that the writer uses for a module's name and a slot."""

    @abstractmethod
    def targets(
        self, modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        """Return a map from each module's name in the file to the module's target."""

    def stem(self, target: Target, paths: TargetPaths, update: Update) -> str | None:
        """Return the name of a target's module in the format's keys; None if the format has no name for the module."""
        return target.path if target.rows is None else None

    def rescaled(self, decoded_update: ImageUpdate, stem: str, metadata: Mapping[str, str]) -> ImageUpdate:
        """Apply a scaling that is stored outside the module's slots, such as in the header. Return the new update."""
        return decoded_update

    def renamed(self, updates: Updates, kept: Collection[str], origin: Origin, *, fold: bool) -> tuple[Changed, Losses]:
        """Rename all targets except `kept` to this format's naming.

        Return the updates, and (target, reason) for each target that cannot be renamed.
        """
        from .deciding import FAMILIES
        from .translate import in_diffusers

        if self.naming == "diffusers":
            return in_diffusers(updates, kept, origin)
        if not self.naming:
            return dict(updates), []
        if families := FAMILIES.get(self.name()):
            # All files of this format are for models of these families.
            origin = replace(origin, families=families)
        return in_naming(updates, self.naming, kept, origin, fold=fold, rows=self.rows)

    def prepared(self, updates: Updates) -> Updates:
        """Rewrite updates as the format requires, without changing the function that they compute."""
        return updates

    def why_not(self, target: Target, update: Update, rules: Rules) -> str:
        """Return the reason why this format's files cannot express an update at a target; empty if they can."""
        from .slots import why_not

        return why_not(update, rules)

    def metadata(self, updates: Updates, hints: ImageHints, stems: Mapping[str, str]) -> tuple[Metadata, bool]:
        """Return the metadata to write, and whether it contains the scalings. If it does, no alphas are written."""
        return hints.metadata, False

    def chosen(self, path: Path, *, write: bool = False) -> Path:
        """Return the file to read or write: `path` itself, or a file in it if `path` is a folder."""
        return path

    def rules_in(self, file: Path, hints: ImageHints) -> Rules:
        """Return the rules for writing to this file; they may depend on the file's suffix."""
        return self.rules

    # Most formats do not override these methods.

    def read(
        self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None, family: str | None = None
    ) -> Adapter:

        try:
            tensors, metadata = load_tensors(self.chosen(path))
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
        save_tensors(there, tensors, metadata)
        return lines

    def switch(self, stem: str) -> str:
        """Return the component of a module. In each component, either all LoRAs must have a bias, or none may have one.

        By default, all modules of a file are in one component.
        """
        return ""

    def modules(self, tensors: Mapping[str, Lazy]) -> dict[str, ImageModule]:
        """Parse the keys, and group the tensors by module name.

        Raises:
            Malformed: a key belongs to another format, or two keys have the same meaning.
            Unsupported: the file has a token embedding, which this format stores in a separate file.
        """
        grouped: dict[str, dict[str, ImageKey]] = {}
        for text in tensors:
            key = self.parse(text)
            if key is None and text.startswith(PREFIX):
                why = f"{self.name()} cannot store a token embedding in a LoRA file"
                raise Unsupported(why, where=text, cure="Move the tensors with keys bundle_emb.* to a separate file")
            if key is None:
                cure = "Remove this tensor from the file. If the tensor comes from another file, convert that file"
                raise Malformed(f"this is not a key of the format {self.name()}", where=text, cure=cure)
            slots = grouped.setdefault(key.stem, {})
            if key.slot in slots:
                raise Malformed(
                    f"this key has the same meaning as {slots[key.slot].text}", where=text, cure=WRITE_AGAIN
                )
            slots[key.slot] = key
        if not grouped:
            raise Malformed("the file has no tensors", cure=WRITE_AGAIN)
        return {
            stem: ImageModule(
                stem, {s: tensors[k.text] for s, k in slots.items()}, {s: k.text for s, k in slots.items()}
            )
            for stem, slots in grouped.items()
        }


def folder_file(path: Path, names: Iterable[str]) -> Path:
    """Return the path of the first file in `names` that the folder contains; if `path` is not a folder, return `path`.

    Raises:
        UsageError: the folder has none of these files.
    """
    if not path.is_dir():
        return path
    file = next((path / name for name in names if (path / name).exists()), None)
    if file is None:
        raise UsageError(f"this folder has no {' or '.join(names)}", path=path, cure="Pass the file itself")
    return file


# Read a file of an image format: group keys into modules, decode each module's updates, and find the targets.


def decoded(
    image_format: ImageFormat,
    tensors: Mapping[str, Lazy],
    metadata: Metadata,
    compat: str | None,
    base: Checkpoint | None,
) -> Adapter:
    """Return the adapter that a file's tensors and metadata contain.

    Raises:
        Malformed: a key belongs to another format, or two keys have the same meaning.
    """
    tensors, metadata = _with_alphas(image_format, at_once(tensors), metadata)
    tensors, embeddings = split(tensors) if image_format.bundles else (tensors, {})
    modules = image_format.modules(tensors)
    targets = {stem: _unwrapped(t) for stem, t in image_format.targets(modules, dict(metadata), base).items()}
    _check_distinct(targets)
    _check_apart(targets)
    check_biases(modules, image_format.switch)
    rules = rules_for(image_format.rules, compat, dict(metadata))
    updates, hints = dict[Target, tuple["Update", ...]](), ImageLeftovers()
    for stem, module in modules.items():
        decoded_updates = [image_format.rescaled(each, stem, dict(metadata)) for each in decode(module, rules)]
        _check_shapes(stem, decoded_updates)
        updates[targets[stem]] = tuple(each.update for each in decoded_updates)
        hints.add(image_format.spell, targets[stem], module, decoded_updates, rules)
    if base is not None:
        inside = [rooted(target.path)[1] for target in denoiser_targets(updates, ())]
        check_stated_family(list(dict.fromkeys(inside)), base, dict(metadata))
    placed_there = updates if base is None else placed(updates, base)
    if base is not None:
        shaped = with_kernels(placed_there, base)
        for target in [target for target in shaped if target in updates and shaped[target] is not placed_there[target]]:
            # Record the shapes in the file, so that the writer flattens these factors again.
            module = modules[hints.stems[str(target)]]
            hints.shapes |= {module.keys[slot]: list(module.tensors[slot].shape) for slot in ("down", "up")}
        placed_there = shaped
    bundle = ImageBundle(embeddings, updates, Origin(image_format.naming, metadata=dict(metadata)))
    hints.keys |= bundle.keys
    hints.shapes |= bundle.shapes
    hints.stems |= {str(t): hints.stems[str(t)] for t in placed_there if str(t) in hints.stems}
    data = hints.to_builtins(metadata, compat)
    kept = {key: tensors[key] for key in hints.kept}
    name = image_format.name()
    return Adapter(
        {**placed_there, **bundle.updates}, None, (Step("read", {"format": name}),), Foreign(name, data, kept)
    )


def _unwrapped(target: Target) -> Target:
    """Remove the names that torch.compile, FSDP and activation checkpointing insert into a target's path."""
    words = target.path.split(".")
    if WRAPPERS.isdisjoint(words):
        return target
    return replace(target, path=".".join(word for word in words if word not in WRAPPERS))


def of_family(metadata: Metadata, family: str | None) -> Metadata:
    """Return the metadata with an entry that names `family`; unchanged if `family` is None.

    Raises:
        UsageError: no family has this name.
    """
    if family is None:
        return metadata
    known = [each.name for each in families()]
    if family not in known:
        cure = nearest(family, known) or f"Known: {', '.join(sorted(known))}"
        raise UsageError(f"unknown family {family!r}", cure=cure)
    return [*((key, value) for key, value in metadata if key != FAMILY), (FAMILY, family)]


def check_family(adapter: Adapter, family: str) -> None:
    """Check that the family with the name `family` has every U-Net or transformer module that the adapter changes.

    Raises:
        UsageError: the family lacks one of these modules; the error names the module.
    """
    expected = next(each for each in families() if each.name == family)
    for target in denoiser_targets(adapter.updates, ()):
        if rooted(target.path)[1] not in expected:
            why = f"{expected.title} does not have this module"
            raise UsageError(why, where=str(target), cure="Name another family, or omit --family (family=)")


def _check_shapes(stem: str, decoded_updates: list[ImageUpdate]) -> None:
    """Check the shapes of all updates, because `ImageLeftovers` encodes the updates and needs correct shapes."""
    for each in decoded_updates:
        try:
            each.update.dims()
        except AdapterkitError as error:
            error.where = f"{stem}: {error.where}"
            raise


def _check_apart(targets: Mapping[str, Target]) -> None:
    """Check that the file does not contain updates of both a fused weight and the parts of this weight.

    Some trainers of Z-Image write a LoRA for the fused weight of queries, keys and values, and also one for each part.
    With such a file, diffusers ignores the LoRA of the fused weight, and other tools add all of these LoRAs.

    Raises:
        Malformed: the file changes a module twice.
    """
    inside = {stem: rooted(t.path)[1] for stem, t in targets.items() if t.path.startswith("transformer.")}
    names = list(dict.fromkeys(inside.values()))
    fitting = families_with(names)
    if not fitting or any(family.naming_of(names) for family in fitting):
        return
    seen: dict[str, str] = {}
    for stem, rest in inside.items():
        family = fitting[0]
        for piece in family.moves(rest, family.naming_of([rest]), "diffusers"):
            if seen.setdefault(piece.path, stem) != stem:
                why = f"this key and {seen[piece.path]} both change {piece.path}"
                raise Malformed(why, where=stem, cure="Remove one of the two keys from the file")


def _check_distinct(targets: Mapping[str, Target]) -> None:
    seen: dict[Target, str] = {}
    for stem, target in targets.items():
        if target in seen:
            why = f"this key and {seen[target]} both name the module {target}"
            raise Malformed(why, where=stem, cure="Remove one of the two keys from the file")
        seen[target] = stem


# Read the alpha in the header. For some families, trainers store one alpha in the header, which applies to all modules.

ALPHA = "alpha"
"""The key of alpha in the header, and also the name of the slot for alpha."""

CONFIG = "lora_adapter_metadata"
"""The key of diffusers' config in the header. The config contains every scaling."""


def _with_alphas(
    image_format: ImageFormat, tensors: Mapping[str, Lazy], metadata: Metadata
) -> tuple[dict[str, Lazy], Metadata]:
    """Return the tensors with the header's alpha added to each LoRA, and the metadata without the alpha.

    Most loaders ignore an alpha in the header. So apply this alpha only if `header_alpha` is true for all possible
    families. Ignore the header's alpha if the file has alpha tensors or diffusers' config.
    """
    value = _finite(dict(metadata).get(ALPHA, ""))
    parsed = [key for key in map(image_format.parse, tensors) if key is not None] if value else []
    if not parsed or CONFIG in dict(metadata) or any(key.slot == ALPHA for key in parsed):
        return dict(tensors), metadata
    stems = dict.fromkeys(key.stem for key in parsed if key.slot == "down")
    fitting = families_with({rooted(stem)[1] for stem in stems})
    if not (fitting and all(family.facts.header_alpha for family in fitting)):
        return dict(tensors), metadata
    alpha = Lazy((), DTYPES["F32"], lambda: _float32(value))
    added = {image_format.spell(stem, ALPHA): alpha for stem in stems}
    return {**tensors, **added}, [(key, text) for key, text in metadata if key != ALPHA]


def _finite(text: str) -> float:
    """Convert text to a number; return 0 if the text is not a number, or if the absolute value is not below 1e30."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and abs(value) < 1e30 else 0.0


def _float32(value: float) -> bytes:
    import numpy as np

    return np.array(value, "<f4").tobytes()


# Translate targets to the module names of a given base, whose prefixes and naming may differ from the file's.


_DENOISERS = ("unet", "transformer")


def placed(updates: Updates, base: Checkpoint) -> dict[Target, tuple[Update, ...]]:
    """Translate the targets of updates to module names of a base.

    Raises:
        TargetNotFound: the base lacks a target's module; the error names the most similar module.
        Malformed: an update of a fused weight and an update of one of its parts change the same weight of the base.
        Unsupported: the base has the parts of a fused weight, and an update of this weight cannot be split.
    """
    known = set(modules_of(base))
    placed_updates: dict[Target, tuple[Update, ...]] = {}
    for target, each in updates.items():
        for place, update in _placed(target, each, known).items():
            if place.path not in known:
                place = in_open_clip(place, update, base) or place
            placed_updates[place] = (*placed_updates.get(place, ()), *update)
    lost = next((t for t in placed_updates if t.path not in known), None)
    if lost is None:
        return placed_updates
    origin = Origin(families=families_in(base))
    why: tuple[Target, str] | None = None
    # Try `fuse` first: if the base has the fused modules that diffusers creates, a LoKr stays a LoKr.
    for naming, fuse in (("native", True), ("diffusers", True), ("native", False), ("diffusers", False)):
        missing = {t: u for t, u in placed_updates.items() if t.path not in known}
        moved, losses = in_naming(missing, naming, (), origin, fuse=fuse, for_base=not fuse)
        there = {place: u for t, each in moved.items() for place, u in _placed(t, each, known).items()}
        if there and all(t.path in known for t in there):
            kept = {t: u for t, u in placed_updates.items() if t not in missing}
            return {**_apart(kept, there), **there}
        unmoved = {t for t, _ in losses}
        if losses and all(place.path in known for t in moved.keys() - unmoved for place in _placed(t, (), known)):
            why = why or losses[0]
    if why is not None:
        cure = "Pass a base that has this fused weight, such as the checkpoint that the model's authors published"
        raise Unsupported(why[1], where=str(why[0]), cure=cure)
    cure = nearest(lost.path, known) or USE_ITS_BASE
    raise TargetNotFound("the base does not have this module", where=str(lost), cure=cure)


def _apart(
    kept: Mapping[Target, tuple[Update, ...]], parts: Mapping[Target, tuple[Update, ...]]
) -> dict[Target, tuple[Update, ...]]:
    """Omit updates that change nothing from `kept`, if a target is also in `parts`, the parts of fused weights.

    SimpleTuner's files of fused attentions also have adapters of the parts, which were never trained.

    Raises:
        Malformed: a target in both has an update in `kept` that changes the weight.
    """
    both = [target for target in kept if target in parts]
    for target in both:
        if not all(isinstance(update, WeightNorm) or _changes_nothing(update) for update in kept[target]):
            why = "the file changes this weight twice: by itself, and as a part of a fused weight"
            raise Malformed(why, where=str(target), cure="Remove one of the two modules from the file")
    return {target: each for target, each in kept.items() if target not in both}


def _changes_nothing(update: Update) -> bool:
    """Whether the update is a product of which a factor is zero."""
    product = isinstance(update, (LoKr, LoHa)) or (isinstance(update, LoRA) and update.bias is None)
    return product and not all(as_array(as_lazy(leaf)).any() for leaf in update.tensors.values())


def _placed(target: Target, each: tuple[Update, ...], known: set[str]) -> dict[Target, tuple[Update, ...]]:
    """Replace the target's prefix by the base's prefix for the module. Keep the target if the base lacks the module."""
    if target.path in known:
        return {target: each}
    root, rest = rooted(target.path)
    component = ROOTS.get(root[:-1], "")
    # For a U-Net or a transformer, try both components: ComfyUI's prefix `diffusion_model.` may mean either of them.
    alike = {component, "denoiser", *(_DENOISERS if component in _DENOISERS else ())}
    same = [word for word, part in ROOTS.items() if part in alike]
    tries = [rest, *(f"{word}.{rest}" for word in same)]
    path = next((path for path in tries if path in known), target.path)
    return {replace(target, path=path): each}


def with_kernels(updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint) -> dict[Target, tuple[Update, ...]]:
    """Restore the kernel axes of A in LoRAs of convolutions whose file stores A as a matrix `[r, in * k]`.

    ComfyUI's node for training stores such matrices. Its loader, like other tools, gives the product of the factors the
    weight's shape.
    """
    return {target: _with_kernel(each, base.tensors.get(f"{target.path}.weight")) for target, each in updates.items()}


def _with_kernel(each: tuple[Update, ...], weight: Lazy | None) -> tuple[Update, ...]:
    if weight is None or len(weight.shape) < 3:
        return each
    columns = math.prod(weight.shape[1:])
    shaped = tuple(
        update.replace(A=as_lazy(update.A).reshape(-1, *weight.shape[1:]))
        if isinstance(update, (LoRA, DoRA)) and tuple(update.A.shape[1:]) == (columns,) != weight.shape[1:2]
        else update
        for update in each
    )
    return each if all(new is old for new, old in zip(shaped, each, strict=True)) else shaped


def kernel_of(target: Target, base: Checkpoint | None) -> int:
    """Return the number of kernel axes of a target's weight in the base; 0 if unknown."""
    if base is None:
        return 0
    known = (base.tensors.get(f"{path}.weight") for path in (target.path, rooted(target.path)[1]))
    return next((max(len(leaf.shape) - 2, 0) for leaf in known if leaf is not None), 0)


# Loaders have one bias setting for a whole component. So either all LoRAs of a component must have a bias, or none may
# have one.


def check_biases(modules: Mapping[str, ImageModule], part_of: Callable[[str], str]) -> None:
    """Check that in each component, either all LoRAs have a bias, or none has one.

    Raises:
        Malformed: some LoRAs of a component have a bias, and others do not.
    """
    biased = {part_of(stem) for stem, module in modules.items() if "bias" in module.tensors}
    for stem, module in modules.items():
        if "up" in module.tensors and "bias" not in module.tensors and part_of(stem) in biased:
            why = "the LoRA of this module has no bias, but other LoRAs of the same component have one"
            raise Malformed(why, where=module.keys["up"], cure=WRITE_AGAIN)


def mixed_biases(updates: Updates, part_of: Callable[[Target, Update], str]) -> Iterator[tuple[Target, str]]:
    """Find the components in which some LoRAs have a bias and others have none.

    Yield (target, reason) for each LoRA in the smaller of these two groups. If the groups have the same size, yield the
    LoRAs with a bias.
    """
    parties: dict[str, dict[bool, list[Target]]] = {}
    for target, group in updates.items():
        for update in group:
            if isinstance(update, (LoRA, DoRA)):
                party = parties.setdefault(part_of(target, update), {True: [], False: []})
                party[update.tensors.get("bias") is not None].append(target)
    for party in parties.values():
        if party[True] and party[False]:
            minority_has_bias = len(party[True]) <= len(party[False])
            yield from (
                (
                    target,
                    (
                        f"this LoRA {'has a' if minority_has_bias else 'has no'} bias, unlike other LoRAs of the same "
                        "component (such as the text encoder)"
                    ),
                )
                for target in party[minority_has_bias]
            )
