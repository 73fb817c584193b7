"""Image models: their families in two namings each, and what the parts of a pipeline are called.

`native` is what a model's authors call its modules (LDM, BFL, Stability), and what ComfyUI and most of kohya's scripts
go by; `diffusers` what diffusers does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from .patterns import Names, fill, names_of, numbers
from .pieces import Piece, Table

NAMINGS = ("native", "diffusers")


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        name: what it is called.
        component: the part of a pipeline that it is, in diffusers' words.
        pieces: pattern of the native naming -> its pieces in diffusers'; several may lead to one module there.
        native: the names of the native naming.
        diffusers: the names of diffusers'.
        ratios: native pattern -> outputs by input, where families share a name for weights of other shapes.
        widths: how wide its blocks are, where families share names.
        blocks: first word of a name -> how many blocks there are at most.
        generic: its names are any numbers of blocks, so that it is meant where no other family has all names.
    """

    name: str
    component: str
    pieces: tuple[tuple[str, tuple[Piece, ...]], ...]
    native: Names
    diffusers: Names
    ratios: Mapping[str, float] = field(default_factory=dict)
    widths: frozenset[int] = frozenset()
    blocks: Mapping[str, int] = field(default_factory=dict)
    generic: bool = False

    def __contains__(self, path: object) -> bool:
        """Whether a module is called so in one of the two namings."""
        return path in self.native or path in self.diffusers

    def names(self, naming: str) -> Names:
        return self.native if naming == "native" else self.diffusers


@cache
def families() -> tuple[Family, ...]:
    """The families whose names are known. A family that is added here is translated, and no longer refused."""
    from . import flux, flux2, one_naming, sd3, unet

    unets = tuple((ldm, (Piece(theirs),)) for ldm, theirs in unet.pairs())
    return (
        _family("unet", "unet", unets),
        _family(
            "flux", "transformer", _items(flux.TABLE), ratios=flux.RATIOS, widths=frozenset({3072}), blocks=flux.BLOCKS
        ),
        _family("sd3", "transformer", _items(sd3.TABLE), sd3.ALONE, widths=frozenset({1536, 2432})),
        _family(
            "flux2", "transformer", _items(flux2.TABLE), flux2.ALONE, flux2.THEIRS, ratios=flux2.RATIOS,
            widths=frozenset({3072, 4096, 6144}),
        ),
        *(
            _family(name, "transformer", tuple((path, (Piece(path),)) for path in paths), widths=_WIDTHS[name])
            for name, paths in one_naming.SAME.items()
        ),
        _family("unet of other blocks", "unet", (), (), unet.any_blocks(), generic=True),
        *(_family(name, "transformer", (), paths) for name, paths in one_naming.RECOGNISED.items()),
    )  # fmt: skip


_WIDTHS = {
    "qwen_image": frozenset({3072}), "ltx": frozenset({2048, 4096}), "z_image": frozenset({3840}),
    "hidream": frozenset({2560}),
}  # fmt: skip


@cache
def encoders() -> dict[str, Names]:
    """The names of the text encoders, which are called the same everywhere."""
    from . import text_encoders

    return {"clip": names_of(text_encoders.CLIP), "t5": names_of(text_encoders.T5)}


def families_of(path: str, naming: str) -> list[Family]:
    """The families in which a module of this naming is called `path`."""
    return [family for family in families() if path in family.names(naming)]


def to_diffusers(family: Family, path: str) -> tuple[tuple[Piece, str], ...]:
    """(piece, its module in diffusers) for every piece of a module in the native naming."""
    for pattern in family.native.patterns_of(path):
        pieces = _index(family.name)[0].get(pattern, ())
        return tuple((piece, fill(piece.pattern, numbers(pattern, path))) for piece in pieces)
    return ()


