"""Translate module names of image and video models between namings, and find the part of the pipeline they belong to.

The names are data in `spec/architectures/*.toml`. The naming `diffusers` has diffusers' names. The naming `native` has
the names that the model's authors (LDM, BFL, Stability) use; ComfyUI also loads models with these names. A family's
file may have further namings.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache

from . import architectures
from .architectures import Architecture, Head, WeightPlace, fill

_WORD = re.compile(r"[A-Za-z]\w*?(?=[._]|$)")

KOHYA = "kohya"
"""A placeholder for the naming that sd-scripts uses.

The key `kohya` in a family's file states which naming is meant; the default is `native`. In the keys of adapter files,
sd-scripts replaces the dots of the names by underscores.
"""


COMFYUI = "comfyui"
"""The naming of ComfyUI's key maps. For families that do not have this naming, it stands for `native`."""

FUSED = "diffusers_fused"
"""The naming of the modules that diffusers' `fuse_qkv_projections` creates.

diffusers loads a LoKr of a fused weight if the LoKr's module name is in this naming.
"""


class ImageFamily:
    """A model family whose models are part of a diffusers pipeline.

    Args:
        head: the tables that precede `[weights]` in the family's file.
        text: the whole text of the family's file.
    """

    def __init__(self, head: Head, text: str) -> None:
        self.name = head.family
        self.facts = head.pipeline
        self.component = self.facts.component
        self.title = self.facts.title or self.name
        self.text = text
        self._names: dict[str, PatternNames] = {}
        self._words: dict[str, bool] = {}
        self._ratios: dict[str, list[float]] = {}

    @cached_property
    def architecture(self) -> Architecture:
        return architectures.named(self.name)

    def __contains__(self, path: object) -> bool:
        """Whether the family has a module with this name, in any naming."""
        known = isinstance(path, str) and self.may_have(path)
        return known and any(path in self.names(naming) for naming in self.namings)

    def has_all(self, names: Iterable[str]) -> bool:
        """Whether the family has all of these modules. The names may belong to different namings."""
        literal = self.literal
        return all(name in self for name in {alike(name, literal): name for name in names}.values())

    @cached_property
    def literal(self) -> frozenset[str]:
        """Return the numbers in the family's names that are not block numbers, such as the 0 of `to_out.0`."""
        return frozenset(number for naming in self.namings for number in self.names(naming).literal)

    def modules(self, part: str) -> PatternNames:
        """Return the module names of `part`, a part of the pipeline that is not the denoiser.

        `facts.modules` must list this part.
        """
        if part not in self._names:
            self._names[part] = names_of(_pattern(name) for name in self.facts.modules[part])
        return self._names[part]

    def unflattened(self, flat: str, naming: str) -> list[str]:
        """List the dotted names in a naming that become `flat` if their dots are replaced by underscores."""
        return self.names(naming).unflattened(flat) if self.may_have(flat) else []

    def may_have(self, name: str) -> bool:
        """Whether the text of the family's file contains all words of a dotted or flattened name.

        If not, the family cannot have the name. This check avoids parsing most files.
        """
        # The key of the cache is the name without block numbers, so that all blocks of a model share one result.
        wanted = shape(name)
        if wanted not in self._words:
            self._words[wanted] = all(word in self.text for word in _WORD.findall(wanted))
        return self._words[wanted]

    @property
    def namings(self) -> tuple[str, ...]:
        return self.architecture.namings

    def wanted(self, naming: str) -> str:
        """Replace `kohya` or `comfyui` with the naming that the family uses for it; return other namings unchanged."""
        if naming == COMFYUI and not self._has_comfyui:
            return "native"
        return self.facts.kohya if naming == KOHYA else naming

    @cached_property
    def _has_comfyui(self) -> bool:
        return f"{COMFYUI} = " in self.text and COMFYUI in self.namings

    def names(self, naming: str) -> PatternNames:
        """Return all module names of the family in one naming; empty if the family does not have this naming."""
        naming = self.wanted(naming)
        if naming not in self._names:
            places = (self.architecture.place(weight, naming) for weight in self.architecture.record.weights)
            self._names[naming] = names_of(_pattern(place.name) for place in places if place is not None)
        return self._names[naming]

    def naming_of(self, paths: Collection[str], preferred: str = "") -> str:
        """Return a naming that has all of these names, preferably `preferred`; an empty string if there is none."""
        preferred = self.wanted(preferred)
        order: list[str] = [*([preferred] if preferred in self.namings else []), *self.namings]
        return next((naming for naming in order if all(path in self.names(naming) for path in paths)), "")

    def moves(self, path: str, ours: str, theirs: str, ratio: float | None = None) -> tuple[Piece, ...]:
        """Return the modules of another naming that contain the rows of the module `path`.

        The result is empty if the modules of the other naming do not contain all of these rows.

        Args:
            path: the module's name.
            ours: the naming that `path` belongs to.
            theirs: the other naming.
            ratio: the module's number of outputs divided by its number of inputs. It is needed if `path` can mean
                several weights, which differ in this ratio.
        """
        pieces = []
        for weight, place, numbers in self.architecture.find(path, ours):
            if place.ratio is not None and (ratio is None or abs(place.ratio - ratio) > 1e-6):
                continue
            there = self.architecture.place(weight, self.wanted(theirs))
            if there is None or (there.ratio is not None and ratio is not None and abs(there.ratio - ratio) > 1e-6):
                return ()
            pieces.append(Piece(fill(there.name, numbers), _run(place), _run(there)))
        pieces_here = merged(pieces)
        complete = bool(pieces_here) and sum(piece.here.parts for piece in pieces_here) == pieces_here[0].here.of
        return pieces_here if complete else ()

    def ratios(self, path: str) -> list[float]:
        """List the possible ratios of a module's number of outputs to its number of inputs.

        The list is empty if the family's file states no ratio for the module.
        """
        # The key of the cache is the name without block numbers, because callers need the ratios for every block.
        kind = alike(path, self.literal)
        if kind not in self._ratios:
            self._ratios[kind] = self._ratios_of(path)
        return self._ratios[kind]

    def _ratios_of(self, path: str) -> list[float]:
        for naming in self.namings:
            for weight, place, _ in self.architecture.find(path, naming):
                if weight in self.facts.ratios:
                    known = self.facts.ratios[weight]
                    each = known if isinstance(known, list) else [known]
                    return [ratio / _run(place).parts * _run(place).of for ratio in each]
        return []


