"""Types and tables for mapping names: moves, rules, the index of a base's names, parts of models, stored layouts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

from ..errors import TargetNotFound
from .architectures import HOLE, QKV, Architecture, WeightPlace, architecture_of, is_family, shape_of

# Describe the result of mapping names: where each target's parts are in the base, and which rules were used.


class PathPart(NamedTuple):
    """Some rows of a fused weight: the rows of one of its parts.

    Attributes:
        number: the number of the part, counted from 0.
        of: the number of equal parts.
        interleaved: whether the part consists of every `of`-th row, starting at row `number`, instead of consecutive
            rows.
        heads: whether the three parts are queries, keys and values; their sizes depend on the base's numbers of heads.
        groups: whether rows are ordered by groups: the queries that share a key, the key, the value. Only with `heads`.
    """

    number: int
    of: int
    interleaved: bool = False
    heads: bool = False
    groups: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """One part of a target, and its location in the base.

    Attributes:
        path: the name in the base.
        take: the rows of the target that belong to this part; None for all rows.
        into: the rows of the base's weight that correspond to `take`; None for all rows.
        expert: if the target is a stack but the base has single experts: the expert's index in the target. Otherwise
            None.
        slot: if the base has a stack but the target is a single expert: the expert's index in the base. Otherwise None.
        turn: the order of rows in the adapter and the order in the base, as two `WeightPlace` objects without names.
            None if the orders are equal.
    """

    path: str
    take: PathPart | None = None
    into: PathPart | None = None
    expert: int | None = None
    slot: int | None = None
    turn: tuple[WeightPlace, WeightPlace] | None = None

    @property
    def plain(self) -> bool:
        """Whether only the name differs."""
        return (self.take, self.into, self.expert, self.slot, self.turn) == (None, None, None, None, None)


@dataclass(frozen=True, slots=True)
class MoveRule:
    """A rule that mapped names, for reports.

    Attributes:
        kind: `user`, `exact`, `wrapper`, `architecture` or `prefix`.
        text: a text that describes the rule; empty for `exact`.
        targets: the number of targets that the rule mapped.
    """

    kind: str
    text: str
    targets: int

    def __str__(self) -> str:
        return f"{self.kind} {self.text}".strip()


@dataclass(slots=True)
class Resolution:
    """The result of mapping an adapter's names to a base.

    Attributes:
        moves: a map from each name in the adapter to the destinations of its parts in the base. There is one part,
            unless the base stores the target in several tensors.
        missing: the adapter's names that the base does not have.
        rules: the rules that were used, in the order in which they were tried.
        prefixes: the changes of prefix that were used, as (removed, added).
    """

    moves: dict[str, tuple[Move, ...]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    rules: list[MoveRule] = field(default_factory=list)
    prefixes: list[tuple[str, str]] = field(default_factory=list)


def part_of(place: WeightPlace) -> PathPart | None:
    """Return which rows of a tensor belong to the weight with this `WeightPlace`; None for all rows."""
    if place.qkv is not None:
        return PathPart(QKV.index(place.qkv), len(QKV), heads=True, groups=place.groups)
    if place.part is None or place.of is None:
        return None
    return PathPart(place.part, place.of, place.interleaved)


def ambiguous(target: str, readings: Sequence[str]) -> TargetNotFound:
    """Return an error for a name that can mean several names in the base.

    The error lists the names in the base, and the option that selects one of them.
    """
    shown = " or ".join(sorted(readings)[:4])
    return TargetNotFound(
        f"the name can mean several modules of the base: {shown}", where=target,
        cure=f"Choose one with --rename '{target}={sorted(readings)[0]}' (rename=), or with a shorter prefix",
    )  # fmt: skip


# Index the names in a base: paths, templates with `#` for numbers, and endings of templates.


WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Words that torch.compile, FSDP, activation checkpointing and Fabric insert into paths; models never use them."""

PERHAPS = frozenset({"module", "default"})
"""Words that DistributedDataParallel and adapters insert into paths; models' own paths may also contain them."""

Left = list[tuple[str, str]]
"""(target, name) of each target that is not mapped yet; the name is the target's name after the rules so far."""


