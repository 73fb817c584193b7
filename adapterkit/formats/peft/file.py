"""The parsed file: settings, keys, tensors, the updates that decoders yield, and details that only the writer needs."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from sys import intern
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec

from ...core.adapter import Adapter, Target
from ...core.updates import Update
from ...errors import SAVE_WITH_PEFT, Malformed
from ...io.lazy import Lazy
from ...methods import METHODS
from ...naming.binding.fitting import live_shape
from .._format import FORMULA
from .._kit import leftovers
from .families import FAMILIES, Family, family_of_type
from .patterns import first_match, matches, unwrapped

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Leaf, Shape
    from ...io.strict_json import JsonValue

# Define the data that all decoders share: keys, the parsed tensor file, and the updates that decoders yield.


_WRAPPERS = re.compile(r"\.(?:base_layer|token_adapter)(?=\.|$)")
_OUTERMOST = re.compile(r"(?:\.base_layer)*$")


class Key(NamedTuple):
    """A parsed key of a tensor file.

    In `base_model.model.h.0.attn.lora_A.weight`, the stem is `h.0.attn`, the part is `lora_A`, the leaf is `weight`.

    Attributes:
        text: the complete key.
        stem: the text between the prefix and the part, including the names that wrappers insert, such as `base_layer`.
            For a parameter of the base, the stem is the parameter's whole path. For a tensor that all modules share,
            the stem is empty.
        part: the kind of tensor, such as `lora_A` or `ia3_l`; empty for a parameter of the base.
        leaf: `weight` or `bias` if the key ends with this name; otherwise empty.
        adapter: the adapter's name, or None if the key does not contain it.
        copy: `modules_to_save` or `original_module` if the key contains one of these names; otherwise empty.
    """

    text: str
    stem: str
    part: str = ""
    leaf: str = ""
    adapter: str | None = None
    copy: str = ""

    @property
    def word(self) -> str:
        """Return the part and the leaf, joined by a dot, such as `lora_A.weight`."""
        return f"{self.part}.{self.leaf}" if self.leaf else self.part

    @property
    def path(self) -> str:
        """Return the module's dotted path in the base, without the names that PEFT's wrappers insert."""
        return _WRAPPERS.sub("", self.stem) if self.wrapped else self.stem

    @property
    def wrapped(self) -> bool:
        """Whether the stem contains a name that a PEFT wrapper inserts: `base_layer` or `token_adapter`."""
        return ".base_layer" in self.stem or ".token_adapter" in self.stem

    @property
    def depth(self) -> int:
        """Return how many other wrappers enclose the wrapper that stores this key's tensor.

        PEFT wraps a module once for each parameter that it adapts, so the wrappers are nested. Each enclosing wrapper
        adds `.base_layer` to the end of the stem.
        """
        if not self.wrapped:
            return 0
        match = _OUTERMOST.search(self.stem)
        return 0 if match is None else match.group().count(".base_layer")

    @property
    def module(self) -> str:
        """Return the path of the module that PEFT wraps.

        If the stem contains a wrapped module inside another wrapped module, return the path of the outermost one.
        For the output projection of an `nn.MultiheadAttention`, return the path of this `nn.MultiheadAttention`.
        """
        if not self.wrapped:
            return self.stem
        inside = _OUTERMOST.sub("", self.stem)
        return _WRAPPERS.sub("", inside.partition(".base_layer.")[0])


@dataclass(frozen=True, eq=False)
class File:
    """A parsed tensor file.

    The writer fills `parameters`, `known` and `omitted` if it decodes its own output to check it. Otherwise, these
    three maps are empty.

    Attributes:
        settings: the settings in the config.
        tensors: a map from parsed keys to tensors, in the file's order.
        base: the base, or None.
        compat: the caller's `compat`; see `Format`.
        parameters: a map from the stems of keys to the paths of their targets. The writer provides this map, because
            the file may not show which parameter of a module a key belongs to.
        known: a map from the path of a target to the update that the writer stores for this target. The map contains
            only updates of methods that have a family.
        omitted: a map from `Key.word` to tensors that all modules share and that the writer leaves out of the file.
    """

    settings: PeftSettings
    tensors: Mapping[Key, Lazy]
    base: Checkpoint | None = None
    compat: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    known: Mapping[str, Update] = field(default_factory=dict)
    omitted: Mapping[str, Lazy] = field(default_factory=dict)

    @property
    def by_formula(self) -> bool:
        """Whether to use the paper's formula instead of PEFT's forward, if the two differ."""
        return self.compat == FORMULA

    def groups(self, parts: Iterable[str]) -> dict[str, dict[tuple[str, str], Key]]:
        """Return the keys whose part is in `parts`, as `stem -> (part, leaf) -> key`."""
        parts = frozenset(parts)
        groups_by_stem: dict[str, dict[tuple[str, str], Key]] = {}
        for key in self.tensors:
            if key.part in parts:
                group = groups_by_stem.get(key.stem)
                if group is None:
                    group = groups_by_stem[key.stem] = {}
                group[key.part, key.leaf] = key
        return groups_by_stem

    def modules(self, parts: Iterable[str]) -> dict[str, dict[str, Key]]:
        """Return the keys whose `word` matches a pattern in `parts`, as `stem -> word -> key`.

        In a pattern, `*` matches one or more characters other than dots. The result does not include the keys of
        tensors that all modules share.
        """
        wanted = re.compile("|".join(re.escape(part).replace(r"\*", "[^.]+") for part in parts) or "(?!)")
        modules_by_stem: dict[str, dict[str, Key]] = {}
        for key in self.tensors:
            if key.stem and wanted.fullmatch(key.word):
                modules_by_stem.setdefault(key.stem, {})[key.word] = key
        return modules_by_stem

    @cached_property
    def shared(self) -> dict[str, Key]:
        """Return a map from `Key.word` to the key, for all tensors that all modules share."""
        return {key.word: key for key in self.tensors if not key.stem}

    def attentions(self) -> set[str]:
        """Return the path of each `nn.MultiheadAttention` whose output projection is adapted.

        In such a module, PEFT also adapts the input projection.
        """
        wrapped = (key for key in self.tensors if key.wrapped and key.part.startswith("lora_"))
        return {key.module for key in wrapped if key.module != key.path}

    def base_shape(self, name: str) -> Shape | None:
        """Call the function `base_shape` with the file's base; return None if there is no base."""
        return None if self.base is None else base_shape(self.base, name)