def _pattern(template: str) -> str:
    """Replace the placeholders of a template by `#`."""
    return architectures.HOLE.sub("#", template)


def _run(place: WeightPlace) -> Run:
    if place.part is None or place.of is None:
        return Run()
    return Run(place.part, place.part + place.parts, place.of)


@cache
def families() -> tuple[ImageFamily, ...]:
    """List all families of pipelines; generic families, whose names fit any number of blocks, come last."""
    all_families = [ImageFamily(head, text) for head, text in architectures.of_pipelines()]
    return tuple(sorted(all_families, key=lambda family: family.facts.generic))


def families_of_model(tensors: Iterable[str]) -> list[ImageFamily]:
    """List the families to which a whole U-Net or transformer may belong, given the names of its tensors in any naming.

    A family fits if its file lists all modules of the model. If no file lists all modules, a family must meet three
    conditions: its file lists more than half of the modules, no other file lists more of them, and no other file lists
    a module that this file lacks. These conditions are needed because published checkpoints have modules that no file
    lists: learned tokens and small networks.
    """
    split = [rooted(name) for name in tensors]
    prefixed = [rest for root, rest in split if ROOTS.get(root[:-1]) == "denoiser"]
    # If some names have the denoiser's prefix, ignore all other names: a checkpoint for ComfyUI also has text encoders
    # and a VAE.
    inside = prefixed or [rest for root, rest in split if ROOTS.get(root[:-1], "denoiser") in _DENOISERS]
    modules = {name.rpartition(".")[0] for name in inside if name.endswith((".weight", ".bias", ".scale"))}
    whole = [family for family in families() if modules and all(name in family for name in modules)]
    if whole:
        return whole
    known = {name: [family for family in families() if name in family] for name in modules}
    counts = {family: sum(family in families_here for families_here in known.values()) for family in families()}
    most = max(counts.values(), default=0)
    best = [family for family, count in counts.items() if count == most and 2 * count > len(modules)]
    return [
        family
        for family in best
        if all(family in families_here or not families_here for families_here in known.values())
    ]


