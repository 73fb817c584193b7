"""Define the types and tables that map the names in an adapter to the names in a base."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
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
        number: the index of the part, counted from 0.
        of: the number of parts. They have equal sizes, unless `heads` is true.
        interleaved: whether the part consists of every `of`-th row, starting at row `number`, instead of consecutive
            rows.
        heads: whether the parts are queries, keys and values. Their sizes depend on the base's numbers of heads.
        groups: whether the rows are ordered by key heads: for each key head, first the queries that share it, then its
            key, then its value. `groups` can be true only if `heads` is true.
    """

    number: int
    of: int
    interleaved: bool = False
    heads: bool = False
    groups: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """Some or all rows of a target, and the rows of the base that they correspond to.

    Attributes:
        path: the dotted path in the base.
        take: the rows of the target that this move maps; None for all rows.
        into: the rows of the base's weight that correspond to `take`; None for all rows.
        expert: the expert's index in the target, if the target is a stack and the base has single experts. Otherwise
            None.
        slot: the expert's index in the base, if the base has a stack and the target is a single expert. Otherwise None.
        turn: the order of the rows in the adapter and their order in the base, as two `WeightPlace` objects without
            names. None if the orders are equal.
    """

    path: str
    take: PathPart | None = None
    into: PathPart | None = None
    expert: int | None = None
    slot: int | None = None
    turn: tuple[WeightPlace, WeightPlace] | None = None

    @property
    def plain(self) -> bool:
        """Whether the base stores the target in the same layout as the adapter, perhaps under another name."""
        return (self.take, self.into, self.expert, self.slot, self.turn) == (None, None, None, None, None)