@dataclass(frozen=True, slots=True, eq=False)
class DecodedUpdate:
    """An update that a decoder found in a file.

    Attributes:
        path: the path of the update's target.
        update: the update. Its tensors are the tensors of the file, possibly reshaped.
        keys: a map from the update's fields to the keys of the fields' tensors.
        layout: the target's layout, as far as the file shows it.
        rows: the rows of the target, or None for all rows.
    """

    path: str
    update: Update
    keys: Mapping[str, Key]
    layout: str = "out *in"
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A key whose tensor has no effect. It is kept so that the writer can write the tensor again."""

    key: Key


def base_shape(base: Checkpoint, name: str) -> Shape | None:
    """Return the shape that the tensor `name` has in the loaded model; None if the shape is unknown.

    If the base has a tensor `name`, return its shape. If it has none, but exactly one tensor has a name that ends with
    `.name`, return the shape of that tensor. In all other cases, compute the shape from the base's tensors with the
    table of the model family, because the loaded model may split or join tensors of the base.
    """
    if name in base.tensors:
        return base.tensors[name].shape
    longer = [other for other in _by_ending(base).get(_ending(name), ()) if other.endswith(f".{name}")]
    return base.tensors[longer[0]].shape if len(longer) == 1 else live_shape(base, name)


def _ending(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])


@lru_cache(maxsize=1)
def _by_ending(base: Checkpoint) -> dict[str, list[str]]:
    """Return a map from each ending to the names of the base's tensors that have this ending.

    An ending is the last component of a name, or the last two: `weight` or `q_proj.weight`.
    """
    names_by_ending: dict[str, list[str]] = {}
    for name in base.tensors:
        two = _ending(name)
        for ending in {two, two.rpartition(".")[2]}:
            names_by_ending.setdefault(ending, []).append(name)
    return names_by_ending


Findings = Iterator[DecodedUpdate | Kept]


def make(method: str, leaves: Mapping[str, Leaf], **attributes: float) -> Update:
    """Create an update of the method whose name is `method`, without loading lazy tensors."""
    return METHODS[method](**leaves, **attributes)


# Parse keys: `<prefix><module>.<part>[.<adapter name>][.weight|.bias]`, or `<prefix><parameter of the base>`.
#
# A tensor that all adapted modules share has the key `base_model.<part>` or `<part>`. PEFT adapts a module by wrapping
# it, and a wrapper may insert a name into the path. If several parameters of a module are adapted, their wrappers are
# nested, and each enclosing wrapper inserts `base_layer`. The other names are `token_adapter` and
# `modules_to_save.<adapter name>`. `modules_to_save.<adapter name>` occurs only in state dicts that users saved without
# PEFT's `get_peft_model_state_dict`.


PREFIX = "base_model.model."
LATENT = "lora_latent_mapping"
"""`Key.part` in the key of LoRA-XS's R, which is the weight of the module `default_lora_latent_mapping`.