_DENOISERS = ("unet", "transformer", "transformer_2", "denoiser")


def looks_of_pipeline(paths: Iterable[str]) -> bool:
    """Whether module names look like those of a model in an image, video or audio pipeline.

    Use this function for models whose family has no file. It looks for the last two words of each name, such as
    `attn.to_q`, in all architecture files. It returns True if the files of pipelines have more matches than all other
    files together. The function compares both counts because the audio tower of a language model may also have a
    `to_q`.
    """
    ends = {".".join(path.split(".")[-2:]) + '"' for path in paths}
    texts = [family.text for family in families()], architectures.texts_of_models()
    here, others = (sum(end in text for end in ends for text in each) for each in texts)
    return here > others


@cache
def encoders() -> dict[str, PatternNames]:
    """Return the module names of each kind of text encoder: `clip`, `t5`, `llm`. All pipelines use the same names."""
    llm = ("llama", "qwen3", "gemma2")
    blocks = {
        _pattern(weight).removeprefix("model.")
        for file in llm
        for weight in architectures.named(file).record.weights
        if weight.startswith("model.layers.") and ("attn." in weight or "mlp." in weight)
    }
    files = {"clip": (("clip",), ("text_",)), "t5": (("t5", "mt5"), ("encoder.", "shared"))}
    return {
        "llm": names_of(f"{before}{name}" for name in sorted(blocks) for before in LLM_PREFIXES),
        **{
            kind: names_of(
                [
                    *(
                        _pattern(w)
                        for file in of
                        for w in architectures.named(file).record.weights
                        if w.startswith(begins)
                    ),
                    *_TIED.get(kind, ()),
                ]
            )
            for kind, (of, begins) in files.items()
        },
    }


LLM_PREFIXES = ("", "model.", "model.language_model.")
"""Prefixes that may precede `layers.` in the module names of a text encoder that is a language model.

The prefix depends on the class that saved the model. A class without a head adds no prefix, a class with a language
modeling head adds `model.`, and a multimodal class with such a head adds `model.language_model.`.
"""


def encoder_kind(rest: str) -> str:
    """Return the kind of text encoder (`clip`, `t5` or `llm`) that has a module named `rest`; empty if unknown."""
    return next((kind for kind, names in encoders().items() if rest in names), "")


_TIED = {"t5": ("encoder.embed_tokens",)}
"""Second names of tied tensors, by kind of text encoder. Architecture files list only one name of each tensor."""


@lru_cache(maxsize=8)
def families_of_names(names: frozenset[str]) -> tuple[ImageFamily, ...]:
    """List the families that have all of these modules, in any naming.

    The result is cached, because several format readers call this function with the same names.
    """
    # Compare words first: if a file lacks a word of a name, the file need not be parsed.
    shapes = {shape(name) for name in names}
    likely = [family for family in families() if all(map(family.may_have, shapes))]
    return tuple(family for family in likely if family.has_all(names))


def families_with(names: Collection[str]) -> list[ImageFamily]:
    """List the families that have all of these modules, in any naming. Generic families are left out.

    The list is empty if `names` is empty.
    """
    return [family for family in families_of_names(frozenset(names)) if names and not family.facts.generic]


def families_of(path: str, naming: str) -> list[ImageFamily]:
    """List the families that have a module with the name `path` in this naming."""
    return [family for family in families() if path in family and path in family.names(naming)]


ROOTS = {
    "unet": "unet",
    "transformer": "transformer",
    "transformer_2": "transformer_2",
    "model.diffusion_model": "denoiser",
    "diffusion_model": "denoiser",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
    "text_encoder_4": "text_encoder_4",
    "text_conditioner": "text_conditioner",
    "connectors": "connectors",
    "controlnet": "controlnet",
    "cond_stage_model.transformer": "text_encoder",
    "conditioner.embedders.0.transformer": "text_encoder",
    "text_encoders.clip_l.transformer": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
    "text_encoders.t5xxl.transformer": "t5",
    **{
        f"text_encoders.{word}.transformer": "text_encoder"
        for word in ("clip_h", "umt5xxl", "llama", "qwen25_7b", "qwen3_06b", "qwen3_4b", "gemma2_2b", "byt5_small")
    },
}
"""A map from prefixes of module names to parts of the pipeline.

`denoiser` stands for the U-Net or the transformer.
"""

