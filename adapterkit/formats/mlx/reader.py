"""Decode a config and tensors into an `Adapter`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.adapter import Adapter, Foreign, Step, Target
from ...errors import Malformed, ShapeMismatch, TargetNotFound, Unsupported
from ...io import safetensors
from ...io.arrange import item, turned
from ...io.lazy import Lazy
from ...methods.lora import LoRA
from ...methods.replacement import Replacement
from ...naming.binding import bind
from ...naming.binding.translating import translated
from ...naming.mlx import from_mlx
from ...naming.tables import modules_of, without_prefix
from ...naming.ties import EMBEDDINGS
from .._pairs import DAMAGED, check_factors, finite, grouped, pair
from .container import CONFIG

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.strict_json import JsonValue
    from ...naming.moves import Move
    from .._pairs import Pair, Slots

FORMAT = "mlx"
KINDS = ("lora", "dora", "full")
_SLOTS = {".lora_a": "A", ".lora_b": "B", ".m": "magnitude"}


class Modules:
    """Translates MLX's module names to the base's names; without a base, to the names in the hub's checkpoints."""

    def __init__(self, base: Checkpoint | None) -> None:
        self.base = base
        self.config = None if base is None else base.config
        self.own: dict[str, list[str]] | None = None
        if base is not None:
            self.own = {}
            for name in dict.fromkeys(modules_of(base.tensors)):
                for bare in dict.fromkeys(without_prefix(name)):
                    self.own.setdefault(bare, []).append(name)

    def placed(self, updates: dict[Target, tuple[Update, ...]]) -> dict[Target, tuple[Update, ...]]:
        """Return the updates with experts as the base stores them: each separately, or in stacks.

        Raises:
            TargetNotFound, ShapeMismatch: the base does not have one of the experts.
        """
        if self.base is None:
            return updates
        paths = {path for paths in (self.own or {}).values() for path in paths}
        lost = {target: found for target, found in updates.items() if target.path not in paths}
        if not lost:
            return updates
        found = bind(Adapter(lost), self.base).adapter.updates
        return {target: held for target, held in updates.items() if target not in lost} | dict(found)

    def named(self, name: str) -> str:
        """Return the base's name of a module; without a base, the name in the hub's checkpoint.

        Raises:
            TargetNotFound: the base does not have the module, or has several modules with this name.
        """
        moves = from_mlx(name, self.config, 0)
        if moves is not None and len(moves) == 1 and moves[0].plain:
            name = moves[0].path
        if self.own is None:
            return name
        bare = list(without_prefix(name))
        found = next((self.own[each] for each in bare if each in self.own), [])
        exact = [own for own in found if own == name] or found
        if len(exact) != 1:
            why = f"exactly one module must have this name, but the base has {len(exact)}"
            raise TargetNotFound(why, where=name, cure="Is this the base that the adapter was trained on?")
        return exact[0]


def decode(config: Mapping[str, JsonValue], text: str, file: Path, modules: Modules) -> Adapter:
    """Return the adapter in an MLX-LM folder.

    Raises:
        Malformed, Unsupported, ShapeMismatch: the tensors do not fit the config, or `fine_tune_type` is unknown.
        TargetNotFound: the base does not have a module of the file.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise Unsupported(f"fine_tune_type {kind!r} is unknown", where=CONFIG, cure=f"Known: {', '.join(KINDS)}")
    header = safetensors.read_header(file)
    tensors = safetensors.handles(header)
    names: dict[str, str] = {}
    found = _read_whole(tensors, modules, names) if kind == "full" else _pairs(config, kind, tensors, modules, names)
    updates: dict[Target, tuple[Update, ...]] = {}
    for target, update in found:
        if target in updates:
            raise TargetNotFound("two names in the file are names of this target", where=str(target), cure=DAMAGED)
        updates[target] = (update,)
    updates = modules.placed(updates)
    data = {
        "config": dict(config), "text": text, "order": list(tensors), "metadata": dict(header.metadata),
        "names": {own: name for own, name in names.items() if own != name},
    }  # fmt: skip
    return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))


Found = Iterator[tuple[Target, "Update"]]


def _pairs(
    config: Mapping[str, JsonValue], kind: str, tensors: Mapping[str, Lazy], modules: Modules, names: dict[str, str]
) -> Found:
    scale = _scale(config)
    for name, slots in grouped(_unlisted(tensors), _SLOTS, "MLX-LM").items():
        if ("magnitude" in slots) != (kind == "dora"):
            why = f"fine_tune_type is {kind}, but the module has {'a' if 'magnitude' in slots else 'no'} magnitude"
            raise Malformed(why, where=name, cure=DAMAGED)
        name, part, count = _listed(name, tensors)
        if count:
            yield from _fused(name, part, count, slots, scale, tensors, modules, names)
        elif len(slots["A"].shape) == 3:
            yield from _stack(name, slots, scale, modules, names)
        elif parts := _parts(name, modules):
            # Split layers that MLX-LM fuses and hubs store separately, such as queries, keys and values, by rows of B.
            for target, given in translated({_target(name): (_one(name, slots, scale),)}, {name: parts}).items():
                names[target.path] = target.path
                yield target, given[0]
        else:
            own = modules.named(name)
            names[own] = name
            yield _target(own), _one(name, slots, scale)


def _one(name: str, slots: Slots, scale: float) -> Pair:
    if any(len(slots[field].shape) != 2 for field in "AB"):
        raise ShapeMismatch(f"A is {list(slots['A'].shape)}, B is {list(slots['B'].shape)}", where=name, cure=DAMAGED)
    own = {**slots, "A": turned(slots["A"]), "B": turned(slots["B"])}
    check_factors(name, own)
    if "magnitude" in own and (name.rpartition(".")[2] in EMBEDDINGS or own["magnitude"].shape != own["B"].shape[:1]):
        why = "for an embedding, MLX computes a norm per token, but DoRA computes a norm per dimension"
        raise Unsupported(why, where=name, cure="Fuse the adapter with MLX-LM")
    return pair(own, scale)


def _target(own: str) -> Target:
    return Target(own, "in out *k" if own.rpartition(".")[2] in EMBEDDINGS else "out *in")


def _stack(name: str, slots: Slots, scale: float, modules: Modules, names: dict[str, str]) -> Found:
    """Yield the updates of stacked experts. Their A `[e, r, in]` and B `[e, out, r]` are not transposed."""
    A, B = slots["A"].shape, slots["B"].shape
    if len(B) != 3 or A[0] != B[0] or A[1] != B[2] or "magnitude" in slots:
        raise ShapeMismatch(f"A is {list(A)}, B is {list(B)}", where=name, cure=DAMAGED)
    for index, own in enumerate(_experts(name, A[0], modules)):
        names[own] = own
        one: Slots = {field: item(leaf, index) for field, leaf in slots.items()}
        yield _target(own), LoRA(**one, scaling=scale)


def _experts(name: str, count: int, modules: Modules) -> list[str]:
    """Return the names of all experts of a stack in the hub's checkpoints, by the experts' numbers.

    Raises:
        TargetNotFound: no family has this stack.
        UsageError: several families of models have this stack, with different names of experts.
    """
    moves = from_mlx(name, modules.config, count)
    if moves is None or [move.expert for move in moves] != list(range(count)):
        raise TargetNotFound("the name of this stack of experts is unknown", where=name, cure="Report the model")
    return [move.path for move in moves]


def _parts(name: str, modules: Modules) -> tuple[Move, ...]:
    """Return the parts of a layer that MLX-LM fused; empty if the hub's checkpoints have the same fused layer."""
    moves = from_mlx(name, modules.config, 0) or ()
    return moves if len(moves) > 1 and all(move.take is not None and move.expert is None for move in moves) else ()


