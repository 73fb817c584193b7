"""Find the modules that flattened names stand for: kohya and LyCORIS replace the dots of names with underscores.

Each flattened name is compared with the flattened module names of the base. If the base lacks the name, or if there is
no base, the name is compared with the tables of known families. A name that fits no module or several modules is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from ...errors import USE_ITS_BASE, TargetNotFound, nearest
from ...naming.image import (
    ROOTS,
    ImageFamily,
    Piece,
    beside,
    component_of,
    encoders,
    families,
    families_of,
    flatten,
    in_other_words,
    is_xl,
    rooted,
)
from .deciding import Origin, complete, families_in, likely, names_family, narrowed
from .file import ImageModule, inputs_of

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint


STEM = re.compile(
    r"(lora_unet|oft_unet|lora_transformer|Hunyuan_video_I2V_lora|lora_te[1234]?|lora_prior_(?:unet|te)|lycoris)_(.+)"
)

_PARTS = {
    "lora_unet": ("unet", "transformer"), "oft_unet": ("unet", "transformer"), "lora_transformer": ("transformer",),
    "Hunyuan_video_I2V_lora": ("transformer",),
    "lora_prior_unet": ("unet",), "lora_prior_te": ("text_encoder",),
    "lora_te": ("text_encoder",), "lora_te1": ("text_encoder",), "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_2", "text_encoder_3"), "lora_te4": ("text_encoder_4",),
    "lycoris": ("unet", "transformer", "text_encoder"),
}  # fmt: skip
"""A map from each prefix of flattened names to the components of the pipeline that the prefix may mean."""

_DENOISER = ("lora_unet", "oft_unet", "lora_transformer", "Hunyuan_video_I2V_lora", "lora_prior_unet", "lycoris")
"""The prefixes that flattened names of modules in the U-Net or the transformer may have."""

_FAMILIES = {"Hunyuan_video_I2V_lora": "hunyuan_video"}
"""A map from a prefix to the only family whose trainer writes this prefix."""

_ARCHITECTURES = {"flux": "text_encoder_2", "sd3": "text_encoder_3", "stable-diffusion-3": "text_encoder_3"}
"""A map from a model's name in a file's metadata to the component that is the model's T5 text encoder."""


def resolve(modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None) -> dict[str, str]:
    """Return a map from each module's flattened name (its stem) to the module's dotted path.

    Args:
        modules: the modules of the file, by stem.
        metadata: the file's metadata.
        base: the base, whose module names are tried first; if None, only the names of known families are tried.

    Raises:
        TargetNotFound: a stem fits several modules, which the error names. Or a stem fits no module; the error then
            suggests the most similar name, if there is one.
    """
    known = list(modules)
    walked = None if base is None else _walked(base)
    words = {stem: _words(stem) for stem in known}
    third = _third(words.values(), metadata)
    resolved: dict[str, str] = {}
    for stem, (tag, flat) in words.items() if walked is not None else ():
        here = list(dict.fromkeys(path for part, path in (walked or {}).get(flat, ()) if part in ("", *_PARTS[tag])))
        if len(here) > 1:
            raise TargetNotFound(
                f"the name fits several modules: {', '.join(here)}", where=stem, cure="Rename the key in the file"
            )
        if here:
            resolved[stem] = here[0]
    rest = {stem: words[stem] for stem in known if stem not in resolved}
    of_base = () if base is None else families_in(base)
    sizes = inputs_of(module for stem, module in modules.items() if words[stem][0] in _DENOISER)
    resolved |= _together(rest, words, metadata, None if base is None else of_base, sizes)
    return {stem: resolved.get(stem) or _resolve(stem, *words[stem], third, walked) for stem in known}


