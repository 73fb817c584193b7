"""Families that mix several factors: Lily, Poly and X-LoRA.

Lily: `lily_A.weight` [r, in], `lily_B.weight` [num_B * r, out], `lily_router.weight` [num_B, r].

Modules share B if their weights have equal shapes and their paths end with the same entry of `target_modules`. Among
the modules that share one B, each run of `stride_A` consecutive modules also shares one A. The file contains a copy of
a shared tensor for each module. The reader replaces equal copies by one tensor object.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ....errors import SAVE_WITH_PEFT, USE_ITS_CONFIG, Malformed, ShapeMismatch, Unsupported
from ....io.arrange import item
from ....io.lazy import Lazy, as_lazy
from ....methods.lily import Lily
from ....methods.poly import Poly
from ....methods.xlora import XLoRA
from ..file import DecodedUpdate, File, Key, make
from . import Family, MethodFields, Rank, check_parts, check_rank, check_stem, minority

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue
    from ..file import Findings, PeftSettings

FIELDS = {"lily_A.weight": "A", "lily_B.weight": "B", "lily_router.weight": "router"}
"""A map from the endings of keys to fields of the update."""


class LilyFields(MethodFields, frozen=True, kw_only=True):
    """The sizes of the factors, the number of modules that share one A, and the scaling."""

    r: Rank = 32
    num_B: Rank = 2
    stride_A: Rank = 1
    scaling: float = 1.0


class LilyFamily(Family):
    """The family of the peft_type LILY."""

    name = "lily"
    peft_type = "LILY"
    method = Lily
    parts = tuple(FIELDS)
    method_fields: ClassVar[type[MethodFields]] = LilyFields
    read: ClassVar[Mapping[str, str]] = {
        "num_B": "number of factors B in each module; a router mixes them",
        "scaling": "factor that multiplies the change",
        "stride_A": "number of consecutive modules that share one A",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True, "stride_A": 1}

    @classmethod
    def decode(cls, file: File) -> Findings:
        decoded = []
        for stem, keys in file.modules(cls.parts).items():
            check_stem(stem, next(iter(keys.values())))
            decoded.append(cls.decode_keys(file, keys))
        yield from _shared(decoded, file.settings)

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        check_parts(keys, FIELDS)
        config, tensors = file.settings.method_fields, {FIELDS[part]: file.tensors[key] for part, key in keys.items()}
        check_rank(keys["lily_A.weight"], tensors["A"], config.r)
        check_rank(keys["lily_B.weight"], tensors["B"], config.r * config.num_B)
        tensors["B"] = tensors["B"].reshape(config.num_B, config.r, tensors["B"].shape[1])
        if tensors["router"].shape != (config.num_B, config.r):
            wanted = [config.num_B, config.r]
            why = f"the shape is {list(tensors['router'].shape)}, but num_B and r in the config need {wanted}"
            raise ShapeMismatch(why, where=keys["lily_router.weight"].text, cure=USE_ITS_CONFIG)
        path = keys["lily_A.weight"].path
        return DecodedUpdate(
            path, make("lily", tensors, scaling=config.scaling), {FIELDS[part]: key for part, key in keys.items()}
        )

    @classmethod
    def encode(cls, update: Lily) -> dict[str, tuple[str, Lazy]]:
        leaves = {field: as_lazy(leaf) for field, leaf in update.tensors.items()}
        leaves["B"] = leaves["B"].reshape(-1, leaves["B"].shape[-1])
        return {field: (part, leaves[field]) for part, field in FIELDS.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        return {"num_B": some.B.shape[0], "r": some.A.shape[0], "scaling": some.scaling}

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        sizes = {t: (u.scaling, *u.router.shape) for t, group in updates.items() for u in group if isinstance(u, Lily)}
        for target in minority(sizes):
            yield target, "its rank, its scaling or its number of factors B differs from that of most lily updates"


def _shared(decoded: list[DecodedUpdate], settings: PeftSettings) -> Iterator[DecodedUpdate]:
    """Yield the updates. If modules share a tensor A or B, replace its equal copies by one tensor object.

    Raises:
        Malformed: the file has more distinct tensors A or B for a group of modules than PEFT creates for this group.
            PEFT would load only the last copy of a shared tensor.
    """
    groups: dict[Any, list[DecodedUpdate]] = defaultdict(list)
    for each in decoded:
        tensors = each.update.tensors
        groups[_word(each.path, settings), tensors["A"].shape[1], tensors["B"].shape[2]].append(each)
    first: dict[Any, Any] = {}
    for group, members in groups.items():
        for field, allowed in (("A", math.ceil(len(members) / settings.method_fields.stride_A)), ("B", 1)):
            several: dict[bytes, Any] = {}
            for each in members:
                leaf = as_lazy(each.update.tensors[field])
                kind = sha256(leaf.fetch()).digest()
                first[id(leaf)] = several.setdefault(kind, leaf)
                if len(several) > allowed:
                    why = (
                        f"PEFT creates {allowed} {field} for modules that match {group[0]!r}, but the file has more "
                        f"than {allowed} different {field} for these modules"
                    )
                    raise Malformed(why, where=each.keys[field].text, cure=SAVE_WITH_PEFT)
    yield from (replace(each, update=each.update.map(lambda leaf: first.get(id(leaf), leaf))) for each in decoded)


def _word(path: str, settings: PeftSettings) -> str:
    """Return the entry of `target_modules` that `path` ends with; the last such entry if there are several.

    PEFT groups modules by this entry. If `target_modules` is a string, return this string. If `path` ends with none of
    the entries, return `path`.
    """
    words = settings.target_modules
    if isinstance(words, str):
        return words
    return next((word for word in reversed(words or ()) if path.endswith(word)), path)


# Poly: `poly_lora_A` [splits, skills, in / splits, r], `poly_lora_B` [splits, skills, r, out / splits], and
# `poly_router.module_logits`.


POLY_FIELDS = {"poly_lora_A": "A", "poly_lora_B": "B", "poly_router.module_logits": "logits"}
"""A map from the endings of keys to fields of the update."""


class PolyFields(MethodFields, frozen=True, kw_only=True):
    """The rank, and the numbers of tasks, skills and splits."""

    r: Rank = 8
    n_tasks: Rank = 1
    n_skills: Rank = 4
    n_splits: Rank = 1
    poly_type: str = "poly"


class PolyFamily(Family):
    """The family of the peft_type POLY."""

    name = "poly"
    peft_type = "POLY"
    method = Poly
    parts = tuple(POLY_FIELDS)
    method_fields: ClassVar[type[MethodFields]] = PolyFields
    read: ClassVar[Mapping[str, str]] = {
        "n_skills": "number of skills (pairs of factors) in each split",
        "n_splits": "number of splits (blocks of channels); each split mixes its skills separately",
        "n_tasks": "number of tasks",
        "poly_type": "must be poly, which is the only supported router",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True, "poly_type": "poly", "task_type": "CAUSAL_LM"}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        check_parts(keys, POLY_FIELDS)
        config, some = file.settings.method_fields, keys["poly_lora_A"]
        if config.poly_type != "poly":
            why = f"the router {config.poly_type[:60]!r} is not supported, only 'poly'"
            raise Unsupported(why, where="poly_type", cure="Run the adapter with PEFT")
        update: Any = make("poly", {POLY_FIELDS[part]: file.tensors[key] for part, key in keys.items()})
        if (sizes := _sizes(update)) != (config.r, config.n_tasks, config.n_skills, config.n_splits):
            why = f"the tensors have r, n_tasks, n_skills and n_splits = {sizes}, but the config has other values"
            raise ShapeMismatch(why, where=some.text, cure=USE_ITS_CONFIG)
        return DecodedUpdate(some.path, update, {POLY_FIELDS[part]: key for part, key in keys.items()})

    @classmethod
    def encode(cls, update: Poly) -> dict[str, tuple[str, Lazy]]:
        return {field: (part, as_lazy(update.tensors[field])) for part, field in POLY_FIELDS.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        sizes = _sizes(next(iter(cls.of_it(updates).values())))
        return dict(zip(("r", "n_tasks", "n_skills", "n_splits"), sizes, strict=True))

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        sizes = {t: _sizes(u) for t, group in updates.items() for u in group if isinstance(u, Poly)}
        for target in minority(sizes):
            yield target, "its rank or its number of tasks, skills or splits differs from that of most poly updates"


def _sizes(update: Poly) -> tuple[int, int, int, int]:
    """Return the rank, and the numbers of tasks, skills and splits, from the tensors' shapes.

    Raises:
        ShapeMismatch: the shapes of the tensors contradict each other.
    """
    r, tasks, skills, splits = (cast(int, update.dims()[name]) for name in ("r", "tasks", "skills", "splits"))
    return r, tasks, skills, splits


# X-LoRA: a classifier with the keys `internal_xlora_classifier.layers.<i>.weight` and `.bias`. The index i counts
# linear layers, activations and dropouts.
#
# The experts are separate adapters. The config contains the experts' paths. adapterkit keeps these paths as text and
# never opens them.


LAYERS = "internal_xlora_classifier.layers"


class XLoRAFields(MethodFields, frozen=True, kw_only=True):
    """The config fields that determine the classifier's layers, and how the classifier mixes the experts."""

    hidden_size: Rank = 4096
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    global_scaling_weight: float = 1.0
    layerwise_scalings: bool = False
    scaling_pass_value: float = 0.0
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    xlora_depth: Rank = 1
    xlora_dropout_p: float = 0.2


