"""Find the model family that an adapter's target names belong to, or list all possible families.

A family must have all of the names, because families share many names: half of a Qwen-Image LoRA's names also exist in
FLUX, and all names of a FLUX.2 LoRA on double blocks also exist in FLUX.1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...core.metadata import metadata_of, model_class_of, strings_of
from ...errors import UsageError
from ...io.inputs import decimal_number
from ...naming.image import (
    COMFYUI,
    ROOTS,
    ImageFamily,
    encoder_kind,
    families,
    families_of,
    families_of_model,
    families_of_names,
    rooted,
)

if TYPE_CHECKING:
    from ...core.adapter import Adapter, Target, Updates
    from ...io.checkpoint import Checkpoint

FAMILY = "adapterkit.family"
"""The metadata key whose value names the adapter's possible families. Writers add it; readers use it as evidence."""

FAMILIES = {"xlabs": ("flux", "chroma"), "bfl_control": ("flux",)}
"""A map from a format to its families, for formats that exist only for particular families of models."""

SOURCES = {"comfyui": COMFYUI, "xlabs": "native", "bfl_control": "native", "diffusers": "diffusers"}
"""A map from a format to the naming in its files.

kohya and LyCORIS are absent, because their files may have any naming (with underscores for dots).
"""

DENOISERS = ("unet", "transformer", "transformer_2", "denoiser")
"""The values in `ROOTS` that mean a U-Net or a transformer.

`transformer_2` is the second transformer of Wan 2.2, for low noise. `denoiser` means either a U-Net or a transformer.
"""

PREFIXES = ("diffusion_model.", "model.diffusion_model.", "base_model.model.", "conditional_transformer.", "pipe.dit.")
"""Prefixes that U-Net or transformer modules may have in files of ComfyUI's format."""

CONTROLNET = "controlnet"
"""The `component` of ControlNet families. A ControlNet copies a model's first blocks, with the same module names."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Everything that is known about the naming and the model family of an adapter's targets.

    Attributes:
        naming: `native` (the names of the model's authors), `comfyui` or `diffusers`; empty if unknown.
        families: the names of the possible families; empty if unknown. They come from the base. Without a base, they
            come from the adapter's format or config.
        inside: whether all targets are modules of the base.
        unknown: the name of the base's class in diffusers, if the base belongs to no known family; otherwise empty.
        metadata: the metadata of the file that the adapter was read from.
        bare: whether the file has ComfyUI's format and contains no module name with a prefix such as
            `diffusion_model.`. Most such files have diffusers' names.
        of_format: whether `families` comes only from the file's format; see `FAMILIES`.
    """

    naming: str = ""
    families: tuple[str, ...] = ()
    inside: bool = False
    unknown: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    bare: bool = False
    of_format: bool = False


UNKNOWN = Origin()


def origin_of(adapter: Adapter, base: Checkpoint | None) -> Origin:
    """Return the naming and the possible families of an adapter's targets, from its source file and from the base."""
    from .underscores import modules_of

    sources = {SOURCES.get(str(step.args.get("format")), "") for step in adapter.recipe if step.op == "read"}
    naming = next(iter(sources)) if len(sources) == 1 else ""
    # Add the keys in `foreign` that `metadata_of` omits.
    extra = {} if adapter.foreign is None else strings_of(adapter.foreign.data.get("metadata"))
    metadata = {**metadata_of(adapter), **extra}
    formats = {str(step.args.get("format")) for step in adapter.recipe if step.op == "read"}
    if base is None:
        families = FAMILIES.get(next(iter(formats)), ()) if len(formats) == 1 else ()
        kind, library = model_class_of(adapter)
        named = tuple(family.name for family in families_of_class(kind))
        unknown = "" if named or not library.startswith("diffusers.") else kind
        return Origin(
            naming, families or named, unknown=unknown, metadata=metadata, bare=_bare(adapter, naming),
            of_format=bool(families),
        )  # fmt: skip
    known = set(modules_of(base))
    families = families_in(base)
    if "_diffusers_version" in (base.config or {}):
        naming = "diffusers"
    elif any(path.startswith(("model.diffusion_model.", "diffusion_model.")) for path in known):
        naming = "native"
    inside = all(target.path in known for target in adapter.updates)
    kind = str((base.config or {}).get("_class_name", ""))
    return Origin(naming, families, inside, "" if families else kind, metadata, _bare(adapter, naming))