PEFT removes `.default` from the key, because it mistakes `default` for the adapter's name.
"""
SHARED_PREFIX = "base_model."

_SAVED = re.compile(r"(?P<stem>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<rest>.+)", re.DOTALL)
_COPY = re.compile(r"(?P<stem>.+)\.(?P<copy>modules_to_save|original_module)\.(?P<rest>weight|bias)", re.DOTALL)
"""Matches the keys of the extra copies of a module that PEFT saves with `save_embedding_layers`.

Such keys have no adapter name.
"""
_LATENT = re.compile(r"(?P<stem>.+?)(?:\.default)?_lora_latent_mapping\.weight", re.DOTALL)
_PLAIN = re.compile(
    rf"{re.escape(PREFIX)}(?P<stem>.+)\.(?P<part>(?:lora|ia3|ln_tuning|trainable_tokens)_\w+)(?:\.(?P<leaf>weight|bias))?",
    re.DOTALL,
)
"""Matches the most common keys. Parsing them needs no patterns of families, so it does not import the families."""


def prefix_of(peft_type: str) -> str:
    """Return the prefix that PEFT writes before the base's module names in a file with this `peft_type`."""
    family = family_of_type(peft_type)
    return PREFIX if family is None else family.prefix


def parse_keys(tensors: Mapping[str, Lazy], usual: str = PREFIX) -> tuple[str, dict[Key, Lazy]]:
    """Parse all keys. Return their prefix, and a map from parsed keys to tensors, in the file's order.

    Args:
        tensors: a map from the file's keys to its tensors.
        usual: the prefix that PEFT writes. Either all keys or none must begin with this prefix. The keys of tensors
            that all modules share are exceptions: they may always lack the prefix.

    Raises:
        Malformed: only some keys begin with the prefix, or the keys belong to several adapters.
    """
    prefix = usual if any(text.startswith(usual) and not _stands_alone(text) for text in tensors) else ""
    for text in tensors:
        if (not text.startswith(prefix) or text == prefix) and not _stands_alone(text):
            raise Malformed(
                f"this key does not begin with {usual!r}, but other keys do", where=text, cure=SAVE_WITH_PEFT
            )
    keys = {parse_key(text, prefix): tensor for text, tensor in tensors.items()}
    _check_names(keys)
    return prefix, keys


def _stands_alone(text: str) -> bool:
    """Whether a key belongs to a tensor that all modules share. Such a key needs no prefix."""
    return _PLAIN.fullmatch(text) is None and _shared().fullmatch(text) is not None


@lru_cache(maxsize=1 << 14)
def parse_key(text: str, prefix: str) -> Key:
    """Parse one key. Results are cached, because the writer's check parses the keys that were just written."""
    if prefix == PREFIX and (match := _PLAIN.fullmatch(text)):
        # Intern the strings to save memory: all keys of a module have the same stem, and a file has only a few parts.
        return Key(text, intern(match["stem"]), intern(match["part"]), match["leaf"] or "")
    return parse_by_families(text, prefix)


def parse_by_families(text: str, prefix: str) -> Key:
    """Parse one key. Compare it with the key patterns of all families."""
    if match := _shared().fullmatch(text):
        names, leaf = _tail(match["rest"])
        return Key(text, "", match["part"] + names[1], leaf, names[0])
    body = text[len(prefix) :]
    if LATENT in body and (match := _LATENT.fullmatch(body)):
        return Key(text, match["stem"], LATENT, "weight")
    if match := _part().fullmatch(body):
        names, leaf = _tail(match["rest"])
        return Key(text, match["stem"], match["part"] + names[1], leaf, names[0])
    if match := _SAVED.fullmatch(body):
        return Key(text, f"{match['stem']}.{match['rest']}", adapter=match["name"], copy="modules_to_save")
    if match := _COPY.fullmatch(body):
        return Key(text, f"{match['stem']}.{match['rest']}", copy=match["copy"])
    return Key(text, body)