class XloraFamily(Family):
    """The family of the peft_type XLORA."""

    name = "xlora"
    peft_type = "XLORA"
    method = XLoRA
    shared = (f"{LAYERS}.*.weight", f"{LAYERS}.*.bias")
    names_modules = False
    method_fields: ClassVar[type[MethodFields]] = XLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "adapters": "a map from each expert's name to its path, in the order of the experts; the paths are not opened",
        "enable_softmax": "whether the experts' shares are a softmax of the logits",
        "enable_softmax_topk": "whether a softmax is applied to the nonzero shares",
        "global_scaling_weight": "factor on the change",
        "hidden_size": "width of the classifier's input",
        "layerwise_scalings": "whether each layer has its own logits",
        "scaling_pass_value": "must be 0; otherwise the experts also change the forward pass that computes the "
        "classifier's input",
        "softmax_temperature": "divisor of the logits",
        "top_k_lora": "how many of the largest shares are kept; the other shares become 0",
        "xlora_depth": "number of linear layers in the classifier",
        "xlora_dropout_p": "if it is above 0, the layer indices in the keys also count dropouts",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "use_trainable_adapters": "training only",
        "xlora_size": "width of the classifier's hidden layers; the tensors show it",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"xlora_dropout_p": 0.0, "task_type": "CAUSAL_LM"}

    @classmethod
    def decode(cls, file: File) -> Findings:
        config = file.settings.method_fields
        if config.scaling_pass_value:
            why = (
                "scaling_pass_value must be 0; otherwise the experts also change the forward pass that computes the "
                "classifier's input"
            )
            raise Unsupported(why, where="scaling_pass_value", cure="Run the adapter with PEFT")
        words = [f"{LAYERS}.{number}" for number in _numbers(config.xlora_depth, config.xlora_dropout_p > 0)]
        lost = next((word for word in words if f"{word}.weight" not in file.shared), None)
        if lost:
            why = "the file lacks a layer of the classifier; PEFT may omit a layer whose number is an expert's name"
            raise Malformed(
                why,
                where=f"{lost}.weight",
                cure="Save the model's state dict with the PEFT release that the adapter was trained with",
            )
        check_parts(file.shared, [f"{word}.{leaf}" for word in words for leaf in ("weight", "bias")])
        yield cls.decode_keys(file, {word: file.shared[f"{word}.weight"] for word in words})

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        config, pairs = (
            file.settings.method_fields,
            [[file.shared[f"{w}.{leaf}"] for leaf in ("weight", "bias")] for w in keys],
        )
        fields: dict[str, Key] = dict(zip(("last", "last_bias"), pairs[-1], strict=True))
        tensors: dict[str, Lazy] = {field: file.tensors[key] for field, key in fields.items()}
        if len(pairs) > 1:
            fields |= dict(zip(("first", "first_bias"), pairs[0], strict=True))
            tensors |= {field: file.tensors[fields[field]] for field in ("first", "first_bias")}
        for field, column in (("inner", 0), ("inner_bias", 1)) if len(pairs) > 2 else ():
            own_keys = [pair[column] for pair in pairs[1:-1]]
            tensors[field] = _stacked([file.tensors[key] for key in own_keys], own_keys)
            fields |= {f"{field}.{i}": key for i, key in enumerate(own_keys)}
        _check_sizes(config, tensors, pairs)
        update = make("xlora", tensors).replace(
            enable_softmax=config.enable_softmax, enable_softmax_topk=config.enable_softmax_topk,
            top_k=config.top_k_lora or 0, softmax_temperature=float(config.softmax_temperature),
            scaling=float(config.global_scaling_weight),
        )  # fmt: skip
        return DecodedUpdate("", update, fields)

    @classmethod
    def encode(cls, update: XLoRA) -> dict[str, tuple[str, Lazy]]:
        leaves = {field: as_lazy(leaf) for field, leaf in update.tensors.items()}
        depth = 1 if update.first is None else 2 if update.inner is None else 2 + update.inner.shape[0]
        words = [f"{LAYERS}.{number}" for number in _numbers(depth, dropout=False)]
        coded = {
            "last": (f"{words[-1]}.weight", leaves["last"]),
            "last_bias": (f"{words[-1]}.bias", leaves["last_bias"]),
        }
        if depth > 1:
            coded["first"] = f"{words[0]}.weight", leaves["first"]
            coded["first_bias"] = f"{words[0]}.bias", leaves["first_bias"]
        for i, word in enumerate(words[1:-1]):
            for field, leaf in (("inner", "weight"), ("inner_bias", "bias")):
                coded[f"{field}.{i}"] = f"{word}.{leaf}", item(leaves[field], i)
        return coded

    @classmethod
    def why_not(cls, target: Target, update: XLoRA) -> str:
        if update.A is not None:
            return "this xlora stores its experts, but PEFT stores the experts in separate folders"
        return "" if not target.path else "PEFT supports xlora only for a whole model"

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        (update,) = cls.of_it(updates).values()
        reads = update.last if update.first is None else update.first
        return {
            "enable_softmax": update.enable_softmax,
            "enable_softmax_topk": update.enable_softmax_topk,
            "global_scaling_weight": update.scaling,
            "hidden_size": int(reads.shape[1]),
            "softmax_temperature": update.softmax_temperature,
            "top_k_lora": update.top_k or None,
            "xlora_depth": 1 if update.first is None else 2 + (0 if update.inner is None else update.inner.shape[0]),
            "xlora_size": int(update.last.shape[1]),
        }