def _together(
    rest: Mapping[str, tuple[str, str]], words: Mapping[str, tuple[str, str]], metadata: Mapping[str, str],
    of_base: Collection[str] | None, sizes: Collection[int],
) -> dict[str, str]:  # fmt: skip
    """Return the dotted path of each stem in the denoiser, if one family has all these stems; otherwise an empty dict.

    Args:
        rest: the entries of `words` whose stems are not resolved yet.
        words: a map from every stem to its prefix and the flattened name after the prefix. The stems of text encoders
            help to choose the family.
        metadata: the file's metadata.
        of_base: the possible families of the base; None without a base.
        sizes: the input sizes of the denoiser's adapted weights.

    Raises:
        TargetNotFound: several families have all stems, but a stem means different modules in these families.
    """
    inside = {stem: flat for stem, (tag, flat) in rest.items() if tag in _DENOISER and not _beside(flat)}
    if not inside:
        return {}
    component = {part for stem in inside for part in _PARTS[words[stem][0]]}
    readings = {family: _reading(family, inside) for family in families() if family.component in component}
    fitting = [family for family, reading in readings.items() if reading]
    if not fitting:
        return {}
    fitting = narrowed(fitting, lambda family: not family.facts.generic)
    fitting = likely(fitting, (), (), Origin(families=tuple(of_base or ()), metadata=metadata))
    tags = {words[stem][0] for stem in inside}
    tag_families = {_FAMILIES.get(tag) for tag in tags}
    fitting = narrowed(
        fitting, lambda family: family.name in tag_families or not tags.isdisjoint(family.facts.prefixes.values())
    )
    fitting = narrowed(fitting, lambda family: family.name in (of_base or ()))
    if any(words[stem][0] == "oft_unet" for stem in inside):
        fitting = narrowed(fitting, lambda family: family.facts.sd_scripts)
    fitting = narrowed(fitting, lambda family: names_family(family, metadata))
    kinds = {kind for tag, flat in words.values() if tag not in _DENOISER and (kind := _kind(flat))}
    fitting = narrowed(
        fitting, lambda family: bool(kinds) and kinds <= {each.kind for each in family.facts.encoders.values()}
    )
    # Compare input sizes. FLUX.2 and FLUX have the same module names, but different input sizes. HunyuanVideo 1.5 and
    # HunyuanVideo also have the same module names, but different input sizes.
    fitting = narrowed(fitting, lambda family: not set(family.facts.widths).isdisjoint(sizes))
    fitting = narrowed(fitting, lambda family: complete(family, [rooted(p)[1] for p in readings[family].values()]))
    first = readings[fitting[0]]
    # If there is a base, `placed` later translates the targets to the base's names. So the choice of family does not
    # matter if diffusers has the same names for the modules in all of these families.
    same = of_base is not None and len({_in_diffusers(family, readings[family]) for family in fitting}) == 1
    for family in () if same else fitting[1:]:
        odd = next((stem for stem, path in readings[family].items() if path != first[stem]), None)
        if odd is not None:
            why = f"the name fits {first[odd]} of {fitting[0].title}, and {readings[family][odd]} of {family.title}"
            raise TargetNotFound(why, where=odd, cure=_DECIDE)
    return first


_DECIDE = "Name the family with --family (family=), or pass --base BASE (base=): its module names then decide"


def _kind(flat: str) -> str:
    """Return the kind of text encoder that has a module with this flattened name; empty if no known kind has it."""
    return next((kind for kind, names in encoders().items() if names.unflattened(flat)), "")


def _in_diffusers(family: ImageFamily, reading: Mapping[str, str]) -> tuple[tuple[Piece, ...], ...]:
    paths = [rooted(path)[1] for path in reading.values()]
    naming = family.naming_of(paths)
    return tuple(family.moves(path, naming, "diffusers") for path in paths)


def _reading(family: ImageFamily, inside: Mapping[str, str]) -> dict[str, str]:
    """Return the path of each stem, in the first of the family's namings that has exactly one path for every stem.

    Return an empty map if there is no such naming.
    """
    if not all(family.may_have(flat) for flat in inside.values()):
        return {}
    for naming in dict.fromkeys((family.facts.kohya, *family.namings)):
        readings = {stem: family.unflattened(flat, naming) for stem, flat in inside.items()}
        if all(len(paths) == 1 for paths in readings.values()):
            return {stem: f"{family.component}.{paths[0]}" for stem, paths in readings.items()}
    return {}


def _words(stem: str) -> tuple[str, str]:
    match = STEM.fullmatch(stem)
    assert match is not None
    # Strip extra underscores: the trainer of Wan's Fun models writes `lora_unet__blocks_0`, and an old trainer for FLUX
    # writes `lora_unet_..._to_q_`.
    return match[1], match[2].strip("_")