@cache
def _part() -> re.Pattern[str]:
    part_pattern = _words(pattern for f in _families() for pattern in f.parts)
    words = rf"(?:lora|ia3|ln_tuning|trainable_tokens)_\w+|{part_pattern}"
    return re.compile(rf"(?P<stem>.+)\.(?P<part>{words})(?P<rest>(?:\.[^.]+)*)", re.DOTALL)


@cache
def _shared() -> re.Pattern[str]:
    words = _words(pattern for f in _families() for pattern in f.shared)
    return re.compile(rf"(?:{re.escape(SHARED_PREFIX)})?(?P<part>{words})(?P<rest>(?:\.[^.]+)*)")


@cache
def _family_part() -> re.Pattern[str]:
    return re.compile(_words(pattern for f in _families() for pattern in (*f.parts, *f.shared)))


def _families() -> Iterable[type[Family]]:
    return FAMILIES.values()


def _words(patterns: Iterable[str]) -> str:
    """Return a regular expression that matches a key's part if one of `patterns` matches it.

    In a pattern, `*` matches one or more characters other than dots. The expression tries longer patterns first,
    because one pattern may be the beginning of another. If `patterns` is empty, the expression matches nothing.
    """
    bare = sorted({re.sub(r"\.(?:weight|bias)$", "", pattern) for pattern in patterns}, key=len, reverse=True)
    return "|".join(re.escape(pattern).replace(r"\*", "[^.]+") for pattern in bare) or "(?!)"


def _tail(rest: str) -> tuple[tuple[str | None, str], str]:
    """Split a key's ending, such as `.default.0.bias`, into the adapter's name, the rest of the part, and the leaf."""
    names = rest.split(".")[1:]
    leaf = names.pop() if names and names[-1] in ("weight", "bias") else ""
    adapter = names.pop(0) if names else None
    return (adapter, "".join(f".{name}" for name in names)), leaf


def _check_names(keys: Iterable[Key]) -> None:
    """Check that the keys of adapted modules all have the same adapter name, or all have none.

    The keys of the base's own parameters are not checked, because these keys may lack the adapter name.
    """
    named: dict[str | None, Key] = {}
    for key in keys:
        if key.part in _NAMED or (key.part and _family_part().fullmatch(key.part)):
            named.setdefault(key.adapter, key)
    if len(named) > 1:
        first, second = list(named.values())[:2]
        raise Malformed(
            f"this key and {first.text} belong to different adapters",
            where=second.text,
            cure="Save each adapter in its own file",
        )


_NAMED = (
    "ia3_l",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "trainable_tokens_delta",
)

# Record the details of a PEFT file that an adapter's fields cannot store. The writer needs them to write the same file
# again.


FORMAT = "peft"

Size = Annotated[int, msgspec.Meta(ge=0)]


class PeftHints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The details of a PEFT file that the writer needs to write the same file again.

    Attributes:
        config: the config of the source file.
        targets: a fingerprint of the source's targets. If the adapter's targets still have this fingerprint, the lists
            of modules in the config are still correct.
        prefix: the prefix of all keys.
        compat: the `compat` with which the source was read. Reading the written file with the same `compat` must yield
            the same adapter.
        experts_order: the layout in which stacked experts are written; None for the layout of current PEFT.
        keys: a map from the key that the writer would choose to the key in the source file. The map contains only keys
            for which the two differ, or for which the writer's choice is uncertain.
        shapes: a map from the source file's keys to the shapes of their tensors. The map contains only tensors that
            the writer would store in another shape. Both shapes have the same number of elements.
    """

    config: dict[str, Any] = {}
    targets: str = ""
    prefix: str = PREFIX
    compat: str | None = None
    experts_order: str | None = None
    keys: dict[str, str] = {}
    shapes: dict[str, list[Size]] = {}


def hints_of(adapter: Adapter) -> PeftHints:
    """Return the hints of an adapter that was read from PEFT's format; empty hints for any other adapter.

    Raises:
        Malformed: the hints are damaged.
    """
    return leftovers(adapter, FORMAT, PeftHints)


def fingerprint(targets: Iterable[Target]) -> str:
    """Return the sha256 of the targets' paths and rows."""
    return hashlib.sha256("\n".join(sorted(map(str, targets))).encode()).hexdigest()


# Define the config fields that change the meaning of the tensors, with PEFT's defaults.


RESIDUAL = ("olora", "pissa")
"""With these values of `init_lora_weights`, PEFT subtracts the adapter's initial change from the base.

adapterkit can compute this change exactly. adapterkit's methods for such adapters have the same names as the values.
"""

Number = Annotated[int, msgspec.Meta(ge=-(1 << 53), le=1 << 53)] | float
Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Tokens = list[Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]]