def _bare(adapter: Adapter, naming: str) -> bool:
    """Whether a file has ComfyUI's format and contains no module name with a prefix such as `diffusion_model.`.

    Without a prefix, the naming is unknown. For example, diffusers' names for FLUX's attention are also ComfyUI's names
    for Qwen-Image's attention.
    """
    stems = None if adapter.foreign is None else adapter.foreign.data.get("stems")
    prefixes = tuple(prefix for prefix in PREFIXES if prefix != "base_model.model.")
    return (
        naming == COMFYUI and isinstance(stems, dict) and not any(str(s).startswith(prefixes) for s in stems.values())
    )


def families_in(base: Checkpoint) -> tuple[str, ...]:
    """List the names of the families that a base may belong to.

    The families are found by the base's class in diffusers. If no family has this class, they are found by the base's
    module names.
    """
    from .underscores import modules_of

    kind = (base.config or {}).get("_class_name")
    if named := tuple(family.name for family in families_of_class(str(kind))):
        return named
    fitting = families_of_model(base.tensors)
    if kind is not None:
        # Keep only families that have all names of the base: a class that adapterkit does not know may share most names
        # with a known family.
        known = set(modules_of(base))
        fitting = [family for family in fitting if all(rooted(path)[1] in family for path in known)]
    return tuple(family.name for family in narrowed(fitting, lambda family: not family.facts.unlikely))


def families_of_class(name: str) -> list[ImageFamily]:
    """List the families whose models have this class name in diffusers."""
    return [family for family in families() if name in family.facts.classes]


def families_of_all(paths: Iterable[str]) -> tuple[str, ...]:
    """List the families that have all of these modules. Ignore modules outside the U-Net or transformer.

    Families that are marked `unlikely` are listed only if no other family has all modules.
    """
    split = map(rooted, paths)
    inside = [rest for root, rest in split if ROOTS.get(root[:-1], "denoiser") in DENOISERS]
    fitting = [family for family in families() if all(path in family for path in inside)]
    return tuple(family.name for family in narrowed(fitting, lambda family: not family.facts.unlikely))


def denoiser_targets(updates: Updates, stay: Collection[str]) -> list[Target]:
    """List the targets inside a U-Net or a transformer, except the targets in `stay`, which must not be renamed."""
    targets = []
    for target in updates:
        root, rest = rooted(target.path)
        inside = ROOTS[root[:-1]] in DENOISERS if root else any(rest in family for family in families())
        if inside and str(target) not in stay:
            targets.append(target)
    return targets


def decide(
    updates: Updates, targets: Collection[Target], naming: str, origin: Origin
) -> tuple[ImageFamily | None, str]:
    """Choose the family whose tables translate the targets to another naming, or explain why none can be chosen.

    Args:
        updates: all updates; their shapes help to find the family.
        targets: the targets in the U-Net or transformer.
        naming: the naming to which the targets will be translated.
        origin: what is known about the naming of the targets.

    Returns:
        (family, ""), or (None, reason). If the names need no translation, the result may be (None, "").
    """
    paths = list(dict.fromkeys(rooted(target.path)[1] for target in targets))
    if origin.unknown:
        # Refuse, because unrelated models share names. In diffusers, BRIA's attention has the same names as FLUX's
        # attention, but no tool uses FLUX's native names for BRIA.
        why = f"the base is a {origin.unknown}, and the names of its modules in {_naming(naming)} are unknown"
        return None, "" if origin.naming == naming else why
    fitting = candidates(updates, targets, origin)
    if not fitting and origin.naming == naming:
        return None, ""
    if not fitting:
        best = max(families(), key=lambda family: sum(path in family for path in paths))
        odd = next(path for path in paths if path not in best)
        return None, f"no family that can be translated to {_naming(naming)} has the module {odd}"
    if len({_outcome(family, paths, naming) for family in fitting}) > 1:
        names = " or ".join(family.title for family in fitting)
        return None, f"the module names fit {names}, and these families translate the names differently"
    if len({family.component == CONTROLNET for family in fitting}) > 1:
        names = " or ".join(family.title for family in fitting)
        return None, f"the module names fit {names}, and nothing shows which of these families is right"
    return fitting[0], ""