PARTS = tuple(word for word, part in ROOTS.items() if word == part)
"""diffusers' names of the parts of pipelines."""


@cache
def beside() -> dict[str, str]:
    """Return a map from ComfyUI's module names to diffusers' module names, for modules outside the denoiser.

    A name in the map can also be a prefix of several module names.
    """
    return {theirs: ours for family in families() for ours, theirs in family.facts.beside.items()}


def in_other_words(path: str, words: Mapping[str, str]) -> str:
    """Replace the prefix of a path. `words` maps each old prefix to its replacement.

    Return an empty string if the path has none of the old prefixes.
    """
    prefix = next((word for word in words if path == word or path.startswith(f"{word}.")), "")
    return words[prefix] + path[len(prefix) :] if prefix else ""


def rooted(path: str) -> tuple[str, str]:
    """Split a path into (prefix, rest).

    The prefix consists of a key of `ROOTS` and a dot. If the path has no such prefix, the result is `("", path)`.
    """
    root = next((root for root in ROOTS if path.startswith(f"{root}.")), "")
    return (f"{root}.", path[len(root) + 1 :]) if root else ("", path)


@lru_cache(maxsize=1 << 16)
def component_of(path: str) -> str | None:
    """Return the part of the pipeline to which a dotted path belongs; None if unknown.

    The path's prefix determines the part. If the path has no prefix from `ROOTS`, the families whose files list the
    path determine the part.
    """
    root, rest = rooted(path)
    if root:
        component = ROOTS[root[:-1]]
        return denoiser_of([rest]) if component == "denoiser" else component
    known = {family.component for family in families() if family.facts.distinctive and path in family}
    if len(known) == 1:
        return next(iter(known))
    return "text_encoder" if path in encoders()["clip"] else None


def denoiser_of(paths: Iterable[str]) -> str:
    """Return `unet` if one of the names belongs to a U-Net, otherwise `transformer`."""
    unets = [family for family in families() if family.component == "unet" and not family.facts.generic]
    return "unet" if any(path in family for path in paths for family in unets) else "transformer"


def is_xl(paths: Collection[str]) -> bool:
    """Whether module names of a U-Net, in any naming, show that the model is Stable Diffusion XL."""
    return _only("sdxl", "sd", paths)


def is_not_xl(paths: Collection[str]) -> bool:
    """Whether module names of a U-Net, in any naming, show that the model is Stable Diffusion 1 or 2."""
    return _only("sd", "sdxl", paths)


def _only(family: str, other: str, paths: Collection[str]) -> bool:
    """Whether `paths` contains a name that only `family` has, and contains no name that only `other` has."""
    one, two = (next(each for each in families() if each.name == name) for name in (family, other))
    membership = {(path in one, path in two) for path in paths}
    return (True, False) in membership and (False, True) not in membership


# Describe module names as dotted patterns with `#` for numbers, and restore the dots of flattened names.
#
# kohya and LyCORIS flatten names: they write every dot as an underscore. Names also have underscores of their own, so
# the dots can be restored only with a list of all names of the model.


_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")
"""Matches a number between dots or underscores, or at an end of the name. The 1 of `attn1` does not match."""


@dataclass(frozen=True, slots=True)
class PatternNames:
    """The names of a family's modules in one naming; create instances with `names_of`.

    Attributes:
        patterns: the dotted names, with `#` for each number that may vary.
        by_dots: a map from keys to patterns. A key is a pattern in which `#` also replaces the literal numbers.
        by_underscores: the same map, with underscores instead of dots in the keys.
    """

    patterns: frozenset[str]
    by_dots: dict[str, tuple[str, ...]] = field(repr=False)
    by_underscores: dict[str, tuple[str, ...]] = field(repr=False)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.patterns_of(name))

    def patterns_of(self, name: str) -> list[str]:
        """List the patterns that fit a dotted name."""
        wanted = shape(name)
        candidates = self.by_dots.get(wanted, ())
        # If a pattern has no literal numbers, it fits every name with the same words. If it has literal numbers, these
        # must also be equal in the name.
        return [each for each in candidates if each == wanted or fill_numbers(each, numbers_in(each, name)) == name]

    @property
    def literal(self) -> set[str]:
        """Return the literal numbers in the patterns, such as the 0 of `to_out.0`."""
        return {number for pattern in self.patterns for number in _NUMBER.findall(pattern)}

    def unflattened(self, flat: str) -> list[str]:
        """List the dotted names that become `flat` if their dots are replaced by underscores; there may be several."""
        names: dict[str, None] = {}
        for pattern in self.by_underscores.get(shape(flat), ()):
            name = fill_numbers(pattern, numbers_in(pattern.replace(".", "_"), flat))
            if flatten(name) == flat:
                names[name] = None
        return list(names)


