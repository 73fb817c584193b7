"""The base class and the registry of PEFT's families, and the methods that belong to no family, such as LoRA.

A family reads and writes the adapters of one `peft_type`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from ....core.registry import Registry
from ....errors import SAVE_WITH_PEFT, USE_ITS_CONFIG, Malformed, ShapeMismatch
from ....io.lazy import Lazy, as_lazy
from ....methods.alora import ALoRA
from ....methods.arrow import Arrow
from ....methods.bdlora import BDLoRA
from ....methods.dora import DoRA
from ....methods.grouped_dora import GroupedDoRA
from ....methods.grouped_lora import GroupedLoRA
from ....methods.ia3 import IA3
from ....methods.kasa import KaSA
from ....methods.lora import LoRA
from ....methods.olora import OLoRA
from ....methods.pissa import PiSSA
from ....methods.replacement import Replacement
from ....methods.rows import Rows
from ..patterns import first_match, number_fields

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue
    from ..._format import Departure
    from ..file import DecodedUpdate, File, Findings, Key, PeftSettings


# List the methods whose files have `lora_A` and `lora_B`. Their `peft_type` is LORA.


PAIRS = (LoRA, DoRA, KaSA, BDLoRA, ALoRA, Arrow, OLoRA, PiSSA, GroupedLoRA, GroupedDoRA)
"""The methods that store a pair of factors, A and B."""

BESIDE = (*PAIRS, IA3, Replacement, Rows)
"""All methods that belong to no family."""

LINEAR = (KaSA, BDLoRA)
"""The methods that PEFT supports only for linear layers."""

ROUTED = (ALoRA, Arrow)
"""The methods that PEFT supports only for linear layers and Conv1D."""

BIASED = (LoRA, ALoRA, GroupedLoRA)
"""The methods that may have a bias."""

RESIDUAL = (OLoRA, PiSSA)
"""The methods that subtract their initial values from the base. PEFT supports them for linear layers and Conv1D."""

OUTPUT_TIMES = 2.0
"""The number of times that PEFT's forward adds the change of an `nn.MultiheadAttention`'s output projection."""

TOGETHER: tuple[tuple[type[Update], ...], ...] = (
    (LoRA, BDLoRA),
    (LoRA, OLoRA),
    (LoRA, PiSSA),
    (LoRA, GroupedLoRA),
    (DoRA, GroupedDoRA),
)
"""Groups of methods whose updates can be in one file together."""

_KASA = {"beta": 1e-4, "gamma": 1e-3}
"""PEFT's default weights for the terms that KaSA adds to the loss in training."""


def rank_of(update: Update, stacked: bool = False) -> int:
    """Return the rank of an update's factors. `stacked` says whether the first axis of the factors is for experts."""
    if isinstance(update, BDLoRA):
        blocks: Any = update.B_blocks if update.A_blocks is None else update.A_blocks
        return int(blocks.shape[0]) * int(blocks.shape[1 if update.B_blocks is None else 2])
    A: Any = update.tensors.get("A", update.tensors.get("idle_A"))
    return int(A.shape[int(stacked)])


def from_blocks(leaf: Lazy) -> Lazy:
    """Reshape a block-diagonal factor from [n, rows, columns] to PEFT's shape [n * rows, columns]."""
    return leaf.reshape(-1, leaf.shape[-1])


def may_stand(update: Update, method: type[Update] | None) -> bool:
    """Whether an update may be in a file whose main method is `method`."""
    return type(update) is method or any(type(update) in some and method in some for some in TOGETHER)