@dataclass(frozen=True, eq=False)
class Names:
    """The names in a base.

    Attributes:
        paths: the dotted paths of modules with a weight or a bias, and of parameters.
        outer: the paths of all modules, with or without own tensors, to which the targets in `anywhere` can be mapped.
        anywhere: the targets that may be any module, with or without own tensors.
        families: a cache of `FamilyNames` objects, by family.
        experts: the number of experts in a layer, from the base's config; 0 if unknown.
    """

    paths: Collection[str]
    outer: Collection[str] = ()
    anywhere: Collection[str] = ()
    families: dict[str, object] = field(default_factory=dict)
    experts: int = 0

    def has(self, path: str, target: str) -> bool:
        """Whether the base has the path, and the target may have this path."""
        return path in (self.outer if target in self.anywhere else self.paths)

    def lacks_weight(self, path: str) -> bool:
        """Whether the base has the bias of module `path`, but not its weight."""
        return f"{path}.bias" in self.paths and f"{path}.weight" not in self.paths

    @cached_property
    def templates(self) -> dict[str, str]:
        """Return a map from each template to one name that fits it, such as `layers.#.mlp` to `layers.0.mlp`."""
        names = [name for name in (*self.paths, *self.outer) if "." in name]
        # Join all names into one string for the substitution: a call for each of the 90,000 names of a large model
        # takes three times as long.
        templates = _NUMBERS.sub(".#", "\n".join(names)).split("\n")
        if len(templates) != len(names):  # There are no names, or a name has a line break: substitute in each name.
            templates = [template_of(name) for name in names]
        examples = dict(zip(templates, names, strict=True))
        examples.update((shape_of(name), name) for name in (*self.paths, *self.outer) if "." not in name)
        return examples

    @cached_property
    def endings(self) -> dict[str, list[str]]:
        """Return a map from each ending of a template to all templates with this ending."""
        ends: dict[str, list[str]] = {}
        for template in self.templates:
            words = template.split(".")
            for cut in range(len(words)):
                ends.setdefault(shape_of(".".join(words[cut:])), []).append(template)
        return ends

    @cached_property
    def without_wrappers(self) -> tuple[Names, dict[str, str]] | None:
        """Return the names without the words of wrappers, and a map from short to full names.

        None if no name has such a word.

        FSDP and torch.compile add such words to the names in a state dict, and PEFT adds `base_layer`.
        """
        off = WRAPPERS | {"base_layer"}
        # Join all names into one string for the search: searching each of the 90,000 names of a large mixture of
        # experts takes 40 times as long.
        text = "\n".join(self.paths)
        if not any(word in text for word in off):
            return None
        wrapped = [path for path in self.paths if any(word in path for word in off)]
        words = {path: [word for word in path.split(".") if word not in off] for path in wrapped}
        real = {".".join(left): path for path, left in words.items() if len(left) <= path.count(".")}
        real = {name: path for name, path in real.items() if name and name not in self.paths}
        if not real:
            return None
        taken = set(real.values())
        paths = {path for path in self.paths if path not in taken} | real.keys()
        return Names(paths, self.outer, self.anywhere, experts=self.experts), real


_NUMBERS = re.compile(r"\.(?:0|[1-9][0-9]{0,8})(?=[.\n]|\Z)")
"""Matches numbers in names. A number as the first word does not match, because it names a part of a pipeline."""


def template_of(name: str) -> str:
    """Replace numbers in a name with `#`, as in `Names.templates`."""
    return _NUMBERS.sub(".#", name) if "." in name else shape_of(name)


def swap(name: str, off: str, on: str) -> str:
    """Replace the prefix `off` of a name with `on`; return the name unchanged if it does not begin with `off`."""
    return on + name[len(off) :] if name.startswith(off) else name


# Find which part of a model a prefix names, so that a vision tower is not mapped to a language model.


_KINDS: dict[str, dict[str, str]] = {
    "modality": {
        "vision": "vision visual image img pixel",
        "text": "language text llm lang",
        "audio": "audio speech sound",
    },
    "half": {"encoder": "encoder", "decoder": "decoder"},
    "role": {"thinker": "thinker", "talker": "talker"},
}
"""A map from each kind of part to the parts of this kind, each with the words in prefixes that name the part.

Parts of one kind may have the same shapes.
"""

