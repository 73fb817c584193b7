"""PEANuT: `peanut_A.weight` [r, out], `peanut_B.weight` [out, r], `peanut_encoders.<i>.weight` [r, r] and decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import ShapeMismatch
from ....io.lazy import Lazy, as_lazy
from ....methods.peanut import PEANuT
from ..file import File, Found, Key, make
from ._family import Family, Own, check_parts, check_rank

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.strict_json import JsonValue


class PEANuTFields(Own, frozen=True, kw_only=True):
    """The rank, depth, scaling and activation."""

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0


class PeanutFamily(Family):
    """The family of the peft_type PEANUT."""

    peft_type = "PEANUT"
    method = PEANuT
    parts = ("peanut_A.weight", "peanut_B.weight", "peanut_encoders.*.weight", "peanut_decoders.*.weight")
    own: ClassVar[type[Own]] = PEANuTFields
    read: ClassVar[Mapping[str, str]] = {
        "act_fn": "the activation",
        "depth": "number of encoders and of decoders",
        "scaling": "factor on the change",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        own = file.settings.own
        if not 0 <= own.depth <= len(keys):
            some = next(iter(keys.values()))
            why = f"the module has {len(keys)} tensors, but the config's depth states {own.depth} encoders"
            raise ShapeMismatch(why, where=some.text, cure="The config does not belong to this file")
        inner = {f"{side}s.{i}": f"peanut_{side}s.{i}.weight" for side in _SIDES for i in range(own.depth)}
        parts = {"A": "peanut_A.weight", "B": "peanut_B.weight", **inner}
        check_parts(keys, parts.values())
        fields = {field: keys[part] for field, part in parts.items()}
        check_rank(fields["A"], file.tensors[fields["A"]], own.r)
        tensors = {name: file.tensors[fields[name]] for name in ("A", "B")}
        if own.depth:
            tensors |= {f"{s}s": _stacked([fields[f"{s}s.{i}"] for i in range(own.depth)], file) for s in _SIDES}
        update = make("peanut", tensors, scaling=own.scaling).replace(activation=own.act_fn)
        return Found(fields["A"].path, update, fields)

    @classmethod
    def encode(cls, update: PEANuT) -> dict[str, tuple[str, Lazy]]:
        encoded = {name: (f"peanut_{name}.weight", as_lazy(update.tensors[name])) for name in ("A", "B")}
        for side in _SIDES:
            stack = update.tensors.get(f"{side}s")
            for i in range(0 if stack is None else stack.shape[0]):
                encoded[f"{side}s.{i}"] = f"peanut_{side}s.{i}.weight", _slice(as_lazy(stack), i)  # type: ignore[arg-type]
        return encoded

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        depth = 0 if some.encoders is None else int(some.encoders.shape[0])
        return {"r": int(some.A.shape[0]), "depth": depth, "act_fn": some.activation, "scaling": some.scaling}


def _stacked(keys: list[Key], file: File) -> Lazy:
    first = file.tensors[keys[0]]
    for key in keys:
        if (file.tensors[key].shape, file.tensors[key].dtype) != (first.shape, first.dtype):
            why = f"the shape {list(file.tensors[key].shape)} differs from {list(first.shape)}, or the dtypes differ"
            raise ShapeMismatch(why, where=key.text, cure="Save the adapter again with PEFT")
    tensors = [file.tensors[key] for key in keys]
    return Lazy((len(keys), *first.shape), first.dtype, lambda: b"".join(bytes(t.fetch()) for t in tensors))


def _slice(stack: Lazy, position: int) -> Lazy:
    return stack.map(lambda values: values[position], stack.shape[1:])


_SIDES = ("encoder", "decoder")
