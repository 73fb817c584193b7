"""LoRA and what is stored like it: `lora_A` [r, in], `lora_B` [out, r]; DoRA's `m.weight` and IA3's `lora_B` [out, 1].

A layer that holds queries, keys and values in one weight has one pair of factors a group, for those of the three that
`attn_matrices` names: `lora_A` [r * n, in] and `lora_B` [out / 3 * n, r], group behind group. Each is an update of its
own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....adapter import Target
from ....errors import Malformed, ShapeMismatch, Unsupported
from ....methods import METHODS
from ....tensors.lazy import Lazy, as_lazy
from ...peft.alphas import exact_alpha
from ..file import AGAIN, Found, Kept, joined, sliced, take
from ..places import FUSED, family_of_base, role
from ._family import Family, Fields, Number, Size, Updates

if TYPE_CHECKING:
    from ....tensors.checkpoint import Checkpoint
    from ....updates import Update
    from ..config import Settings
    from ..file import Findings, Part
    from ..keys import Key
    from ..naming import Naming

QKV = ("q", "k", "v")
KIND, SHARED = "loras", "shared_parameters"


class LoraFields(Fields, frozen=True, kw_only=True):
    """What the tensors mean."""

    r: Size = 8
    alpha: Number = 8
    composition_mode: str = "add"
    use_gating: bool | None = False
    use_dora: bool | None = False
    vera_d: Number | None = None
    vera_b: Number | None = None
    attn_matrices: tuple[str, ...] = ("q", "v")


class LoraFamily(Family):
    """`lora`."""

    methods = frozenset({"dora", "gated_lora", "ia3", "lora", "vera_matrices"})
    fields = LoraFields
    read: ClassVar[Mapping[str, str]] = {
        "alpha": "scaling = alpha / r; 1 in files of adapters before 1.1, which were trained so",
        "attn_matrices": "which of q, k, v a fused weight's groups are of",
        "composition_mode": "add: LoRA; scale: IA3",
        "r": "rank",
        "use_dora": "the law is DoRA's",
        "use_gating": "a gate on the input stands in the place of the scaling",
        "vera_b": "a float: the law is VeRA's",
        "vera_d": "a float: the law is VeRA's",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "dropout": "training only",
        "dtype": "of the tensors, which say it themselves",
        "init_weights": "initial values",
        "init_weights_seed": "initial values",
        "intermediate_lora": "which modules have tensors; the keys say so",
        "leave_out": "which layers have tensors; the keys say so",
        "output_lora": "which modules have tensors; the keys say so",
        "selfattn_lora": "which modules have tensors; the keys say so",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "architecture": "lora",
        "dropout": 0.0,
        "dtype": None,
        "init_weights_seed": None,
        "leave_out": [],
    }

    @classmethod
    def decode(cls, part: Part) -> Findings:
        kind = _kind(part)
        for path, slots in part.groups(KIND).items():
            if kind == "ia3":
                yield from _ia3(part, path, slots)
            elif kind == "vera_matrices":
                yield _vera(part, path, slots)
            else:
                yield from _lora(part, path, slots, kind)

    @classmethod
    def spell(cls, updates: Updates, naming: Naming) -> Iterator[tuple[str, Lazy]]:
        for path, group in _by_path(updates).items():
            slots = [_slots(update) for _, update in group]
            for slot in slots[0]:
                yield naming.key(path, KIND, slot), joined([each[slot] for each in slots])
        first: Any = next(iter(updates.values()))[0]
        for field in ("A", "B") if first.method == "vera_matrices" else ():
            yield naming.key(naming.root, SHARED, f"lora_{field}"), as_lazy(first.tensors[field])

    @classmethod
    def compose(cls, updates: Updates, base: Checkpoint | None) -> dict[str, Any]:
        some = next(iter(updates.values()))[0]
        roles = _roles(updates, base)
        rank, alpha = _numbers(some)
        scale = some.method == "ia3"
        return {
            "alpha": alpha,
            "attn_matrices": [word for word in QKV if word in roles],
            "composition_mode": "scale" if scale else "add",
            "init_weights": {"ia3": "ia3", "vera_matrices": "vera"}.get(some.method, "lora"),
            "intermediate_lora": "intermediate" in roles,
            "output_lora": "output" in roles,
            "r": rank,
            "selfattn_lora": not roles.isdisjoint(QKV),
            "use_dora": some.method == "dora",
            "use_gating": some.method == "gated_lora",
            "vera_b": 0.0 if some.method == "vera_matrices" else None,
            "vera_d": 0.1 if some.method == "vera_matrices" else None,
        }

    @classmethod
    def losses(cls, updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
        first = _law(next(iter(updates.values()))[0])
        for target, found in updates.items():
            for position, update in enumerate(found):
                why = _why_not(target, update, base) or ("" if position == 0 else "a second update of one module")
                if not why and _law(update) != first:
                    why = "another method, rank or scaling than the others': a config has one of each"
                if why:
                    yield target, position, why
        yield from _unplaced(updates, base)


def _kind(part: Part) -> str:
    """The method that the fields call for.

    Raises:
        Unsupported: they call for a combination that no method here is.
    """
    own = part.own
    if own.composition_mode not in ("add", "scale"):
        why = f"an unknown composition_mode {own.composition_mode[:60]!r}"
        raise Unsupported(why, where=f"{part.at}.composition_mode", cure="Known: add, scale")
    on = {
        "ia3": own.composition_mode == "scale",
        "dora": bool(own.use_dora),
        "gated_lora": bool(own.use_gating),
        "vera_matrices": isinstance(own.vera_d, float) or isinstance(own.vera_b, float),
    }
    named = [method for method, is_on in on.items() if is_on]
    if len(named) > 1:
        why = f"{' and '.join(named)} in one adapter are not known to this version"
        raise Unsupported(why, where=part.at, cure="Run it with the adapters library")
    return named[0] if named else "lora"


EXTRA = {
    "lora": {},
    "dora": {"m.weight": "magnitude"},
    "gated_lora": {"gate.weight": "gate", "gate.bias": "gate_bias"},
}
"""Method -> slot -> field, beside A and B."""


def _lora(part: Part, path: str, slots: Mapping[str, Key], method: str) -> Iterator[Found | Kept]:
    fields = {"lora_A": "A", "lora_B": "B", **EXTRA[method]}
    tensors = take(part, slots, fields)
    A, B, layout = tensors["A"], tensors["B"], part.layout(path)
    keys = tuple(slots[slot] for slot in fields)
    if 0 in (*A.shape, *B.shape):
        yield from (Kept(key) for key in slots.values())
        return
    blocks = _blocks(part, path, A.shape[0] // part.own.r if A.shape else 0)
    _check_factors(part, slots, A, B, 1 if blocks is None else len(blocks))
    _check_place(part, path, slots, method, fused=blocks is not None)
    scaling = {} if method == "gated_lora" else {"scaling": _scaling(part)}
    if "magnitude" in tensors:
        tensors["magnitude"] = _column(tensors["magnitude"], B.shape[0], slots["m.weight"])
    if blocks is None:
        yield Found(Target(path, layout), METHODS[method](**tensors, **scaling), keys)
        return
    for group, rows in enumerate(_rows(B.shape[0], blocks)):
        size = rows[1] - rows[0]
        factors = {
            "A": sliced(A, group * part.own.r, (group + 1) * part.own.r),
            "B": sliced(B, group * size, (group + 1) * size),
        }
        yield Found(Target(path, layout, rows), METHODS[method](**factors, **scaling), keys)


def _check_place(part: Part, path: str, slots: Mapping[str, Key], method: str, *, fused: bool) -> None:
    where = slots["lora_A"].text
    if method == "dora" and (fused or part.layout(path) != "out *in"):
        why = "DoRA where the base stores [in, out]: the library takes its norms over the wrong axis there"
        raise Unsupported(why, where=where, cure="Leave those layers out, or use LoRA there")
    if method == "gated_lora" and fused:
        why = "gates of their own for the thirds of a fused weight are not known to this version"
        raise Unsupported(why, where=where, cure="Run it with the adapters library")


def _vera(part: Part, path: str, slots: Mapping[str, Key]) -> Found:
    fields = {"vera_D": "D", "vera_B": "E"}
    tensors = take(part, slots, fields)
    groups = [*part.groups(SHARED).values()]
    shared = {"lora_A": "A", "lora_B": "B"}
    if not groups or any(slot not in groups[0] for slot in shared):
        why = "the shared lora_A and lora_B are not in the file: saving from a model without a head drops them"
        raise Malformed(why, where=slots["vera_D"].text, cure="Save it again from a model with a head, where it was trained")
    tensors |= take(part, groups[0], shared)
    keys = (*(slots[slot] for slot in fields), *(groups[0][slot] for slot in shared))
    update = METHODS["vera_matrices"](**tensors, scaling=_scaling(part))
    return Found(Target(path, part.layout(path)), update, keys)


def _ia3(part: Part, path: str, slots: Mapping[str, Key]) -> Iterator[Found]:
    key = slots["lora_B"] if "lora_B" in slots else next(iter(slots.values()))
    B = take(part, slots, {"lora_B": "B"})["B"]
    if _scaling(part) * part.own.r != 1:
        why = f"IA3 times alpha = {part.own.alpha}: the vectors alone are not the law"
        raise Unsupported(why, where=f"{part.at}.alpha", cure="Multiply lora_B by it, and set it to 1")
    vector = _column(B, B.shape[0] if B.shape else 0, key)
    blocks = _blocks(part, path, 1)
    if blocks is None:
        yield Found(Target(path, part.layout(path)), METHODS["ia3"](l=vector), (key,))
        return
    for group, rows in enumerate(_rows(vector.shape[0], blocks)):
        size = rows[1] - rows[0]
        update = METHODS["ia3"](l=sliced(vector, group * size, (group + 1) * size))
        yield Found(Target(path, part.layout(path), rows), update, (key,))


def _scaling(part: Part) -> float:
    """alpha / r, or 1 where it was trained without; the library forgets that rule inside a union."""
    forgets = part.compat == "adapters" and part.at != "config"
    return 1.0 if part.settings.unscaled and not forgets else part.own.alpha / part.own.r


def _blocks(part: Part, path: str, groups: int) -> list[int] | None:
    """Which thirds of a fused weight the groups are of; None for a plain layer."""
    enabled = [position for position, word in enumerate(QKV) if word in part.own.attn_matrices]
    name = (part.settings.interface or {}).get("attn_qkv_proj") or FUSED.get(part.settings.model_type or "")
    fused = path.rpartition(".")[2] == str(name).rpartition(".")[2] if name else False
    return enabled if fused or (groups == len(enabled) > 1) else None


def _rows(outputs: int, blocks: list[int]) -> list[tuple[int, int]]:
    size = outputs // len(blocks)
    return [(block * size, (block + 1) * size) for block in blocks]


def _check_factors(part: Part, slots: Mapping[str, Key], A: Lazy, B: Lazy, groups: int) -> None:
    r = part.own.r
    if len(A.shape) != 2 or A.shape[0] != r * groups:
        why = f"{list(A.shape)}, where the config says rank {r}" + (f" and {groups} groups" if groups > 1 else "")
        raise ShapeMismatch(why, where=slots["lora_A"].text, cure=_OTHER)
    if len(B.shape) != 2 or B.shape[1] != r or B.shape[0] % groups:
        raise ShapeMismatch(f"{list(B.shape)} is not [outputs, {r}]", where=slots["lora_B"].text, cure=_OTHER)


def _column(tensor: Lazy, size: int, key: Key) -> Lazy:
    if tensor.shape != (size, 1):
        why = f"{list(tensor.shape)} is no column of {size} values"
        raise ShapeMismatch(why, where=key.text, cure=AGAIN)
    return tensor.reshape(size)


def _by_path(updates: Updates) -> dict[str, list[tuple[Target, Update]]]:
    """Path -> its updates, in the order of their rows."""
    found: dict[str, list[tuple[Target, Update]]] = {}
    for target in sorted(updates, key=lambda target: target.rows or (0, 0)):
        found.setdefault(target.path, []).extend((target, update) for update in updates[target])
    return {target.path: found[target.path] for target in updates}


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


def _law(update: Any) -> tuple[Any, ...]:
    if update.method == "ia3":
        return (update.method,)
    shared = (id(update.A), id(update.B)) if update.method == "vera_matrices" else ()
    return update.method, int(update.A.shape[0]), update.attributes.get("scaling"), shared


def _numbers(update: Any) -> tuple[int, int | float]:
    """Rank and alpha; `losses` has made sure that there is an alpha. Where it is not used it is the rank."""
    rank = 1 if update.method == "ia3" else int(update.A.shape[0])
    return rank, exact_alpha((rank, float(update.attributes.get("scaling", 1.0))), rslora=False) or 0


def _why_not(target: Target, update: Any, base: Checkpoint | None) -> str:
    if target.stacked:
        return f"{update.method} on stacked experts"
    if update.method == "ia3":
        return "" if update.l is not None else "ia3 on inputs"
    if len(update.A.shape) != 2:
        return f"{update.method} on a convolution"
    if 0 in update.A.shape:
        return f"{update.method} of rank 0"
    if update.method == "lora" and update.bias is not None:
        return "lora with a bias"
    scaling = float(update.attributes.get("scaling", 1.0))
    if exact_alpha((int(update.A.shape[0]), scaling), rslora=False) is None:
        return "no alpha gives its scaling exactly"
    return _why_not_dora(target, update, base) if update.method == "dora" else ""


def _why_not_dora(target: Target, update: Any, base: Checkpoint | None) -> str:
    """The library divides by |W + B A| without the scaling, and multiplies the layer's bias too."""
    if target.layout != "out *in":
        return "dora on a weight stored [in, out]"
    if update.scaling != 1:
        return "dora with a scaling other than 1, which the library leaves out of the norm"
    if base is None:
        return "dora, whose bias the library would scale: whether there is one only the base tells"
    names = [name for name in base.tensors if f".{name}".endswith(f".{target.path}.bias")]
    return "dora on a layer with a bias, which the library would scale" if names else ""