class Kasa(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kasa_config`: the weights of the terms that KaSA adds to the loss in training."""

    beta: float = 1e-4
    gamma: float = 1e-3


class BlockSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`use_bdlora`: which modules have a block-diagonal A, and which have a block-diagonal B.

    Each of the two lists selects the modules whose names contain at least one string in the list.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: Rank = 1
    match_strict: bool = True

    def factor(self, name: str) -> str:
        """Return `A` or `B`, whichever is block-diagonal in the module `name`; empty if neither is."""
        named = {"A": self.target_modules_bd_a, "B": self.target_modules_bd_b}
        matching = [factor for factor, words in named.items() if any(word in name for word in words or ())]
        if len(matching) > 1:
            why = "both target_modules_bd_a and target_modules_bd_b select this module"
            raise Malformed(why, where=name, cure=SAVE_WITH_PEFT)
        return matching[0] if matching else ""


class Router(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`arrow_config`: how Arrow selects experts, and the experts' names. Each expert is a separate adapter.

    PEFT finds the router's vectors by power iteration from a random start, so the config has a seed. adapterkit
    computes the vectors exactly.
    """

    top_k: Rank = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None


class PeftSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The config fields that change the model's outputs, with PEFT's defaults.

    `method_fields` contains the fields that only one family reads.
    """

    peft_type: str
    r: Rank = 8
    lora_alpha: Number = 8
    use_rslora: bool | None = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Number] | None = None
    use_dora: bool | None = False
    lora_bias: bool | None = False
    fan_in_fan_out: bool | None = False
    init_lora_weights: bool | str | None = True
    kasa_config: Kasa | None = None
    use_bdlora: BlockSettings | None = None
    alora_invocation_tokens: Tokens | None = None
    arrow_config: Router | None = None
    enable_lora: list[bool] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: Tokens | dict[str, Tokens] | None = None
    token_indices: Tokens | None = None
    feedforward_modules: list[str] | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    lora_B_layout: Literal["rank_major", "grouped_by_expert"] | None = None
    peft_version: str | None = None
    auto_mapping: Any = None
    method_fields: Any = None

    @property
    def unsloth(self) -> bool:
        """Whether the config shows that Unsloth wrote the file, or that the base is one of Unsloth's copies."""
        return written_by_unsloth(
            {"auto_mapping": self.auto_mapping, "base_model_name_or_path": self.base_model_name_or_path}
        )

    def before(self, release: tuple[int, int]) -> bool:
        """Whether a PEFT release older than `release` wrote the file; False if the config has no PEFT version."""
        return parse_version(self.peft_version) < release

    @property
    def residual(self) -> str:
        """Return `olora` or `pissa` if PEFT subtracted the adapter's initial change from the base; otherwise empty."""
        word = self.init_lora_weights
        return word.lower() if isinstance(word, str) and word.lower() in RESIDUAL else ""

    def rank(self, name: str) -> int:
        """Return the rank of the module or parameter `name`."""
        return first_match(self.rank_pattern or {}, name, self.r)

    def scaling(self, name: str) -> float:
        """Return the scaling of B @ A for the module or parameter `name`."""
        alpha, rank = first_match(self.alpha_pattern or {}, name, self.lora_alpha), self.rank(name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def written_by_unsloth(config: Mapping[str, JsonValue]) -> bool:
    """Whether a config shows that Unsloth wrote the file, or that the base is one of Unsloth's copies."""
    mapping = config.get("auto_mapping")
    marked = isinstance(mapping, Mapping) and bool(mapping.get("unsloth_fixed"))
    return marked or str(config.get("base_model_name_or_path") or "").startswith("unsloth/")


def parse_version(version: object) -> tuple[int, ...]:
    """Return the first two numbers of a PEFT version, such as (0, 18).

    If the version is missing or cannot be parsed, return a tuple that compares as greater than every release.
    """
    match = re.match(r"(\d+)\.(\d+)", version if isinstance(version, str) else "")
    return (int(match[1]), int(match[2])) if match else (1 << 30,)


def names_module(target_modules: Iterable[str] | str | None, path: str) -> bool:
    """Whether `target_modules` selects a module.

    If `target_modules` is a string, it is a regular expression that must match the whole path. If it is a list, the
    path must equal an item of the list, or end with a dot and an item.
    """
    path = unwrapped(path)
    if isinstance(target_modules, str):
        return matches(target_modules, path, whole=True)
    return any(path == name or path.endswith(f".{name}") for name in target_modules or ())
