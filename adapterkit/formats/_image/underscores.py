"""Resolve module names with underscores for dots, as kohya and LyCORIS write them after the part of a pipeline.

Names are resolved against the modules of a base, flattened the same way; without a base, against the tables of
families. A name that fits no module, or several, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from ...errors import TargetNotFound, nearest
from ...naming.image import (
    ROOTS,
    ImageFamily,
    beside,
    component_of,
    encoders,
    families,
    families_of,
    in_other_words,
    is_xl,
    rooted,
)
from ...naming.patterns import flatten
from ...naming.pieces import Piece
from .deciding import Origin, complete, families_in, likely, narrowed, said
from .file import inputs_of

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint
    from .file import ImageModule

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
"""Prefix of a stem -> the parts of a pipeline that it may mean."""

_DENOISER = ("lora_unet", "oft_unet", "lora_transformer", "Hunyuan_video_I2V_lora", "lora_prior_unet", "lycoris")
"""Prefixes of stems of the U-Net or the transformer."""

_FAMILIES = {"Hunyuan_video_I2V_lora": "hunyuan_video"}
"""Prefix that only one family's own trainer writes -> the family."""

_ARCHITECTURES = {"flux": "text_encoder_2", "sd3": "text_encoder_3", "stable-diffusion-3": "text_encoder_3"}
"""Word for the model in a file's metadata -> the part that is its T5."""


def resolve(modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None) -> dict[str, str]:
    """Return stem -> dotted path.

    Args:
        modules: stem -> its tensors.
        metadata: the file's metadata.
        base: the base whose names decide, if there is one.

    Raises:
        TargetNotFound: a stem fits no module, or several; the error names the nearest.
    """
    known = list(modules)
    walked = None if base is None else _walked(base)
    words = {stem: _words(stem) for stem in known}
    third = _third(words.values(), metadata)
    found: dict[str, str] = {}
    for stem, (tag, flat) in words.items() if walked is not None else ():
        if here := _here(stem, tag, flat, walked or {}):
            found[stem] = here
    rest = {stem: words[stem] for stem in known if stem not in found}
    of_base = () if base is None else families_in(base)
    sizes = inputs_of(module for stem, module in modules.items() if words[stem][0] in _DENOISER)
    found |= _together(rest, words, metadata, None if base is None else of_base, sizes)
    return {stem: found.get(stem) or _resolve(stem, *words[stem], third, walked) for stem in known}