_KIND = {
    word: (kind, part) for kind, parts in _KINDS.items() for part, words in parts.items() for word in words.split()
}


def modalities_of(name: str) -> set[str]:
    """Return the modalities (vision, text, audio) that a name mentions."""
    return parts_of("modality", name)


def parts_of(kind: str, name: str) -> set[str]:
    """Return the parts of one kind in `_KINDS` that a name mentions."""
    return {_KIND[word][1] for word in re.split(r"[._]", name) if _KIND.get(word, ("", ""))[0] == kind}


@lru_cache(maxsize=1 << 10)
def exchangeable(off: str, on: str) -> bool:
    """Whether prefix `on` may replace `off`: the last words differ, and the prefixes do not name different parts.

    For example, `roberta.` may not replace `bert.`, and an encoder's prefix may not replace a decoder's.
    """
    ours, theirs = ({word for word in prefix.split(".") if is_family(word)} for prefix in (off, on))
    if (ours and theirs and ours.isdisjoint(theirs)) or on.split(".")[-2] == off.split(".")[-2]:
        return False
    ours, theirs = ({word for word in re.split(r"[._]", prefix) if word in _KIND} for prefix in (off, on))
    kinds = [
        ({_KIND[word][1] for word in words if _KIND[word][0] == kind}) for kind in _KINDS for words in (ours, theirs)
    ]
    # `model.` may not replace `model.vision_tower.encoder.`, because `model.` is the text part. But a further word of a
    # tower's prefix may be dropped: `model.video_tower.` may replace `model.video_tower.vision_model.`.
    kept = {*off.split(".")} & {*on.split(".")} - {"", "model", "transformer"}
    if kinds[0] - {"text"} and not kinds[1] and not kept:
        return False
    return not any(one and other and one.isdisjoint(other) for one, other in zip(kinds[::2], kinds[1::2], strict=True))


def keeps_parts(off: str, on: str) -> bool:
    """Whether the change from `off` to `on` only drops words, or drops at most the words `model` and `transformer`."""
    ours, theirs = off.split(".")[:-1], on.split(".")[:-1]
    dropped = {word for word in ours if word not in theirs}
    return dropped <= {"model", "transformer"} or all(word in ours for word in theirs)


# List the weights that a base stores as [in, out], by the `model_type` of its config.
#
# The list is needed for square weights, whose shape does not show the layout. Sources: `Conv1D` in transformers'
# modelling files of these families; for experts stored as `[expert, in, out]`, the entries with `transposed` in
# spec/architectures.


_CONV1D = ("*.c_attn", "*.c_proj", "*.c_fc", "*.q_attn")

IN_OUT = {
    "gpt2": _CONV1D,
    "openai-gpt": _CONV1D,
    "imagegpt": _CONV1D,
    "decision_transformer": _CONV1D,
    "clvp": ("*.mlp.c_fc", "*.mlp.c_proj"),
    "clvp_decoder": _CONV1D,
}
"""For each model_type, globs of the targets that are stored as [in, out]."""


def stored_in_out(path: str, config: Mapping[str, object] | None) -> bool | None:
    """Whether the base stores this target as [in, out]; None if the family is not in the list."""
    globs = IN_OUT.get(str((config or {}).get("model_type")))
    if globs is not None:
        return any(fnmatchcase(path, glob) for glob in globs)
    family = architecture_of(config)
    ends = () if family is None else _transposed(family)
    return any(shape_of(path).endswith(end) for end in ends) if ends else None


@cache
def _transposed(family: Architecture) -> tuple[str, ...]:
    """Return the names of a family's tensors with `transposed`, shortened to the part after the layer's number."""
    places = (family.place(weight, naming) for weight in family.record.weights for naming in ("hub", "transformers5"))
    names = (shape_of(HOLE.sub("0", place.name)) for place in places if place is not None and place.transposed)
    return tuple(dict.fromkeys(name[name.rfind("#") :] for name in names))