def candidates(updates: Updates, targets: Collection[Target], origin: Origin) -> list[ImageFamily]:
    """List the families that have all targets of the denoiser (U-Net or transformer) and fit the other evidence.

    Ignore each piece of evidence that would leave no family.

    Args:
        updates: all updates; their shapes are evidence.
        targets: the targets in the denoiser.
        origin: what is known about the naming of the targets.
    """
    paths = list(dict.fromkeys(module_of(rooted(target.path)[1]) for target in targets))
    fitting = list(families_of_names(frozenset(paths)))
    if any(rooted(target.path)[0] for target in targets):
        # A target's path begins with the prefix of a U-Net or a transformer, so the adapter is not for a ControlNet.
        fitting = narrowed(fitting, lambda family: family.component != CONTROLNET)
    fitting = narrowed(fitting, lambda family: not family.facts.generic)
    extents = _extents(updates, targets)
    inputs = {extent.inputs for extent in extents if isinstance(extent.inputs, int)}
    fitting = narrowed(fitting, lambda family: _sized(family, extents))
    fitting = likely(fitting, paths, inputs, origin)
    if origin.of_format:
        # Names are not enough, so check the shapes: FLUX.2's double blocks have FLUX's names, but other shapes.
        fitting = narrowed(fitting, lambda family: _possible(family, paths, extents))
    fitting = narrowed(fitting, lambda family: family.name in origin.families)
    if FAMILY in origin.metadata:
        # The caller or the file's writer named families in the metadata. Other evidence only selects among these
        # families.
        fitting = narrowed(fitting, lambda family: names_family(family, origin.metadata))
    denoisers = [family for family in fitting if family.component != CONTROLNET]
    stated = any(names_family(family, origin.metadata) for family in denoisers)
    # The evidence below cannot distinguish a ControlNet from the model that it copies.
    # So do not apply this evidence to ControlNets.
    nets = [] if stated or not denoisers else [family for family in fitting if family.component == CONTROLNET]
    left = _narrowed_on(denoisers or fitting, paths, encoder_kinds(updates), origin)
    left = narrowed(left, lambda family: _possible(family, paths, extents))
    left = narrowed(left, lambda family: not inputs.isdisjoint(family.facts.widths))
    return [*narrowed(left, lambda family: complete(family, paths)), *nets]


def _narrowed_on(
    fitting: list[ImageFamily], paths: Collection[str], parts: Mapping[str, str], origin: Origin
) -> list[ImageFamily]:
    """Remove families that contradict the file's naming, the file's metadata or the adapted text encoders."""
    if origin.naming and not origin.bare:
        # Remove a family if some of the paths are not among the family's names in the file's naming. But keep a family
        # that has only diffusers' names, because ComfyUI also reads files with diffusers' names for such a family.
        fitting = narrowed(
            fitting,
            lambda family: (
                family.namings == ("diffusers",) or all(path in family.names(origin.naming) for path in paths)
            ),
        )
    fitting = narrowed(fitting, lambda family: names_family(family, origin.metadata))
    return narrowed(fitting, lambda family: bool(parts) and has_encoders(family, parts))


def module_of(path: str) -> str:
    """Return the path of a target's module, without the name of a parameter.

    A target's path ends in a parameter's name only in BFL's naming: the path of a replaced FLUX norm ends in `.scale`.
    """
    bare = path.removesuffix(".scale")
    return bare if bare != path and families_of(bare, "native") else path


def encoder_kinds(updates: Iterable[Target]) -> dict[str, str]:
    """Map each adapted text encoder, by its name in diffusers, to its kind (`clip`, `t5` or `llm`)."""
    kinds = {}
    for target in updates:
        root, rest = rooted(target.path)
        component = ROOTS.get(root[:-1], "")
        if component.startswith("text_encoder") and (kind := encoder_kind(rest)):
            kinds[component] = kind
    return kinds


def has_encoders(family: ImageFamily, parts: Mapping[str, str]) -> bool:
    """Whether the family's pipelines have text encoders with these names and kinds."""
    known = family.facts.encoders
    return all(name in known and known[name].kind == kind for name, kind in parts.items())


def check_stated_family(paths: Sequence[str], base: Checkpoint, metadata: Mapping[str, str]) -> None:
    """Check that the base can belong to the family that is named in a file's metadata.

    Names and shapes do not always reveal a wrong base: half of the modules in a Qwen-Image adapter also exist in FLUX,
    with weights of equal shapes.

    Args:
        paths: the paths of the adapter's modules in the denoiser, without the pipeline's component.
        base: the base.
        metadata: the file's metadata.

    Raises:
        UsageError: the metadata names a family that has all of these modules, and the base belongs to another family.
    """
    known = [family for family in families() if all(path in family for path in paths)]
    stated = [family for family in known if names_family(family, metadata)]
    if not stated or not paths:
        return
    in_base = families_in(base)
    there = [family for family in families() if family.name in in_base]
    meanings = {_outcome(family, paths, "native") for family in there}
    # FLUX and Chroma have the same names for the same modules, so accept an adapter of FLUX for Chroma, and vice versa.
    if there and not any(family in there or _outcome(family, paths, "native") in meanings for family in stated):
        why = f"the file's metadata names {stated[0].title}, but the base is {there[0].title}"
        name = there[0].name
        cure = (
            "Pass the base that the adapter was trained on. If the metadata is wrong, first convert the file with "
            f"--family {name} (family={name!r})"
        )
        raise UsageError(why, where=paths[0], cure=cure)