@dataclass(frozen=True, slots=True)
class MoveRule:
    """A record, for reports, of a rule that mapped an adapter's names to a base's names.

    Attributes:
        kind: `user`, `exact`, `wrapper`, `architecture` or `prefix`.
        text: a description of the rule; empty for `exact`.
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
        moves: a map from each target's name in the adapter to its moves. A target has one move, unless the base stores
            it in several tensors.
        missing: the adapter's names that the base does not have.
        rules: the rules that were used, in the order in which they were tried.
        prefixes: the prefix changes that were used, as pairs (removed prefix, added prefix).
    """

    moves: dict[str, tuple[Move, ...]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    rules: list[MoveRule] = field(default_factory=list)
    prefixes: list[tuple[str, str]] = field(default_factory=list)


def part_of(place: WeightPlace) -> PathPart | None:
    """Return which rows of the tensor `place.name` belong to the weight that `place` describes; None for all rows."""
    if place.qkv is not None:
        return PathPart(QKV.index(place.qkv), len(QKV), heads=True, groups=place.groups)
    if place.part is None or place.of is None:
        return None
    return PathPart(place.part, place.of, place.interleaved)


def ambiguous(target: str, readings: Sequence[str]) -> TargetNotFound:
    """Return an error for a target whose name can mean several modules of the base.

    The error lists up to four of these modules, and shows the `--rename` option that selects the first of them.
    """
    shown = " or ".join(sorted(readings)[:4])
    return TargetNotFound(
        f"the name can mean several modules of the base: {shown}", where=target,
        cure=f"Choose one with --rename '{target}={sorted(readings)[0]}' (rename=), or rename a prefix of the name",
    )  # fmt: skip


# An index of the names in a base. A template is a name with `#` for each number.


WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Words that torch.compile, FSDP, activation checkpointing and Fabric insert into paths.

Models themselves never use these words.
"""

PERHAPS = frozenset({"module", "default"})
"""Words that DistributedDataParallel and adapters insert into paths, but that a model's own paths may also contain."""

Left = list[tuple[str, str]]
"""(target, name) pairs of the targets that are not mapped yet; earlier rules may have changed `name`."""


@dataclass(frozen=True, eq=False)
class Names:
    """The names in a base.

    Attributes:
        paths: the dotted paths of parameters, and of modules with a weight or a bias.
        outer: the paths of all modules, including modules without tensors of their own. Only the targets in `anywhere`
            can be mapped to `outer`.
        anywhere: the targets that may be mapped to a module without tensors of its own.
        families: a cache of `FamilyNames` objects, by family.
        experts: the number of experts in a layer, from the base's config; 0 if unknown.
    """

    paths: Collection[str]
    outer: Collection[str] = ()
    anywhere: Collection[str] = ()
    families: dict[str, object] = field(default_factory=dict)
    experts: int = 0

    def has(self, path: str, target: str) -> bool:
        """Whether `target` can be mapped to `path`.

        The path must be in `outer` if the target is in `anywhere`; otherwise, it must be in `paths`.
        """
        return path in (self.outer if target in self.anywhere else self.paths)

    def lacks_weight(self, path: str) -> bool:
        """Whether the base has the bias of module `path`, but not its weight."""
        return f"{path}.bias" in self.paths and f"{path}.weight" not in self.paths

    @cached_property
    def templates(self) -> dict[str, str]:
        """Return a map from each template, such as `layers.#.mlp`, to one name that fits it, such as `layers.0.mlp`."""
        names = [name for name in (*self.paths, *self.outer) if "." in name]
        # Join all names into one string and substitute once. For a large model with 90,000 names, one substitution per
        # name takes three times as long.
        templates = _NUMBERS.sub(".#", "\n".join(names)).split("\n")
        if len(templates) != len(names):  # There are no names, or a name contains a line break.
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
        """Return the base's names without the words in `WRAPPERS`, and a map from each shortened name to its full name.

        The word `base_layer`, which PEFT adds, is removed too. FSDP and torch.compile add the words in `WRAPPERS` to
        the names in a state dict. Return None if no name can be shortened.
        """
        off = WRAPPERS | {"base_layer"}
        # Join all names into one string and search this string. For a large mixture of experts with 90,000 names,
        # searching each name takes 40 times as long.
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
"""Matches the numbers in a name, except a number at its start: such a number names a part of a pipeline."""


def template_of(name: str) -> str:
    """Replace numbers in a name with `#`, as in `Names.templates`."""
    return _NUMBERS.sub(".#", name) if "." in name else shape_of(name)


def same_end(one: str, other: str) -> bool:
    """Whether two dotted paths are equal, except for a prefix that a wrapper adds to one path."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


class NamesByEnd:
    """Look up the names for which `same_end` is true, instead of comparing each path with all names.

    Args:
        names: the names to find.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._at = {name: position for position, name in enumerate(names)}
        self._longer: dict[str, list[str]] = {}
        for name in self._at:
            for end in _ends(name):
                self._longer.setdefault(end, []).append(name)

    def of(self, path: str) -> list[str]:
        """Return the names that equal a path except for a prefix, in the order of the names."""
        equal_or_shorter = [name for name in (path, *_ends(path)) if name in self._at]
        return sorted({*equal_or_shorter, *self._longer.get(path, ())}, key=self._at.__getitem__)


def _ends(name: str) -> list[str]:
    """Return what follows each dot of a name."""
    return [name[at + 1 :] for at, sign in enumerate(name) if sign == "."]


def swap(name: str, off: str, on: str) -> str:
    """Replace the prefix `off` of a name with `on`; return the name unchanged if it does not begin with `off`."""
    return on + name[len(off) :] if name.startswith(off) else name


# Find the part of a model that a prefix names, so that a vision tower is not mapped to a language model.


_KINDS: dict[str, dict[str, str]] = {
    "modality": {
        "vision": "vision visual image img pixel",
        "text": "language text llm lang",
        "audio": "audio speech sound",
    },
    "half": {"encoder": "encoder", "decoder": "decoder"},
    "role": {"thinker": "thinker", "talker": "talker"},
}
"""A map from each kind of part to the parts of this kind. Each part is mapped to the words that name it in a prefix.

The tensors of two parts of one kind may have the same shapes, so only these words tell the parts apart.
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
    """Whether the prefix `on` may replace the prefix `off` in a name.

    The last words of the prefixes must differ, and the prefixes must not name different parts or different families.

    For example, `roberta.` may not replace `bert.`, and an encoder's prefix may not replace a decoder's.
    """
    ours, theirs = ({word for word in prefix.split(".") if is_family(word)} for prefix in (off, on))
    if (ours and theirs and ours.isdisjoint(theirs)) or on.split(".")[-2] == off.split(".")[-2]:
        return False
    ours, theirs = ({word for word in re.split(r"[._]", prefix) if word in _KIND} for prefix in (off, on))
    kinds = [
        ({_KIND[word][1] for word in words if _KIND[word][0] == kind}) for kind in _KINDS for words in (ours, theirs)
    ]
    # `model.` may not replace `model.vision_tower.encoder.`, because `model.` is the prefix of the text part. But a
    # tower's prefix may lose words if it still names the tower: `model.video_tower.` may replace
    # `model.video_tower.vision_model.`.
    kept = {*off.split(".")} & {*on.split(".")} - {"", "model", "transformer"}
    if kinds[0] - {"text"} and not kinds[1] and not kept:
        return False
    # A decoder's inner encoder is not the encoder: ViT-MAE has `vit.encoder.` and `decoder.decoder_encoder.`.
    half, new_half = parts_of("half", off), parts_of("half", on)
    if half and new_half - half:
        return False
    return not any(one and other and one.isdisjoint(other) for one, other in zip(kinds[::2], kinds[1::2], strict=True))


def related(off: str, on: str) -> bool:
    """Whether two prefixes share a word or name the same part, or one has no words except `model` and `transformer`."""
    ours, theirs = ({*prefix.split(".")} - {"", "model", "transformer"} for prefix in (off, on))
    alike = any(parts_of(kind, off) & parts_of(kind, on) for kind in _KINDS)
    return not ours or not theirs or alike or not ours.isdisjoint(theirs)


def keeps_parts(off: str, on: str) -> bool:
    """Whether the change of prefix from `off` to `on` adds no words, or drops at most `model` and `transformer`."""
    ours, theirs = off.split(".")[:-1], on.split(".")[:-1]
    dropped = {word for word in ours if word not in theirs}
    return dropped <= {"model", "transformer"} or all(word in ours for word in theirs)


# List the weights that a base stores as [in, out], by the `model_type` of its config.
#
# The list is needed for square weights, whose shape does not show the layout. The sources are the uses of `Conv1D` in
# transformers' modelling files of these families. Experts that are stored as `[expert, in, out]` are not in the list:
# their entries in spec/architectures have `transposed`.


_CONV1D = ("*.c_attn", "*.c_proj", "*.c_fc", "*.q_attn")

IN_OUT = {
    "gpt2": _CONV1D,
    "openai-gpt": _CONV1D,
    "imagegpt": _CONV1D,
    "decision_transformer": _CONV1D,
    "clvp": ("*.mlp.c_fc", "*.mlp.c_proj"),
    "clvp_decoder": _CONV1D,
}
"""A map from a model_type to globs of the modules whose weights are stored as [in, out]."""


def is_conv1d_name(path: str) -> bool:
    """Whether a module has one of the names that transformers gives to layers with [in, out] weights."""
    return any(fnmatchcase(f".{path}", glob) for glob in _CONV1D)


def stored_in_out(path: str, config: Mapping[str, object] | None) -> bool | None:
    """Whether the base stores the weight of the module `path` as [in, out].

    Return None if `IN_OUT` does not list the base's model_type, and the family's file lists no weight as [in, out].

    The encoder and the decoder of an encoder-decoder model may be of two families. Each has its own config inside the
    base's config, and the config of the half to which `path` belongs is used. The same applies to the text model of a
    model that reads images, such as LLaVA.
    """
    globs = IN_OUT.get(str((config or {}).get("model_type")))
    if globs is not None:
        return any(fnmatchcase(path, glob) for glob in globs)
    inside, part = part_config(path, config)
    if part is not config:
        known = stored_in_out(inside, part)
        # transformers stores only the weights in `IN_OUT` as [in, out], so all layers of its other families are
        # [out, in]. A family without a file may have code of its own.
        return False if known is None and architecture_of(part) and not is_conv1d_name(path) else known
    text = (config or {}).get("text_config")
    family = architecture_of(config)
    if isinstance(text, Mapping) and str(text.get("model_type")) in IN_OUT and family and not is_conv1d_name(path):
        return False
    ends = () if family is None else _transposed(family)
    return any(shape_of(path).endswith(end) for end in ends) if ends else None


def part_config(path: str, config: Mapping[str, object] | None) -> tuple[str, Mapping[str, object] | None]:
    """Find the encoder, the decoder or the text model to which the module `path` belongs.

    Returns:
        the path inside this part, and the part's config inside `config`. If the module belongs to no such part, `path`
        and `config`. The text model's path is not shortened. A text model counts only if `IN_OUT` has its model_type.
    """
    half, _, rest = path.partition(".")
    part = (config or {}).get(half) if half in ("encoder", "decoder") else None
    if isinstance(part, Mapping) and "model_type" in part:
        return rest, part
    text = (config or {}).get("text_config")
    if isinstance(text, Mapping) and str(text.get("model_type")) in IN_OUT and "language_model" in path.split("."):
        return path, text
    return path, config


@cache
def _transposed(family: Architecture) -> tuple[str, ...]:
    """For each transposed tensor of a family, return the end of its name, from the last `#` on.

    `#` stands for a number; see `shape_of`.
    """
    places = (family.place(weight, naming) for weight in family.record.weights for naming in ("hub", "transformers5"))
    names = (shape_of(HOLE.sub("0", place.name)) for place in places if place is not None and place.transposed)
    return tuple(dict.fromkeys(name[name.rfind("#") :] for name in names))