def _resolve(stem: str, tag: str, flat: str, third: str, walked: Mapping[str, list[tuple[str, str]]] | None) -> str:
    readings = list(dict.fromkeys(_by_tables(tag, flat, third)))
    if len(readings) == 1:
        return readings[0]
    if readings:
        raise TargetNotFound(f"the name fits several modules: {', '.join(readings)}", where=stem, cure=_DECIDE)
    if tag == "lora_te3" and encoders()["t5"].unflattened(flat):
        why = "lora_te3 is the second text encoder (FLUX's T5) or the third (SD 3's), and the file does not show which"
        raise TargetNotFound(why, where=stem, cure=_DECIDE)
    raise TargetNotFound("no known model has a module with this name", where=stem, cure=_near(flat, walked))


def _by_tables(tag: str, flat: str, third: str) -> Iterator[str]:
    if tag in _DENOISER:
        yield from _beside(flat)
        for family in families():
            if family.component in _PARTS[tag]:
                for naming in family.namings:
                    yield from (f"{family.component}.{name}" for name in family.unflattened(flat, naming))
    if tag in ("lora_te", "lora_te1", "lora_te2", "lora_te4", "lora_prior_te", "lycoris"):
        part = _PARTS[tag][-1]
        # LyCORIS writes its prefix also for adapters of plain LLMs. So do not match this prefix with LLM text encoders.
        kinds = ("clip", "t5") if tag == "lycoris" else ("clip", "t5", "llm")
        yield from (f"{part}.{name}" for kind in kinds for name in encoders()[kind].unflattened(flat))
    if tag == "lora_te3" and third:
        yield from (f"{third}.{name}" for name in encoders()["t5"].unflattened(flat))


def _beside(flat: str) -> list[str]:
    """Return the possible paths of a module that diffusers stores in a separate component; empty for other modules.

    The model's authors store such a module inside the denoiser. Example: Anima's `llm_adapter`, which diffusers stores
    as `text_conditioner`.
    """
    for family in families():
        for part in family.facts.modules:
            start = f"{flatten(rooted(family.facts.beside[part])[1])}_"
            if flat.startswith(start):
                return [f"{part}.{name}" for name in family.modules(part).unflattened(flat.removeprefix(start))]
    return []


def _third(words: Iterable[tuple[str, str]], metadata: Mapping[str, str]) -> str:
    """Return the component that `lora_te3` means: FLUX's second or SD 3's third text encoder; empty if unknown."""
    version = metadata.get("ss_base_model_version", "") + " " + metadata.get("modelspec.architecture", "")
    stated = {part for name, part in _ARCHITECTURES.items() if name in version}
    inside = [flat for tag, flat in words if tag in _DENOISER]
    for family in families():
        part = next((part for part, each in family.facts.encoders.items() if each.kind == "t5"), "")
        if part in _PARTS["lora_te3"] and (
            names_family(family, metadata) or (inside and not stated and _has(family, inside))
        ):
            stated.add(part)
    return next(iter(stated)) if len(stated) == 1 else ""


def _has(family: ImageFamily, flats: Iterable[str]) -> bool:
    """Whether one naming of the family has all of these flattened names."""
    return any(all(family.unflattened(flat, naming) for flat in flats) for naming in family.namings)


def _walked(base: Checkpoint) -> dict[str, list[tuple[str, str]]]:
    """Map flattened names to (component, dotted path) pairs, for all modules of the base.

    A module whose path has a prefix gets two flattened names: one with the prefix, and one without it.
    """
    places_by_name: dict[str, list[tuple[str, str]]] = {}
    for path in modules_of(base):
        root, rest = rooted(path)
        part = ROOTS.get(root[:-1], "")
        part = {"denoiser": "unet", "t5": "text_encoder_3"}.get(part, part)
        places = [(part, path), ("transformer", path)] if root[:-1].endswith("diffusion_model") else [(part, path)]
        places_by_name.setdefault(flatten(rest), []).extend(places)
        if root:
            places_by_name.setdefault(flatten(path), []).extend(places)
    return places_by_name