def _is_stack(name: str, modules: Modules) -> bool:
    """Whether a module is a stack of experts. Three axes do not prove this, because convolutions have them, too."""
    moves = from_mlx(name, modules.config, 1)
    return moves is not None and moves[0].expert is not None


def _unlisted(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Rename keys of fused layers, `X.lora_a.0` to `X#0.lora_a`, so that each part becomes a separate pair."""
    changed = {}
    for key, tensor in tensors.items():
        stem, _, last = key.rpartition(".")
        listed = last.isdigit() and stem.endswith((".lora_a", ".lora_b"))
        changed[f"{stem[:-7]}#{last}{stem[-7:]}" if listed else key] = tensor
    return changed


def _listed(name: str, tensors: Mapping[str, Lazy]) -> tuple[str, int, int]:
    module, hash_, part = name.partition("#")
    if not hash_:
        return name, 0, 0
    return module, int(part), sum(1 for key in tensors if key.startswith(f"{module}.lora_b."))


def _fused(
    name: str, part: int, count: int, slots: Slots, scale: float, tensors: Mapping[str, Lazy], modules: Modules,
    names: dict[str, str],
) -> Found:  # fmt: skip
    """Yield the update of one part of a fused weight; the rows of the parts follow one another in order."""
    keys = [f"{name}.lora_b.{index}" for index in range(count)]
    if part >= count or any(key not in tensors or len(tensors[key].shape) != 2 for key in keys):
        raise Malformed("the list of factors has gaps", where=name, cure=DAMAGED)
    start = sum(tensors[key].shape[1] for key in keys[:part])
    own = modules.named(name)
    names[own] = name
    update = _one(name, slots, scale)
    yield Target(own, rows=(start, start + update.B.shape[0])), update


def _scale(config: Mapping[str, JsonValue]) -> float:
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or "scale" not in parameters:
        cure = "Add lora_parameters.scale, which MLX-LM needs, too"
        raise Malformed(
            "the config has no scale, so the adapter's scaling is unknown", where="lora_parameters", cure=cure
        )
    return finite(parameters["scale"], "lora_parameters.scale")


def _read_whole(tensors: Mapping[str, Lazy], modules: Modules, names: dict[str, str]) -> Found:
    held: dict[str, Slots] = {}
    for key, tensor in tensors.items():
        module, _, field = key.rpartition(".")
        if field not in ("weight", "bias") or not module:
            raise Malformed("this is neither a weight nor a bias", where=key, cure=DAMAGED)
        held.setdefault(module, {})[field] = tensor
    for name, fields in held.items():
        if "weight" in fields and len(fields["weight"].shape) == 3 and _is_stack(name, modules):
            for index, own in enumerate(_experts(name, fields["weight"].shape[0], modules)):
                names[own] = own
                part: Slots = {field: item(leaf, index) for field, leaf in fields.items()}
                yield Target(own), Replacement(**part)
            continue
        own = modules.named(name)
        names[own] = name
        yield Target(own), Replacement(**fields)