def _numbers(depth: int, dropout: bool) -> list[int]:
    """Return the indices of the classifier's linear layers. The indices also count the activations and dropouts."""
    return [position * (3 if dropout else 2) for position in range(depth)]


def _check_sizes(config: XLoRAFields, tensors: Mapping[str, Lazy], pairs: list[list[Key]]) -> None:
    reads = tensors.get("first", tensors["last"])
    if len(reads.shape) != 2 or reads.shape[1] != config.hidden_size:
        why = f"the shape is {list(reads.shape)}, but the config has hidden_size = {config.hidden_size}"
        raise ShapeMismatch(why, where=pairs[0][0].text, cure=USE_ITS_CONFIG)
    last = tensors["last"]
    if len(last.shape) != 2:
        raise ShapeMismatch(
            f"the tensor must have two axes, but its shape is {list(last.shape)}",
            where=pairs[-1][0].text,
            cure=SAVE_WITH_PEFT,
        )
    experts, logits = len(config.adapters or ()), last.shape[0]
    if experts and (logits % experts or (logits != experts and not config.layerwise_scalings)):
        why = f"the classifier has {logits} logits, but the config has {experts} experts"
        raise ShapeMismatch(why, where=pairs[-1][0].text, cure=USE_ITS_CONFIG)


def _stacked(tensors: list[Lazy], keys: list[Key]) -> Lazy:
    first = tensors[0]
    for tensor, key in zip(tensors, keys, strict=True):
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            one, other = f"{list(tensor.shape)} {tensor.dtype.name}", f"{list(first.shape)} {first.dtype.name}"
            why = f"the tensor has shape and dtype {one}, but {keys[0].text} has {other}"
            raise ShapeMismatch(why, where=key.text, cure=SAVE_WITH_PEFT)
    return Lazy((len(tensors), *first.shape), first.dtype, lambda: b"".join(bytes(t.fetch()) for t in tensors))