def _roles(updates: Updates, base: Checkpoint | None) -> set[str]:
    """The words of a config for all that is adapted."""
    model_type = _family(updates, base) or ""
    words: set[str] = set()
    for target in updates:
        word = role(target.path, model_type) or ""
        size = target.rows[1] - target.rows[0] if target.rows else 0
        words.add(QKV[target.rows[0] // size] if word == "qkv" and target.rows else word)
    return words


def _family(updates: Updates, base: Checkpoint | None) -> str | None:
    config = None if base is None else base.config
    return family_of_base((target.path for target in updates), config and config.get("model_type"))


def _unplaced(updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
    """What has no word in a config, which names no modules but kinds of them."""
    family = _family(updates, base)
    for target, found in updates.items():
        word = role(target.path, family or "")
        if family is None:
            why = "nothing tells which layers of the base these are; pass the base"
        elif word is None:
            why = f"not a layer of {family} that the library adapts"
        elif (word == "qkv") != (target.rows is not None):
            why = "all of a fused weight" if target.rows is None else "some rows of a weight"
        elif target.rows is not None and not _third(target.rows, found[0]):
            why = "rows that are no third of a fused weight"
        else:
            continue
        yield from ((target, position, f"{found[position].method}: {why}") for position in range(len(found)))


def _third(rows: tuple[int, int], update: Any) -> bool:
    start, size = rows[0], rows[1] - rows[0]
    return start % size == 0 and start // size < 3


_OTHER = "The config is not of this file"