def _together(
    rest: Mapping[str, tuple[str, str]], words: Mapping[str, tuple[str, str]], metadata: Mapping[str, str],
    of_base: Collection[str] | None, sizes: Collection[int],
) -> dict[str, str]:  # fmt: skip
    """Return stem -> path for the denoiser's stems, if one family has all of them; empty if none has.

    Args:
        rest: the stems that are not resolved yet.
        words: all stems; those of text encoders tell families apart.
        metadata: the file's metadata.
        of_base: the families of the base, if there is one.
        sizes: inputs of the adapted weights of the denoiser.

    Raises:
        TargetNotFound: several families have them under different names, and nothing decides between them.
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
    own = {_FAMILIES.get(tag) for tag in tags}
    fitting = narrowed(
        fitting, lambda family: family.name in own or not tags.isdisjoint(family.facts.prefixes.values())
    )
    fitting = narrowed(fitting, lambda family: family.name in (of_base or ()))
    if any(words[stem][0] == "oft_unet" for stem in inside):
        fitting = narrowed(fitting, lambda family: family.facts.sd_scripts)
    fitting = narrowed(fitting, lambda family: said(family, metadata))
    kinds = {kind for tag, flat in words.values() if tag not in _DENOISER and (kind := _kind(flat))}
    fitting = narrowed(fitting, lambda family: bool(kinds) and kinds <= _kinds(family))
    # FLUX.2 and HunyuanVideo 1.5 have names of FLUX and of HunyuanVideo, and other widths.
    fitting = narrowed(fitting, lambda family: not set(family.facts.widths).isdisjoint(sizes))
    fitting = narrowed(fitting, lambda family: complete(family, [rooted(p)[1] for p in readings[family].values()]))
    first = readings[fitting[0]]
    # With a base, its names are used instead of these, so only their names in diffusers matter.
    same = of_base is not None and len({_in_diffusers(family, readings[family]) for family in fitting}) == 1
    for family in () if same else fitting[1:]:
        odd = next((stem for stem, path in readings[family].items() if path != first[stem]), None)
        if odd is not None:
            why = f"it can be {first[odd]} of {fitting[0].title}, or {readings[family][odd]} of {family.title}"
            raise TargetNotFound(why, where=odd, cure=_DECIDE)
    return first


_DECIDE = "Name the family by --family (family=), or give the base by --base (base=): its names decide"


def _kind(flat: str) -> str:
    """Return `clip`, `t5` or `llm`, the kind of encoder that a flattened name belongs to."""
    return next((kind for kind, names in encoders().items() if names.unflattened(flat)), "")


def _kinds(family: ImageFamily) -> set[str]:
    return {encoder.kind for encoder in family.facts.encoders.values()}


def _in_diffusers(family: ImageFamily, reading: Mapping[str, str]) -> tuple[tuple[Piece, ...], ...]:
    paths = [rooted(path)[1] for path in reading.values()]
    naming = family.naming_of(paths)
    return tuple(family.moves(path, naming, "diffusers") for path in paths)


def _reading(family: ImageFamily, inside: Mapping[str, str]) -> dict[str, str]:
    """Return stem -> path in the one naming of a family that has all stems; empty if no naming has."""
    if not all(family.may_have(flat) for flat in inside.values()):
        return {}
    for naming in dict.fromkeys((family.facts.kohya, *family.namings)):
        found = {stem: family.unflattened(flat, naming) for stem, flat in inside.items()}
        if all(len(paths) == 1 for paths in found.values()):
            return {stem: f"{family.component}.{paths[0]}" for stem, paths in found.items()}
    return {}


def _words(stem: str) -> tuple[str, str]:
    found = STEM.fullmatch(stem)
    assert found is not None
    # The trainer of Wan's Fun models writes lora_unet__blocks_0, an older one of FLUX lora_unet_..._to_q_.
    return found[1], found[2].strip("_")


def _here(stem: str, tag: str, flat: str, walked: Mapping[str, list[tuple[str, str]]]) -> str:
    """Find the one module of the base that a stem means; empty if there is none."""
    here = list(dict.fromkeys(path for part, path in walked.get(flat, ()) if part in ("", *_PARTS[tag])))
    if len(here) > 1:
        raise TargetNotFound(f"it can be any of {', '.join(here)}", where=stem, cure="Rename it in the file")
    return here[0] if here else ""


def _resolve(stem: str, tag: str, flat: str, third: str, walked: Mapping[str, list[tuple[str, str]]] | None) -> str:
    found = list(dict.fromkeys(_by_tables(tag, flat, third)))
    if len(found) == 1:
        return found[0]
    if found:
        raise TargetNotFound(f"it can be any of {', '.join(found)}", where=stem, cure=_DECIDE)
    if tag == "lora_te3" and encoders()["t5"].unflattened(flat):
        why = "nothing in the file tells which text encoder lora_te3 is: FLUX's T5 is its second, SD 3's its third"
        raise TargetNotFound(why, where=stem, cure=_DECIDE)
    raise TargetNotFound("no module of a known model has this name", where=stem, cure=_near(flat, walked))


def _by_tables(tag: str, flat: str, third: str) -> Iterator[str]:
    if tag in _DENOISER:
        yield from _beside(flat)
        for family in families():
            if family.component in _PARTS[tag]:
                for naming in family.namings:
                    yield from (f"{family.component}.{name}" for name in family.unflattened(flat, naming))
    if tag in ("lora_te", "lora_te1", "lora_te2", "lora_te4", "lora_prior_te", "lycoris"):
        part = _PARTS[tag][-1]
        # LyCORIS also trains language models, whose names are not those of a text encoder.
        kinds = ("clip", "t5") if tag == "lycoris" else ("clip", "t5", "llm")
        yield from (f"{part}.{name}" for kind in kinds for name in encoders()[kind].unflattened(flat))
    if tag == "lora_te3" and third:
        yield from (f"{third}.{name}" for name in encoders()["t5"].unflattened(flat))


def _beside(flat: str) -> list[str]:
    """The modules of another part of a pipeline that `flat` is, where it lies inside the authors' denoiser.

    Anima's adapter of its text encoder lies there.
    """
    for family in families():
        for part in family.facts.modules:
            start = f"{flatten(rooted(family.facts.beside[part])[1])}_"
            if flat.startswith(start):
                return [f"{part}.{name}" for name in family.modules(part).unflattened(flat.removeprefix(start))]
    return []


def _third(words: Iterable[tuple[str, str]], metadata: Mapping[str, str]) -> str:
    """Return the part that lora_te3 means: FLUX's T5 is its second encoder, SD 3's its third; empty if not known."""
    version = metadata.get("ss_base_model_version", "") + " " + metadata.get("modelspec.architecture", "")
    told = {part for name, part in _ARCHITECTURES.items() if name in version}
    inside = [flat for tag, flat in words if tag in _DENOISER]
    for family in families():
        part = next((part for part, each in family.facts.encoders.items() if each.kind == "t5"), "")
        if part in _PARTS["lora_te3"] and (said(family, metadata) or (inside and not told and _has(family, inside))):
            told.add(part)
    return next(iter(told)) if len(told) == 1 else ""


def _has(family: ImageFamily, flats: Iterable[str]) -> bool:
    """Whether one of a family's namings has all of these names."""
    return any(all(family.unflattened(flat, naming) for flat in flats) for naming in family.namings)