def narrowed(families: list[ImageFamily], fits: Callable[[ImageFamily], object]) -> list[ImageFamily]:
    """Return the families that fit the evidence. If none fits, ignore the evidence and return all."""
    return [family for family in families if fits(family)] or families


def likely(
    fitting: list[ImageFamily], paths: Collection[str], inputs: Collection[int], origin: Origin
) -> list[ImageFamily]:
    """Remove the families that are marked `unlikely`, unless there is evidence for them.

    The evidence is the metadata, the base, or the weights' input sizes together with the block numbers. If no family
    would be left, return all.

    Args:
        fitting: the families that have all module names in `paths`.
        paths: the adapter's module names, without the pipeline's component.
        inputs: the input sizes of the adapted weights.
        origin: the file's metadata, and the possible families that the base, the format or the config shows.
    """
    sizes = set(inputs)

    def spoken_for(family: ImageFamily) -> bool:
        if family.name in origin.families or names_family(family, origin.metadata):
            return True
        if set(family.facts.widths).isdisjoint(sizes) or not sizes.isdisjoint(family.facts.no_inputs):
            return False
        if family.component == CONTROLNET:
            return _begins(family, paths)
        if family.component == "unet":
            # Most adapters of Stable Diffusion's U-Nets change all kinds of blocks, and the names in these adapters
            # also fit the unlikely U-Nets. So an adapter with all kinds of blocks is probably for Stable Diffusion.
            # Accept an unlikely U-Net only if the adapter lacks at least one kind of block.
            return _begins(family, paths) and not all(first in _numbers(paths) for first in family.facts.blocks)
        rivals = [each for each in fitting if not each.facts.unlikely and not sizes.isdisjoint(each.facts.widths)]
        if not rivals:
            return True
        both = {first for each in rivals for first in each.facts.blocks.keys() & family.facts.blocks.keys()}
        if not both <= _numbers(paths).keys():
            # If the adapter lacks a kind of block that this family and a rival have, the block numbers prove nothing:
            # FLUX and Bria FIBO have the same number of single blocks.
            return False
        # Trainers adapt all blocks by default. So accept this family only if the adapted blocks are consecutive and
        # begin at block 0. If the adapted blocks end at a rival family's last block, this block must also be the last
        # block of this family. Other selections of blocks prove nothing: if only block 7 is adapted, it may be one of
        # FLUX's many blocks, or Bria's last block.
        return in_a_row(paths) and (complete(family, paths) or not any(complete(each, paths) for each in rivals))

    return narrowed(fitting, lambda family: not family.facts.unlikely or spoken_for(family))


def may_be_controlnet(paths: Collection[str], inputs: Collection[int], metadata: Mapping[str, str]) -> bool:
    """Whether modules whose names have no component prefix, such as `transformer.`, may belong to a ControlNet.

    Args:
        paths: the names of the modules.
        inputs: the input sizes of the adapted weights.
        metadata: the file's metadata, which may name a family.
    """
    fitting = [family for family in families() if all(path in family for path in paths)]
    left = likely(fitting, paths, inputs, Origin(metadata=metadata))
    named_families = [family for family in left if names_family(family, metadata)] or left
    return any(family.component == CONTROLNET for family in named_families)


def _begins(family: ImageFamily, paths: Iterable[str]) -> bool:
    """Whether the numbers of each kind of block begin at 0 or 1 and have no gaps, and the family has these blocks.

    Return False if the names have fewer than two block numbers.
    """
    numbers = _numbers(paths)
    if not numbers or sum(map(len, numbers.values())) < 2:
        return False
    # Numbers may also begin at 1, because the first block of SDXL's U-Net has no attention.
    rows = all(min(indices) < 2 and len(indices) == max(indices) - min(indices) + 1 for indices in numbers.values())
    return rows and all(max(indices) < family.facts.blocks.get(first, 0) for first, indices in numbers.items())


def in_a_row(paths: Iterable[str]) -> bool:
    """Whether names have block numbers, and the numbers of each kind of block are consecutive and begin at 0."""
    numbers = _numbers(paths).values()
    return bool(numbers) and all(len(indices) == max(indices) + 1 for indices in numbers)


