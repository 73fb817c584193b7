"""Read and write LoRA, DoRA, gated LoRA, VeRA and IA3.

LoRA has the tensors `lora_A` `[r, in]` and `lora_B` `[out, r]`. DoRA also has `m.weight` `[out, 1]`. IA3 has only
`lora_B` `[out, 1]`.

One fused weight may compute queries, keys and values, each with a third of its rows. In this case, the config's
`attn_matrices` lists the adapted thirds. For n adapted thirds, the file has n pairs of factors, concatenated into
`lora_A` `[r * n, in]` and `lora_B` `[out / 3 * n, r]`. Each pair becomes an update of one third of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....core.adapter import Target, Updates
from ....errors import USE_ITS_CONFIG, Malformed, ShapeMismatch, Unsupported
from ....io.lazy import Lazy, as_lazy
from .. import file
from ..file import AGAIN, FUSED, QKV, AdapterHubUpdate, KeptKey, joined, make, sliced, take
from . import AdapterHubFamily, FamilyFields, Number, Size

if TYPE_CHECKING:
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue
    from ..file import AdapterHubKey, AdapterHubNaming, AdapterHubPart, Findings

KIND, SHARED = "loras", "shared_parameters"


class LoraFields(FamilyFields, frozen=True, kw_only=True):
    """The config fields that determine the meaning of the tensors."""

    r: Size = 8
    alpha: Number = 8
    composition_mode: str = "add"
    use_gating: bool | None = False
    use_dora: bool | None = False
    vera_d: Number | None = None
    vera_b: Number | None = None
    attn_matrices: tuple[str, ...] = ("q", "v")


class LoraFamily(AdapterHubFamily):
    """The family `lora`: LoRA, DoRA, gated LoRA, VeRA and IA3."""

    methods = frozenset({"dora", "dora_outputs", "gated_lora", "ia3", "lora", "vera_matrices"})
    fields = LoraFields
    read: ClassVar[Mapping[str, str]] = {
        "alpha": "`scaling = alpha / r`; in files from before adapters 1.1, the scaling is 1",
        "attn_matrices": "the adapted parts of a fused weight: some of q, k and v",
        "composition_mode": "`add` means LoRA; `scale` means IA3",
        "r": "rank",
        "use_dora": "whether the method is DoRA",
        "use_gating": "whether a gate on the input replaces the scaling",
        "vera_b": "any float means VeRA",
        "vera_d": "any float means VeRA",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "dropout": "training only",
        "dtype": "the dtype, which the tensors already show",
        "init_weights": "initial values",
        "init_weights_seed": "initial values",
        "intermediate_lora": "selects the adapted modules, which the keys already show",
        "leave_out": "lists the layers without adapters, which the keys already show",
        "output_lora": "selects the adapted modules, which the keys already show",
        "selfattn_lora": "selects the adapted modules, which the keys already show",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "architecture": "lora",
        "dropout": 0.0,
        "dtype": None,
        "init_weights_seed": None,
        "leave_out": [],
    }

    @classmethod
    def decode(cls, part: AdapterHubPart) -> Findings:
        kind = _kind(part)
        for path, slots in part.groups(KIND).items():
            if kind == "ia3":
                yield from _ia3(part, path, slots)
            elif kind == "vera_matrices":
                yield _vera(part, path, slots)
            else:
                yield from _lora(part, path, slots, kind)

    @classmethod
    def spell(cls, updates: Updates, naming: AdapterHubNaming) -> Iterator[tuple[str, Lazy]]:
        for path, group in _by_path(updates).items():
            slots = [_slots(update) for _, update in group]
            for slot in slots[0]:
                yield naming.key(path, KIND, slot), joined([each[slot] for each in slots])
        first: Any = next(iter(updates.values()))[0]
        for field in ("A", "B") if first.method == "vera_matrices" else ():
            yield naming.key(naming.root, SHARED, f"lora_{field}"), as_lazy(first.tensors[field])

    @classmethod
    def compose(cls, updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
        return file.compose(updates, base)

    @classmethod
    def losses(cls, updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
        return file.losses(updates, base)


def _kind(part: AdapterHubPart) -> str:
    """Return the name of the method that the config selects.

    Raises:
        Unsupported: the config selects several methods, or its `composition_mode` is unknown.
    """
    fields = part.method_fields
    if fields.composition_mode not in ("add", "scale"):
        why = f"the composition_mode {fields.composition_mode[:60]!r} is unknown"
        raise Unsupported(why, where=f"{part.at}.composition_mode", cure="Known: add, scale")
    on = {
        "ia3": fields.composition_mode == "scale",
        "dora" if part.by_formula else "dora_outputs": bool(fields.use_dora),
        "gated_lora": bool(fields.use_gating),
        "vera_matrices": isinstance(fields.vera_d, float) or isinstance(fields.vera_b, float),
    }
    named = [method for method, is_on in on.items() if is_on]
    if len(named) > 1:
        why = f"this version does not support {' and '.join(named)} in one adapter"
        raise Unsupported(why, where=part.at, cure="Run the adapter with the adapters library")
    return named[0] if named else "lora"


EXTRA = {
    "lora": {},
    "dora": {"m.weight": "magnitude"},
    "dora_outputs": {"m.weight": "magnitude"},
    "gated_lora": {"gate.weight": "gate", "gate.bias": "gate_bias"},
}
"""For each method, a map from slots to fields, without the slots `lora_A` and `lora_B`."""


def _lora(
    part: AdapterHubPart, path: str, slots: Mapping[str, AdapterHubKey], method: str
) -> Iterator[AdapterHubUpdate | KeptKey]:
    fields = {"lora_A": "A", "lora_B": "B", **EXTRA[method]}
    tensors = take(part, slots, fields)
    A, B, layout = tensors["A"], tensors["B"], part.layout(path)
    keys = tuple(slots[slot] for slot in fields)
    if 0 in (*A.shape, *B.shape):
        yield from (KeptKey(key) for key in slots.values())
        return
    blocks = _blocks(part, path, A.shape[0] // part.method_fields.r if A.shape else 0)
    _check_factors(part, slots, A, B, 1 if blocks is None else len(blocks))
    _check_place(part, path, slots, method, fused=blocks is not None)
    scaling = {} if method == "gated_lora" else {"scaling": _scaling(part)}
    if "magnitude" in tensors:
        tensors["magnitude"] = _column(tensors["magnitude"], B.shape[0], slots["m.weight"])
    if blocks is None:
        yield AdapterHubUpdate(Target(path, layout), make(method, tensors, **scaling), keys)
        return
    for group, rows in enumerate(_rows(B.shape[0], blocks)):
        size = rows[1] - rows[0]
        factors = {
            "A": sliced(A, group * part.method_fields.r, (group + 1) * part.method_fields.r),
            "B": sliced(B, group * size, (group + 1) * size),
        }
        yield AdapterHubUpdate(Target(path, layout, rows), make(method, factors, **scaling), keys)


def _check_place(
    part: AdapterHubPart, path: str, slots: Mapping[str, AdapterHubKey], method: str, *, fused: bool
) -> None:
    where = slots["lora_A"].text
    if method in ("dora", "dora_outputs") and part.layout(path) != "out *in":
        why = "for a weight stored as [in, out], the adapters library computes DoRA's norms over the wrong axis"
        raise Unsupported(why, where=where, cure="Omit such layers, or use LoRA in them")
    if method in ("dora", "dora_outputs") and fused:
        why = "this version does not support DoRA for the parts of a fused weight"
        raise Unsupported(why, where=where, cure="Run the adapter with the adapters library")
    if method == "gated_lora" and fused:
        why = "this version does not support separate gates for the thirds of a fused weight"
        raise Unsupported(why, where=where, cure="Run the adapter with the adapters library")


def _vera(part: AdapterHubPart, path: str, slots: Mapping[str, AdapterHubKey]) -> AdapterHubUpdate:
    fields = {"vera_D": "D", "vera_B": "E"}
    tensors = take(part, slots, fields)
    groups = [*part.groups(SHARED).values()]
    shared = {"lora_A": "A", "lora_B": "B"}
    if not groups or any(slot not in groups[0] for slot in shared):
        why = "the file lacks the shared lora_A and lora_B; a model without a head saves no shared tensors"
        raise Malformed(
            why, where=slots["vera_D"].text, cure="Save the adapter again, from the trained model with a head"
        )
    tensors |= take(part, groups[0], shared)
    keys = (*(slots[slot] for slot in fields), *(groups[0][slot] for slot in shared))
    update = make("vera_matrices", tensors, scaling=_scaling(part))
    return AdapterHubUpdate(Target(path, part.layout(path)), update, keys)


def _ia3(part: AdapterHubPart, path: str, slots: Mapping[str, AdapterHubKey]) -> Iterator[AdapterHubUpdate]:
    key = slots["lora_B"] if "lora_B" in slots else next(iter(slots.values()))
    B = take(part, slots, {"lora_B": "B"})["B"]
    if _scaling(part) * part.method_fields.r != 1:
        why = f"IA3's vectors are multiplied by alpha = {part.method_fields.alpha}; only alpha = 1 is supported"
        raise Unsupported(why, where=f"{part.at}.alpha", cure="Multiply lora_B by alpha, and set alpha to 1")
    vector = _column(B, B.shape[0] if B.shape else 0, key)
    blocks = _blocks(part, path, 1)
    if blocks is None:
        yield AdapterHubUpdate(Target(path, part.layout(path)), make("ia3", {"l": vector}), (key,))
        return
    if vector.shape[0] % len(blocks):
        why = f"the shape is {list(B.shape)}, but its rows cannot be divided equally among {len(blocks)} adapted thirds"
        raise ShapeMismatch(why, where=key.text, cure=USE_ITS_CONFIG)
    for group, rows in enumerate(_rows(vector.shape[0], blocks)):
        size = rows[1] - rows[0]
        update = make("ia3", {"l": sliced(vector, group * size, (group + 1) * size)})
        yield AdapterHubUpdate(Target(path, part.layout(path), rows), update, (key,))


def _scaling(part: AdapterHubPart) -> float:
    """Return the scaling: alpha / r, or 1 if the file is from a release that trained LoRA without a scaling.

    In such files, members of a union also get the scaling 1, although the adapters library scales them by alpha / r.
    With `compat="formula"`, the scaling is always alpha / r.
    """
    return 1.0 if part.settings.unscaled and not part.by_formula else part.method_fields.alpha / part.method_fields.r


def _blocks(part: AdapterHubPart, path: str, groups: int) -> list[int] | None:
    """Return the adapted thirds of a fused weight, in order: 0 for queries, 1 for keys, 2 for values.

    Return None if the weight is not fused.
    """
    enabled = [position for position, word in enumerate(QKV) if word in part.method_fields.attn_matrices]
    name = (part.settings.interface or {}).get("attn_qkv_proj") or FUSED.get(part.settings.model_type or "")
    fused = path.rpartition(".")[2] == str(name).rpartition(".")[2] if name else False
    if fused and not enabled:
        why = "attn_matrices has none of q, k and v, but the file adapts a fused weight of queries, keys and values"
        raise Malformed(why, where=f"{part.at}.attn_matrices", cure=USE_ITS_CONFIG)
    return enabled if fused or (groups == len(enabled) > 1) else None


def _rows(outputs: int, blocks: list[int]) -> list[tuple[int, int]]:
    size = outputs // len(blocks)
    return [(block * size, (block + 1) * size) for block in blocks]


def _check_factors(part: AdapterHubPart, slots: Mapping[str, AdapterHubKey], A: Lazy, B: Lazy, groups: int) -> None:
    r = part.method_fields.r
    if len(A.shape) != 2 or A.shape[0] != r * groups:
        why = f"the shape is {list(A.shape)}, but the config states rank {r}" + (
            f" and {groups} adapted thirds" if groups > 1 else ""
        )
        raise ShapeMismatch(why, where=slots["lora_A"].text, cure=USE_ITS_CONFIG)
    if len(B.shape) != 2 or B.shape[1] != r or B.shape[0] % groups:
        raise ShapeMismatch(
            f"the shape {list(B.shape)} is not [outputs, {r}]", where=slots["lora_B"].text, cure=USE_ITS_CONFIG
        )


def _column(tensor: Lazy, size: int, key: AdapterHubKey) -> Lazy:
    if tensor.shape != (size, 1):
        why = f"the shape is {list(tensor.shape)}, but must be [{size}, 1]"
        raise ShapeMismatch(why, where=key.text, cure=AGAIN)
    return tensor.reshape(size)


def _by_path(updates: Updates) -> dict[str, list[tuple[Target, Update]]]:
    """Group the updates by path. Updates with the same path are sorted by their rows."""
    by_path: dict[str, list[tuple[Target, Update]]] = {}
    for target in sorted(updates, key=lambda target: target.rows or (0, 0)):
        by_path.setdefault(target.path, []).extend((target, update) for update in updates[target])
    return {target.path: by_path[target.path] for target in updates}


def _slots(update: Any) -> dict[str, Lazy]:
    if update.method == "ia3":
        return {"lora_B": as_lazy(update.l).reshape(-1, 1)}
    if update.method == "vera_matrices":
        return {"vera_D": as_lazy(update.D), "vera_B": as_lazy(update.E)}
    slots = {"lora_A": as_lazy(update.A), "lora_B": as_lazy(update.B)}
    for slot, field in EXTRA[update.method].items():
        leaf = as_lazy(update.tensors[field])
        slots[slot] = leaf.reshape(-1, 1) if field == "magnitude" else leaf
    return slots
