"""Names of modules with underscores for dots, as kohya and LyCORIS write them, and the parts of a pipeline before them.

Undone against the modules of a base, walked forward; without one, against the tables of families that are known. What
fits nothing, or several names, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from ...errors import TargetNotFound, nearest
from ...naming.image import ROOTS, Family, component_of, encoders, families, families_of, is_xl, rooted
from ...naming.patterns import flatten

if TYPE_CHECKING:
    from ...tensors.checkpoint import Checkpoint

STEM = re.compile(r"(lora_unet|oft_unet|lora_transformer|lora_te[123]?|lycoris)_(.+)")

_PARTS = {
    "lora_unet": ("unet", "transformer"), "oft_unet": ("unet", "transformer"), "lora_transformer": ("transformer",),
    "lora_te": ("text_encoder",), "lora_te1": ("text_encoder",), "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_2", "text_encoder_3"), "lycoris": ("unet", "transformer", "text_encoder"),
}  # fmt: skip
"""What stems begin with -> the parts of a pipeline that they may be in."""

_ARCHITECTURES = {"flux": "text_encoder_2", "sd3": "text_encoder_3", "stable-diffusion-3": "text_encoder_3"}
"""What a file's metadata call the model -> where its T5 is."""


def resolve(stems: Iterable[str], metadata: Mapping[str, str], base: Checkpoint | None) -> dict[str, str]:
    """Stem -> dotted path.

    Raises:
        TargetNotFound: a stem fits no module, or several; names the nearest.
    """
    known = list(stems)
    walked = None if base is None else _walked(base)
    words = {stem: _words(stem) for stem in known}
    third = _third(words.values(), metadata)
    return {stem: _resolve(stem, *words[stem], third, walked) for stem in known}


def _words(stem: str) -> tuple[str, str]:
    found = STEM.fullmatch(stem)
    assert found is not None
    return found[1], found[2]


def _resolve(stem: str, tag: str, flat: str, third: str, walked: Mapping[str, list[tuple[str, str]]] | None) -> str:
    if walked is not None:
        here = list(dict.fromkeys(path for part, path in walked.get(flat, ()) if part in ("", *_PARTS[tag])))
        if len(here) == 1:
            return here[0]
        if here:
            raise TargetNotFound(f"it can be any of {', '.join(here)}", where=stem, cure="Rename it in the file")
    found = list(dict.fromkeys(_by_tables(tag, flat, third)))
    if len(found) == 1:
        return found[0]
    if found:
        raise TargetNotFound(f"it can be any of {', '.join(found)}", where=stem, cure="Pass base=, whose names decide")
    raise TargetNotFound("no module of a known model has this name", where=stem, cure=_near(flat, walked))


def _by_tables(tag: str, flat: str, third: str) -> Iterator[str]:
    if tag in ("lora_unet", "oft_unet", "lora_transformer", "lycoris"):
        for family in families():
            if family.component in _PARTS[tag]:
                for naming in family.namings:
                    yield from (f"{family.component}.{name}" for name in family.names(naming).unflattened(flat))
    if tag in ("lora_te", "lora_te1", "lora_te2", "lycoris"):
        part = _PARTS[tag][-1]
        yield from (f"{part}.{name}" for kind in ("clip", "t5") for name in encoders()[kind].unflattened(flat))
    if tag == "lora_te3" and third:
        yield from (f"{third}.{name}" for name in encoders()["t5"].unflattened(flat))


def _third(words: Iterable[tuple[str, str]], metadata: Mapping[str, str]) -> str:
    """Where lora_te3 is: FLUX's T5 is its second encoder, SD 3's its third; empty where nothing tells."""
    said = metadata.get("ss_base_model_version", "") + " " + metadata.get("modelspec.architecture", "")
    told = {part for name, part in _ARCHITECTURES.items() if name in said}
    names = {f.name for tag, flat in words if tag in ("lora_unet", "oft_unet") for f in _families(flat)}
    told |= {part for name, part in _ARCHITECTURES.items() if name in names}
    return next(iter(told)) if len(told) == 1 else ""


def _families(flat: str) -> Iterator[Family]:
    # FLUX.2 has FLUX.1's names, but no T5.
    fitting = [
        family for family in families() if family.name in _ARCHITECTURES and family.names("native").unflattened(flat)
    ]
    yield from fitting if len(fitting) == 1 else ()


def _walked(base: Checkpoint) -> dict[str, list[tuple[str, str]]]:
    """Flattened name of every module of the base, with and without what it begins with -> (part, its path)."""
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
    """The dotted paths of the modules that a base holds tensors of."""
    names = (name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in base.tensors)
    return [name for name in dict.fromkeys(names) if name]


def _near(flat: str, walked: Mapping[str, object] | None) -> str:
    if walked is not None:
        return nearest(flat, walked) or "Is this the base that the adapter was trained on?"
    known = {flatten(p) for family in families() for naming in family.namings for p in family.names(naming).patterns}
    shape = re.sub(r"(?<![^_])\d+(?![^_])", "#", flat)
    near = nearest(shape, {name for name in known if name[:4] == shape[:4]})
    return f"{near}{'. ' if near else ''}Pass base=, whose names are walked"


def stem_of(path: str, paths: Iterable[str], *, tag: str = "lora_unet", lycoris: bool = False) -> str | None:
    """The stem of a path among others of one file; None where it is in no part of an image model.

    Args:
        path: the target's.
        paths: of all targets.
        tag: what those of the denoiser begin with.
        lycoris: modules of other models have stems as well.
    """
    component, (_, rest) = component_of(path), rooted(path)
    if component in ("unet", "transformer"):
        return f"{tag}_{flatten(rest)}"
    if component is not None:
        return f"{_encoder(component, rest, paths)}_{flatten(rest)}"
    return f"lycoris_{flatten(path)}" if lycoris else None


def _encoder(component: str, rest: str, paths: Iterable[str]) -> str:
    """kohya's word for a text encoder: numbered where there is more than one."""
    if rest in encoders()["t5"] and component != "text_encoder":
        return "lora_te3"
    if component == "text_encoder_2":
        return "lora_te2"
    several = any(_has_several(path) for path in paths)
    return "lora_te1" if several else "lora_te"


@lru_cache(maxsize=1 << 16)
def _has_several(path: str) -> bool:
    """Whether a path is of a model with more than one text encoder."""
    rest = rooted(path)[1]
    component = component_of(path)
    if component in ("text_encoder_2", "text_encoder_3", "transformer"):
        return True
    return component == "unet" and is_xl([rest]) and bool(families_of(rest, "native") or families_of(rest, "diffusers"))