def formula_fields(updates: Mapping[str, Update], before: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the config fields that select the updates' formula. `before` is the config of the source file."""
    kinds = {type(update) for update in updates.values()}
    residual = next((kind.__name__.lower() for kind in RESIDUAL if kind in kinds), None)
    was = str(before.get("init_lora_weights")).lower() in (kind.__name__.lower() for kind in RESIDUAL)
    return {
        "use_dora": bool(kinds & {DoRA, GroupedDoRA}),
        "lora_bias": any(isinstance(update, BIASED) and update.bias is not None for update in updates.values()),
        "kasa_config": (before.get("kasa_config") or _KASA) if KaSA in kinds else None,
        "use_bdlora": _blocks(updates) if BDLoRA in kinds else None,
        **_invocation(updates, before),
        "arrow_config": _router(updates, before),
        **({"init_lora_weights": residual or True} if residual or was else {}),
    }


def _invocation(updates: Mapping[str, Update], before: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the fields `alora_invocation_tokens` and `task_type`.

    The tokens activate aLoRA. PEFT searches the input for these tokens only if `task_type` is `CAUSAL_LM`.
    """
    some = next((update for update in updates.values() if isinstance(update, ALoRA)), None)
    if some is None:
        return {"alora_invocation_tokens": None}
    tokens = as_lazy(some.invocation).numpy().tolist()
    return {"alora_invocation_tokens": tokens, "task_type": before.get("task_type") or "CAUSAL_LM"}


def _router(updates: Mapping[str, Update], before: Mapping[str, JsonValue]) -> dict[str, JsonValue] | None:
    """Return the settings of Arrow's router, with new names for the experts."""
    some = next((update for update in updates.values() if isinstance(update, Arrow)), None)
    if some is None:
        return None
    names = {"task": some.tasks, "gks": some.general}
    listed = {f"{name}_adapter_names": [f"{name}_{i}" for i in range(count)] for name, count in names.items()}
    arrow = before.get("arrow_config")
    seed = arrow.get("rng_seed") if isinstance(arrow, Mapping) else None
    numbers = {"top_k": some.top_k, "router_temperature": some.temperature, "rng_seed": seed}
    return {**numbers, "use_gks": some.general > 0, **listed}


def _blocks(updates: Mapping[str, Update]) -> dict[str, JsonValue]:
    block_updates = {path: update for path, update in updates.items() if isinstance(update, BDLoRA)}
    A = sorted(path for path, update in block_updates.items() if update.A_blocks is not None)
    some: Any = next(iter(block_updates.values()))
    return {
        "target_modules_bd_a": A or None,
        "target_modules_bd_b": sorted(block_updates.keys() - set(A)) or None,
        "nblocks": int((some.B_blocks if some.A_blocks is None else some.A_blocks).shape[0]),
        "match_strict": len(block_updates) == len(updates),
    }


def why_not_there(target: Target, update: Update) -> str:
    """Return the reason why a file cannot store an update's factors at this target; empty if no reason was found.

    Only two reasons are checked. A file cannot store KaSA or BD-LoRA on a weight that is not stored as [out, in], and
    it cannot store an Arrow that contains its experts.
    """
    if isinstance(update, LINEAR) and target.layout != "out *in":
        return f"PEFT does not support {update.method} on a weight stored as [in, out]"
    if isinstance(update, Arrow) and not update.lacks_experts:
        return "this arrow stores its experts, but PEFT stores the experts in separate folders"
    return ""


# Define the base class of families.


Parts = dict[str, "tuple[str, Lazy]"]
"""A map from each field of an update to (part of the key, tensor as PEFT stores it)."""


Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


class MethodFields(msgspec.Struct, frozen=True, kw_only=True):
    """The base class for the config fields that only one family reads."""


class Family(ABC):
    """Converts the files of one `peft_type` to updates and back.

    Class attributes:
        name: the family's name; needed only if a Python module defines several families.
        peft_type: the value of `peft_type` in the config.
        method: the class of most or all of the family's updates.
        others: further classes of the family's updates; one file may have updates of several classes.
        parts: the endings of keys after a module's path, including `.weight` or `.bias`; `*` matches one or
            more characters other than dots.
        shared: the keys, without `shared_prefix`, of tensors that all modules share.
        shared_prefix: the prefix that is written before a shared key. The reader accepts shared keys with and without
            `base_model.`.
        prefix: the prefix that is written before the base's module names.
        names_modules: whether the config lists the modules that have tensors in the file.
        method_fields: the config fields that only this family reads, with PEFT's defaults.
        read: for each field in `method_fields` that changes the meaning of the tensors, a phrase that describes the
            effect.
        harmless: for each other field of this `peft_type`, a phrase that says why the field has no effect.
        fresh: config fields to write for an adapter that was not read from PEFT's format.
        departures: named cases in which PEFT's forward differs from the paper's formula; see `Format`.
        empty: whether the updates' tensors may be empty (0 elements).
        folds: fields of an update, in order of preference. A scaling that the config cannot express is multiplied into
            the first of these fields that the update has.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str]
    method: ClassVar[type[Update]]
    others: ClassVar[tuple[type[Update], ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    shared_prefix: ClassVar[str] = "base_model."
    prefix: ClassVar[str] = "base_model.model."
    names_modules: ClassVar[bool] = True
    method_fields: ClassVar[type[MethodFields]] = MethodFields
    read: ClassVar[Mapping[str, str]] = {}
    harmless: ClassVar[Mapping[str, str]] = {}
    fresh: ClassVar[Mapping[str, Any]] = {}
    departures: ClassVar[Mapping[str, Departure]] = {}
    empty: ClassVar[bool] = False
    folds: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def methods(cls) -> tuple[type[Update], ...]:
        """Return all classes that the family's updates may have."""
        return (cls.method, *cls.others)

    @classmethod
    def decode(cls, file: File) -> Findings:
        """Yield the updates of this family in a file.

        Raises:
            Malformed: a module lacks a tensor, has an unknown tensor, or is adapted twice.
            ShapeMismatch: the tensors' shapes contradict the config.
        """
        for stem, keys in file.modules(cls.parts).items():
            check_stem(stem, next(iter(keys.values())))
            yield cls.decode_keys(file, keys)

    @classmethod
    @abstractmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        """Return the update of one module.

        `keys` maps each of the family's `parts` to the module's key. `file.shared` has the shared keys.
        """

    @classmethod
    @abstractmethod
    def encode(cls, update: Any) -> Parts:
        """Return a map from each field of an update to (part or shared key, tensor as PEFT stores it).

        If PEFT stores a field as several tensors, their entries are `FIELD.0`, `FIELD.1`, and so on. A part that begins
        with a dot belongs to the module, even if a shared key has the same name.
        """

    @classmethod
    def encode_at(cls, update: Any, shape: tuple[int, ...] | None) -> dict[str, tuple[str, Lazy]]:
        """Encode an update of a module. `shape` is the shape of the module's weight in the base; None if unknown."""
        return cls.encode(update)

    @classmethod
    def why_not(cls, target: Target, update: Any) -> str:
        """Return the reason why a file cannot store an update of this target; empty if it can."""
        return (
            "" if target.layout == "out *in" else f"a file cannot store {update.method} for weights stored as [in, out]"
        )

    @classmethod
    @abstractmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        """Return the config fields whose values depend on the updates: ranks, scalings, variants."""

    @classmethod
    def encode_all(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> Iterator[Parts]:
        """Encode all updates of this family, in order.

        Override this method if an update's keys depend on other updates.
        """
        for target, group in updates.items():
            weight = None if base is None else base.tensors.get(f"{target.path}.weight")
            for update in (update for update in group if type(update) in cls.methods()):
                yield cls.encode_at(update, None if weight is None else weight.shape)

    @classmethod
    def guesses(cls, target: Target) -> bool:
        """Whether the writer must guess a target's keys.

        If a target may be either an embedding or a Conv1D, the writer must guess, because the two have different keys.
        """
        return False

    @classmethod
    def numbers_at(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> dict[str, JsonValue]:
        """Return the fields of `numbers`. Override this method if the fields depend on the base's shapes."""
        return cls.numbers(updates)

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        """Yield (target, reason) for each update that cannot be in the same file as the other updates."""
        yield from ()

    @classmethod
    def omitted(cls, config: Mapping[str, JsonValue], updates: Mapping[Target, tuple[Update, ...]]) -> frozenset[str]:
        """Return the fields of updates that need not be written, because the config determines their values."""
        return frozenset()

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        """Return the paths of updates whose scaling cannot be expressed exactly by any alpha."""
        return []

    @classmethod
    def of_it(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        """Return a map from each target's path to the update of this family.

        The map omits updates of stacked experts. In PEFT's files, only LoRA can have stacks, so the writer refuses the
        omitted updates.
        """
        whole = {target: group for target, group in updates.items() if not target.stacked}
        return {t.path: update for t, group in whole.items() for update in group if type(update) in cls.methods()}

    @classmethod
    def turned(cls, updates: Mapping[Target, tuple[Update, ...]]) -> bool:
        """Return the value of `fan_in_fan_out`: whether the family adapts at least one weight stored as [in, out]."""
        targets = (
            target for target, group in updates.items() if any(type(update) in cls.methods() for update in group)
        )
        return any(target.layout == "in out *k" for target in targets)


class ScaledFields(MethodFields, frozen=True, kw_only=True):
    """The config fields of a family whose scaling is alpha / r."""

    alpha: float = 8

    def scaling(self, settings: PeftSettings, name: str) -> float:
        """Return the scaling of the module `name`."""
        return first_match(settings.alpha_pattern or {}, name, self.alpha) / settings.rank(name)


def scaled_numbers(scales: Mapping[str, tuple[int, float]]) -> dict[str, JsonValue]:
    """Return the config fields for ranks and alphas. `scales` maps each module to (rank, scaling)."""
    fields, _ = number_fields(scales, (False,))
    del fields["use_rslora"]
    return {"alpha" if name == "lora_alpha" else name: value for name, value in fields.items()}


def inexact_alphas(scales: Mapping[str, tuple[int, float]]) -> list[str]:
    """Return the modules whose scaling cannot be expressed exactly by any alpha.

    `scales` maps each module to (rank, scaling).
    """
    return number_fields(scales, (False,))[1]


def minority(value_of: Mapping[Target, object]) -> list[Target]:
    """Return the targets that do not have the most common value. If several values tie, the first one wins."""
    count = Counter(value_of.values())
    most = max(count, key=lambda value: count[value], default=None)
    return [target for target, value in value_of.items() if value != most]


def stored_inputs(base: Checkpoint | None, target: Target) -> int | None:
    """Return the number of inputs of a linear layer's weight in the base; None if the base has no such weight."""
    weight = None if base is None else base.tensors.get(f"{target.path}.weight")
    if weight is None or len(weight.shape) != 2:
        return None
    return weight.shape[0 if target.layout == "in out *k" else 1]


def check_parts(keys: Mapping[str, Key], wanted: Collection[str]) -> None:
    """Check that a module's keys have exactly the parts in `wanted`.

    Raises:
        Malformed: a part is missing, or the module has a part that is not in `wanted`.
    """
    some = next(iter(keys.values()))
    missing = next((part for part in wanted if part not in keys), None)
    if missing:
        raise Malformed(f"the file lacks a tensor that this one needs: {missing}", where=some.text, cure=SAVE_WITH_PEFT)
    extra = next((key for part, key in keys.items() if part not in wanted), None)
    if extra:
        raise Malformed("this tensor does not fit the module's other tensors", where=extra.text, cure=SAVE_WITH_PEFT)


def check_rank(key: Key, tensor: Lazy, rank: int, axis: int = 0) -> None:
    """Check the size of one axis of a factor against the rank in the config.

    Raises:
        ShapeMismatch: the axis has another size, or the factor has fewer than two axes.
    """
    if len(tensor.shape) < 2 or tensor.shape[axis] != rank:
        why = f"the shape is {list(tensor.shape)}, but the config states rank {rank}"
        cure = USE_ITS_CONFIG
        raise ShapeMismatch(why, where=key.text, cure=cure)


def check_stem(stem: str, key: Key) -> None:
    """Check that a module is adapted only once.

    Raises:
        Malformed: the module is already inside the wrapper of another adapter.
    """
    if stem.endswith(".base_layer"):
        raise Malformed("the module's adapter is nested in another adapter", where=key.text, cure=SAVE_WITH_PEFT)


# Look up families by method or by `peft_type`.
#
# LoRA, DoRA, IA3, token rows and whole parameters belong to no family. The modules `decoders` and `factors`
# read them.


__all__ = ["FAMILIES", "PEFT_TYPES", "Family", "Parts", "family_of", "family_of_method", "family_of_type"]

PEFT_TYPES = ("IA3", "LN_TUNING", "LORA", "TRAINABLE_TOKENS")
"""Values of `peft_type` without a family. Files of these types are read without importing the families."""

FAMILIES: Registry[type[Family]] = Registry("PEFT family", __name__, "adapterkit.peft_families", Family, several=True)


def family_of(update: Update) -> type[Family] | None:
    """Return the family that writes an update; None if the update's method has no family."""
    return family_of_method(type(update))


def family_of_method(method: type[Update] | None) -> type[Family] | None:
    """Return the family that writes the updates of a method; None if the method has no family."""
    return None if method is None or method in BESIDE else _by_method().get(method)


def family_of_type(peft_type: str) -> type[Family] | None:
    """Return the family of a `peft_type`; None if the `peft_type` has no family."""
    return None if peft_type in PEFT_TYPES else _by_type().get(peft_type)


@cache
def _by_method() -> dict[type[Update], type[Family]]:
    """Map each method to the family that writes it. If several families can write it, use the first one by name."""
    return {method: family for family in reversed(list(FAMILIES.values())) for method in family.methods()}


@cache
def _by_type() -> dict[str, type[Family]]:
    return {family.peft_type: family for family in reversed(list(FAMILIES.values()))}