def to_native(family: Family, path: str) -> list[tuple[Piece, str]]:
    """(piece, the native module that it is part of) for a module of diffusers; several where it is not told."""
    places = _index(family.name)[1]
    return [
        (piece, fill(pattern, numbers(piece.pattern, path)))
        for fitting in family.diffusers.patterns_of(path)
        for pattern, piece in places.get(fitting, ())
    ]


@cache
def _index(name: str) -> tuple[dict[str, tuple[Piece, ...]], dict[str, list[tuple[str, Piece]]]]:
    """Native pattern -> pieces, and diffusers' pattern -> (native pattern, piece), of the family of a name."""
    family = next(family for family in families() if family.name == name)
    back: dict[str, list[tuple[str, Piece]]] = {}
    for pattern, pieces in family.pieces:
        for piece in pieces:
            back.setdefault(piece.pattern, []).append((pattern, piece))
    return dict(family.pieces), back


ROOTS = {
    "unet": "unet",
    "transformer": "transformer",
    "model.diffusion_model": "denoiser",
    "diffusion_model": "denoiser",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
    "cond_stage_model.transformer": "text_encoder",
    "conditioner.embedders.0.transformer": "text_encoder",
    "text_encoders.clip_l.transformer": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
    "text_encoders.t5xxl.transformer": "t5",
}
"""What names of a part of a pipeline begin with -> the part; `denoiser` is the U-Net or the transformer."""


def rooted(path: str) -> tuple[str, str]:
    """A path in two: the part of a pipeline that it begins with, dot included or nothing, and the name inside it."""
    root = next((root for root in ROOTS if path.startswith(f"{root}.")), "")
    return (f"{root}.", path[len(root) + 1 :]) if root else ("", path)


@lru_cache(maxsize=1 << 16)
def component_of(path: str) -> str | None:
    """The part of a pipeline that a dotted path is in: named in the path, or told by the tables."""
    root, rest = rooted(path)
    if root:
        component = ROOTS[root[:-1]]
        return denoiser_of([rest]) if component == "denoiser" else component
    known = {family.component for family in families() if family.name in ROOTLESS and path in family}
    if len(known) == 1:
        return next(iter(known))
    return "text_encoder" if path in encoders()["clip"] else None


ROOTLESS = ("unet", "flux", "sd3")
"""Families whose names are like no language model's, so that they tell the part where nothing stands before them."""


def denoiser_of(paths: Iterable[str]) -> str:
    """`unet` where one of the names is a U-Net's, else `transformer`."""
    unets = families()[0]
    return "unet" if any(path in unets.native or path in unets.diffusers for path in paths) else "transformer"


def is_xl(paths: Collection[str]) -> bool:
    """Whether names of a U-Net's modules, in either naming, are of Stable Diffusion XL."""
    from . import unet

    return any(path.startswith(unet.XL_ONLY) or _deep(path) for path in paths) and not is_not_xl(paths)


def is_not_xl(paths: Collection[str]) -> bool:
    """Whether names of a U-Net's modules, in either naming, are of Stable Diffusion 1 or 2."""
    from . import unet

    return any(path.startswith(unet.NOT_XL) for path in paths)


def _deep(path: str) -> bool:
    """XL alone has more than one transformer block an attention."""
    _, found, tail = path.partition("transformer_blocks.")
    return (
        bool(found) and path.startswith(("down_", "up_", "mid_", "input_", "output_", "middle_")) and tail[:2] != "0."
    )


def _items(table: Table) -> tuple[tuple[str, tuple[Piece, ...]], ...]:
    return tuple(table.items())


def _family(
    name: str,
    component: str,
    pieces: tuple[tuple[str, tuple[Piece, ...]], ...],
    alone: tuple[str, ...] = (),
    theirs: tuple[str, ...] = (),
    **evidence: Any,
) -> Family:
    native = names_of((*(pattern for pattern, _ in pieces), *alone))
    diffusers = names_of((*(piece.pattern for _, found in pieces for piece in found), *theirs))
    return Family(name, component, pieces, native, diffusers, **evidence)