def _numbers(paths: Iterable[str]) -> dict[str, set[int]]:
    """Map the first part of each name, such as `double_blocks`, to the block numbers that follow this part."""
    indices: dict[str, set[int]] = {}
    for path in paths:
        first, _, rest = path.partition(".")
        number = decimal_number(rest.partition(".")[0])
        if number is not None:
            indices.setdefault(first, set()).add(number)
    return indices


def _naming(naming: str) -> str:
    words = {"native": "the model authors' naming", "comfyui": "ComfyUI's naming", "diffusers": "diffusers' naming"}
    return words.get(naming, "the naming of this format")


@dataclass(frozen=True, slots=True)
class _Extent:
    """The sizes of one update's weight.

    Attributes:
        path: the module, without the pipeline's component.
        outputs: the weight's number of outputs; not an int if the update does not show this number.
        inputs: the weight's number of inputs; not an int if the update does not show this number.
        whole: whether the update changes the whole weight, not only some rows.
    """

    path: str
    outputs: object
    inputs: object
    whole: bool


def _extents(updates: Updates, targets: Iterable[Target]) -> list[_Extent]:
    extents = []
    for target in targets:
        path = rooted(target.path)[1]
        for update in updates[target]:
            dims = update.dims(target.stacked)
            extents.append(_Extent(path, dims.get("out"), dims.get("in", dims.get("columns")), target.rows is None))
    return extents


def _possible(family: ImageFamily, paths: Iterable[str], extents: Iterable[_Extent]) -> bool:
    """Whether the family has all blocks in `paths`, and weights with the output-to-input ratios in `extents`."""
    for path in paths:
        first, _, rest = path.partition(".")
        number = decimal_number(rest.partition(".")[0])
        if number is not None and number >= family.facts.blocks.get(first, 1 << 30):
            return False
    return all(_shaped(family, extent) for extent in extents) if family.facts.ratios else True


def names_family(family: ImageFamily, metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata names this family.

    If the metadata has the key `FAMILY`, its value lists the families. Otherwise, only the longest family name in the
    metadata counts.
    """
    if FAMILY in metadata:
        return family.name in metadata[FAMILY].split()
    text = " ".join(metadata.get(key, "") for key in _TELLING).lower()
    text = "".join(letter for letter in text if letter.isalnum() or letter == " ")
    by_word = {word: each for each in families() for word in each.facts.words if word in text}
    return bool(by_word) and by_word[max(by_word, key=len)] is family


_TELLING = (
    "modelspec.architecture", "ss_base_model_version", "ss_network_module", "modelspec.implementation",
    "ss_sd_model_name",
)  # fmt: skip
"""Metadata keys whose values name the trained model."""


def complete(family: ImageFamily, paths: Iterable[str]) -> bool:
    """Whether, for each kind of block, the block with the highest number in the names is the family's last block.

    The last block is that of the family's largest published model. Kinds of blocks that the family lacks are ignored.
    """
    last = {first: max(numbers) for first, numbers in _numbers(paths).items()}
    counted = {first: number for first, number in last.items() if first in family.facts.blocks}
    return bool(counted) and all(number + 1 == family.facts.blocks[first] for first, number in counted.items())


def _sized(family: ImageFamily, extents: Iterable[_Extent]) -> bool:
    """Whether the family's published models have weights of these sizes.

    If the family's file does not list the output sizes for an input size, all output sizes are accepted.
    """
    # Test each size once, because hundreds of modules share a few sizes.
    for outputs, inputs in {(extent.outputs, extent.inputs) for extent in extents if extent.whole}:
        if inputs in family.facts.no_inputs:
            return False
        if isinstance(outputs, int) and outputs not in family.facts.outputs.get(str(inputs), [outputs]):
            return False
    return True


def _shaped(family: ImageFamily, extent: _Extent) -> bool:
    ratios, outputs, inputs = family.ratios(extent.path), extent.outputs, extent.inputs
    if not ratios or not extent.whole or not isinstance(outputs, int) or not isinstance(inputs, int):
        return True
    if len(ratios) > 1 and outputs not in family.facts.widths:
        return True
    return any(abs(outputs - ratio * inputs) <= 0.5 for ratio in ratios)


def _outcome(family: ImageFamily, paths: Collection[str], naming: str) -> tuple[object, ...]:
    """Use the family's tables to translate module names to another naming, so that callers can compare families."""
    wanted = family.wanted(naming)
    source = family.naming_of(paths, wanted)
    return tuple(
        path if source == wanted else family.moves(path, source or family.naming_of([path], wanted), wanted)
        for path in paths
    )