def names_of(patterns: Iterable[str]) -> PatternNames:
    """Build a `PatternNames` from dotted names, with `#` for each number that may vary."""
    dots: dict[str, list[str]] = {}
    underscores: dict[str, list[str]] = {}
    kept = dict.fromkeys(patterns)
    for pattern in kept:
        dots.setdefault(_NUMBER.sub("#", pattern), []).append(pattern)
        underscores.setdefault(_NUMBER.sub("#", flatten(pattern)), []).append(pattern)
    return PatternNames(
        frozenset(kept), {k: tuple(v) for k, v in dots.items()}, {k: tuple(v) for k, v in underscores.items()}
    )


@lru_cache(maxsize=1 << 16)
def shape(name: str) -> str:
    """Replace numbers in a name with `#`; cached, because the same names are looked up in every family and naming."""
    return _NUMBER.sub("#", name)


def alike(name: str, literal: Collection[str]) -> str:
    """Replace the numbers in a name with `#`, except those in `literal`.

    Names with equal results fit the same patterns.

    Args:
        name: the name, dotted or flattened.
        literal: the numbers to keep; see `PatternNames.literal`.
    """
    return _NUMBER.sub(lambda match: match[0] if match[0] in literal else "#", name)


def flatten(name: str) -> str:
    """Replace the dots of a name by underscores."""
    return name.replace(".", "_")


def numbers_in(pattern: str, name: str) -> list[str]:
    """Return the words of `name` at the positions of `#` in `pattern`. All other words are ignored."""
    words, parts = re.split(r"[._]", pattern), re.split(r"[._]", name)
    return [parts[i] for i, word in enumerate(words) if word == "#" and i < len(parts)]


def fill_numbers(pattern: str, given: Iterable[str]) -> str:
    """Replace each `#` in a pattern with the next number of `given`; any `#` without a number remains."""
    values = iter(given)
    return re.sub("#", lambda _: next(values, "#"), pattern)


# Map the rows of a fused weight in one naming to the rows of weights in another naming.


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of a weight.

    The weight is divided into `of` equal parts. The run has the parts from `start` up to, but not including, `stop`.

    Attributes:
        start: the index of the first part.
        stop: the index after the last part.
        of: the number of equal parts of the whole weight.
    """

    start: int = 0
    stop: int = 1
    of: int = 1

    @property
    def parts(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether the run has all rows of the weight."""
        return self.parts == self.of


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a module in one naming, and the module that contains these rows in another naming.

    Attributes:
        path: the name of the module in the other naming.
        here: the rows in the module of the first naming.
        there: the same rows in the module `path`.
    """

    path: str
    here: Run = Run()
    there: Run = Run()


def merged(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Sort pieces by their rows in the first naming, and join pieces that are adjacent in both namings."""
    pieces_merged: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.here.start):
        last = pieces_merged[-1] if pieces_merged else None
        if last is not None and _adjacent(last, piece):
            here = replace(last.here, stop=piece.here.stop)
            there = replace(last.there, stop=piece.there.stop)
            pieces_merged[-1] = Piece(piece.path, here, there)
        else:
            pieces_merged.append(piece)
    return tuple(replace(each, here=_reduced(each.here), there=_reduced(each.there)) for each in pieces_merged)


def _adjacent(one: Piece, other: Piece) -> bool:
    same = one.path == other.path and one.here.stop == other.here.start and one.there.stop == other.there.start
    return same and one.here.parts * other.there.parts == other.here.parts * one.there.parts


def _reduced(run: Run) -> Run:
    return Run() if run.whole else run