def modules_of(base: Checkpoint) -> list[str]:
    """List the dotted paths of the base's modules that have tensors."""
    names = (name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in base.tensors)
    return [name for name in dict.fromkeys(names) if name]


def _near(flat: str, walked: Mapping[str, object] | None) -> str:
    if walked is not None:
        return nearest(flat, walked) or USE_ITS_BASE
    known = {flatten(p) for family in families() for naming in family.namings for p in family.names(naming).patterns}
    shape = re.sub(r"(?<![^_])\d+(?![^_])", "#", flat)
    near = nearest(shape, {name for name in known if name[:4] == shape[:4]})
    return f"{near}{'. ' if near else ''}Pass --base BASE (base=): its module names are then used"


class TargetPaths:
    """The paths of all targets in a file.

    The facts that names depend on are computed once. A file may have thousands of targets, and computing them for each
    target would take quadratic time.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = frozenset(paths)

    @cached_property
    def prefixes(self) -> Mapping[str, str]:
        """The result of `prefixes_of`."""
        return prefixes_of(self.paths)

    @cached_property
    def has_several_encoders(self) -> bool:
        """Whether a path shows that the model has more than one text encoder."""
        return any(map(_has_several, self.paths))

    @cached_property
    def components(self) -> frozenset[str | None]:
        """The components to which the targets belong."""
        return frozenset(map(component_of, self.paths))


def stem_of(path: str, paths: TargetPaths, *, tag: str = "lora_unet", lycoris: bool = False) -> str | None:
    """Return a target's flattened name (stem) in kohya's or LyCORIS's format; None if the format has no such name.

    Args:
        path: the target's path.
        paths: the paths of all targets in the file.
        tag: the prefix for modules of the U-Net or the transformer.
        lycoris: whether to use the prefix `lycoris` for a module outside image models. If false, such a module has no
            stem.
    """
    component, (_, rest) = component_of(path), rooted(path)
    if component is not None and component in paths.prefixes and tag == "lora_unet":
        return f"{paths.prefixes[component]}_{flatten(rest)}"
    if component in ("unet", "transformer"):
        return f"{tag}_{flatten(rest)}"
    there = in_other_words(f"{component}.{rest}", {ours: theirs for theirs, ours in beside().items()})
    if there.startswith("diffusion_model."):
        return f"{tag}_{flatten(rooted(there)[1])}"
    if component is not None and component.startswith("text_encoder"):
        return f"{_encoder(component, rest, paths)}_{flatten(rest)}"
    return f"lycoris_{flatten(path)}" if lycoris and component is None else None


def prefixes_of(paths: Iterable[str]) -> Mapping[str, str]:
    """Return a map from components to prefixes in kohya's keys, if the family of the paths has unusual prefixes.

    Otherwise, the map is empty.
    """
    unusual = [family for family in families() if family.facts.prefixes]
    inside = [rest for path in paths if component_of(path) == "unet" for rest in (rooted(path)[1],)]
    return next((f.facts.prefixes for f in unusual if inside and all(rest in f for rest in inside)), {})


def _encoder(component: str, rest: str, paths: TargetPaths) -> str:
    """Return kohya's prefix for a text encoder. The prefix ends with a number if the model has several encoders."""
    if rest in encoders()["t5"] and component != "text_encoder":
        return "lora_te3"
    if component in ("text_encoder_2", "text_encoder_3", "text_encoder_4"):
        return f"lora_te{component[-1]}"
    if rest in encoders()["llm"]:
        others = {"text_encoder_2", "text_encoder_3", "text_encoder_4"}
        return "lora_te1" if others & paths.components else "lora_te"
    return "lora_te1" if paths.has_several_encoders else "lora_te"


@lru_cache(maxsize=1 << 16)
def _has_several(path: str) -> bool:
    """Whether the path shows that the model has more than one text encoder."""
    rest = rooted(path)[1]
    component = component_of(path)
    if component in ("text_encoder_2", "text_encoder_3", "transformer"):
        return True
    return component == "unet" and is_xl([rest]) and bool(families_of(rest, "native") or families_of(rest, "diffusers"))