def _walked(base: Checkpoint) -> dict[str, list[tuple[str, str]]]:
    """Return flattened name of every module of the base, with and without its prefix -> (part, its path)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in modules_of(base):
        root, rest = rooted(path)
        part = ROOTS.get(root[:-1], "")
        part = {"denoiser": "unet", "t5": "text_encoder_3"}.get(part, part)
        places = [(part, path), ("transformer", path)] if root[:-1].endswith("diffusion_model") else [(part, path)]
        found.setdefault(flatten(rest), []).extend(places)
        if root:
            found.setdefault(flatten(path), []).extend(places)
    return found


def modules_of(base: Checkpoint) -> list[str]:
    """List the dotted paths of the modules that a base holds tensors of."""
    names = (name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in base.tensors)
    return [name for name in dict.fromkeys(names) if name]


def _near(flat: str, walked: Mapping[str, object] | None) -> str:
    if walked is not None:
        return nearest(flat, walked) or "Is this the base that the adapter was trained on?"
    known = {flatten(p) for family in families() for naming in family.namings for p in family.names(naming).patterns}
    shape = re.sub(r"(?<![^_])\d+(?![^_])", "#", flat)
    near = nearest(shape, {name for name in known if name[:4] == shape[:4]})
    return f"{near}{'. ' if near else ''}Pass base=/--base, whose names are walked"


def stem_of(path: str, paths: Iterable[str], *, tag: str = "lora_unet", lycoris: bool = False) -> str | None:
    """Return the stem of a path among others of one file; None if it is in no part of an image model.

    Args:
        path: the target's path.
        paths: the paths of all targets.
        tag: the prefix of stems of the denoiser.
        lycoris: also give stems to modules of other models.
    """
    component, (_, rest) = component_of(path), rooted(path)
    own = prefixes_of(paths)
    if component is not None and component in own and tag == "lora_unet":
        return f"{own[component]}_{flatten(rest)}"
    if component in ("unet", "transformer"):
        return f"{tag}_{flatten(rest)}"
    there = in_other_words(f"{component}.{rest}", {ours: theirs for theirs, ours in beside().items()})
    if there.startswith("diffusion_model."):
        return f"{tag}_{flatten(rooted(there)[1])}"
    if component is not None and component.startswith("text_encoder"):
        return f"{_encoder(component, rest, paths)}_{flatten(rest)}"
    return f"lycoris_{flatten(path)}" if lycoris and component is None else None


def prefixes_of(paths: Iterable[str]) -> Mapping[str, str]:
    """Part of a pipeline -> what its keys begin with, where the family of one of the paths has a prefix of its own."""
    unusual = [family for family in families() if family.facts.prefixes]
    inside = [rest for path in paths if component_of(path) == "unet" for rest in (rooted(path)[1],)]
    return next((f.facts.prefixes for f in unusual if inside and all(rest in f for rest in inside)), {})


def _encoder(component: str, rest: str, paths: Iterable[str]) -> str:
    """Return kohya's name of a text encoder, with a number if there is more than one."""
    if rest in encoders()["t5"] and component != "text_encoder":
        return "lora_te3"
    if component in ("text_encoder_2", "text_encoder_3", "text_encoder_4"):
        return f"lora_te{component[-1]}"
    if rest in encoders()["llm"]:
        others = ("text_encoder_2", "text_encoder_3", "text_encoder_4")
        return "lora_te1" if any(component_of(path) in others for path in paths) else "lora_te"
    several = any(_has_several(path) for path in paths)
    return "lora_te1" if several else "lora_te"


@lru_cache(maxsize=1 << 16)
def _has_several(path: str) -> bool:
    """Whether a path belongs to a model with more than one text encoder."""
    rest = rooted(path)[1]
    component = component_of(path)
    if component in ("text_encoder_2", "text_encoder_3", "transformer"):
        return True
    return component == "unet" and is_xl([rest]) and bool(families_of(rest, "native") or families_of(rest, "diffusers"))
