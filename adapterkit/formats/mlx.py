"""MLX-LM's adapters: a folder with `adapters.safetensors` and `adapter_config.json`; LoRA, DoRA and whole parameters.

Names are those of MLX's models, nearly all of them transformers' own. Factors of a linear layer stand the other way
round than in the papers, those of stacked experts do not. One scale serves all modules.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter, Foreign, Step, Target
from ..errors import (
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    StorageError,
    TargetNotFound,
    Unrepresentable,
    Unsupported,
    storage_error,
)  # fmt: skip
from ..methods.dora import DoRA
from ..methods.lora import LoRA
from ..methods.replacement import Replacement
from ..names.experts import Experts
from ..names.mlx import EXPERTS
from ..names.tables import modules_of, without_prefix
from ..names.ties import EMBEDDINGS
from ..tensors import safetensors
from ..tensors.arrange import item, stacked, turned
from ..tensors.atomic import write_bytes
from ..tensors.checkpoint import read_json
from ..tensors.lazy import Lazy, as_lazy
from ._format import Format
from ._pairs import (
    DAMAGED,
    Pairs,
    check_factors,
    expressible,
    finite,
    grouped,
    in_order,
    one_number,
    pair,
    rank_of,
    remembered,
    to_rank,
    unfit,
)  # fmt: skip

if TYPE_CHECKING:
    from ..tensors.checkpoint import Checkpoint
    from ..updates import Update
    from ._pairs import Pair, Slots

FORMAT = "mlx"
CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
METADATA = {"format": "mlx"}
MARKS = ("fine_tune_type", "lora_parameters")
KINDS = ("lora", "dora", "full")
_SLOTS = {".lora_a": "A", ".lora_b": "B", ".m": "magnitude"}
_STACKS = Experts(EXPERTS)


class Mlx(Format):
    """Folders of MLX-LM."""

    url = "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md"
    description = "MLX-LM: adapter_config.json beside adapters.safetensors"
    methods = frozenset({"lora", "dora", "replacement"})

    def sniff(self, path: Path) -> bool:
        if not path.is_dir() and path.name != CONFIG and not path.name.endswith(TENSORS):
            return False
        try:
            config = read_json(_folder(path) / CONFIG)
        except AdapterkitError:
            return False
        return "peft_type" not in config and any(mark in config for mark in MARKS)

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        folder = _folder(path)
        tensors = folder / TENSORS if path.is_dir() or path.name == CONFIG else path
        if not tensors.exists():
            raise StorageError(f"no {TENSORS}", path=folder, cure="Fetch the file of tensors as well")
        try:
            config = read_json(folder / CONFIG, strict=True)
            return _decode(config, (folder / CONFIG).read_text("utf-8"), tensors, _Modules(base))
        except AdapterkitError as error:
            raise error.at(path=path) from None

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = remembered(adapter, FORMAT)
        whole = all(isinstance(update, Replacement) for _, update in adapter)
        config, tensors, lines = _whole(adapter, hints) if whole else _encode(adapter, hints, on_loss)
        # Its order of keys does not outlive other formats, the text does.
        text = hints["text"] if config == hints.get("config") else json.dumps(dict(sorted(config.items())), indent=4)
        _save(path, text, in_order(tensors, hints), hints.get("metadata", METADATA))
        return lines


class _Modules:
    """The base's modules, where it is given: what a name of MLX's is called there."""

    def __init__(self, base: Checkpoint | None) -> None:
        self.own: dict[str, list[str]] | None = None
        if base is not None:
            self.own = {}
            for name in dict.fromkeys(modules_of(base.tensors)):
                for bare in dict.fromkeys(without_prefix(name)):
                    self.own.setdefault(bare, []).append(name)

    def named(self, name: str) -> str:
        """The base's own name.

        Raises:
            TargetNotFound: the base has none, or several.
        """
        if self.own is None:
            return name
        bare = list(without_prefix(name))
        found = next((self.own[each] for each in bare if each in self.own), [])
        exact = [own for own in found if own == name] or found
        if len(exact) != 1:
            why = f"{len(exact)} modules of the base are called so"
            raise TargetNotFound(why, where=name, cure="Is this the base that the adapter was trained on?")
        return exact[0]


def _decode(config: Mapping[str, Any], text: str, file: Path, modules: _Modules) -> Adapter:
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise Unsupported(f"fine_tune_type {kind!r}", where=CONFIG, cure=f"Known: {', '.join(KINDS)}")
    header = safetensors.read_header(file)
    tensors = {name: safetensors.lazy(header.path, entry) for name, entry in header.entries.items()}
    names: dict[str, str] = {}
    found = _read_whole(tensors, modules, names) if kind == "full" else _pairs(config, kind, tensors, modules, names)
    updates: dict[Target, tuple[Update, ...]] = {}
    for target, update in found:
        if target in updates:
            raise TargetNotFound("two names lead here", where=str(target), cure=DAMAGED)
        updates[target] = (update,)
    data = {
        "config": dict(config), "text": text, "order": list(tensors), "metadata": dict(header.metadata),
        "names": {own: name for own, name in names.items() if own != name},
    }  # fmt: skip
    return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))


Found = Iterator[tuple[Target, "Update"]]


def _pairs(
    config: Mapping[str, Any], kind: str, tensors: Mapping[str, Lazy], modules: _Modules, names: dict[str, str]
) -> Found:
    scale = _scale(config)
    for name, slots in grouped(_unlisted(tensors), _SLOTS, "MLX-LM").items():
        if ("magnitude" in slots) != (kind == "dora"):
            why = f"fine_tune_type is {kind}, and there is {'a' if 'magnitude' in slots else 'no'} magnitude"
            raise Malformed(why, where=name, cure=DAMAGED)
        name, part, count = _listed(name, tensors)
        if count:
            yield from _fused(name, part, count, slots, scale, tensors, modules, names)
        elif len(slots["A"].shape) == 3:
            yield from _stack(name, slots, scale, modules, names)
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
        why = "MLX takes the norm of an embedding's rows, one a token, where DoRA has one a dimension"
        raise Unsupported(why, where=name, cure="Fuse the adapter with MLX-LM")
    return pair(own, scale)


def _target(own: str) -> Target:
    return Target(own, "in out *k" if own.rpartition(".")[2] in EMBEDDINGS else "out *in")


def _stack(name: str, slots: Slots, scale: float, modules: _Modules, names: dict[str, str]) -> Found:
    """Experts: A `[e, r, in]`, B `[e, out, r]`, not turned."""
    A, B = slots["A"].shape, slots["B"].shape
    if len(B) != 3 or A[0] != B[0] or A[1] != B[2] or "magnitude" in slots:
        raise ShapeMismatch(f"A is {list(A)}, B is {list(B)}", where=name, cure=DAMAGED)
    experts = _STACKS.back(name, A[0])
    if experts is None:
        raise TargetNotFound("a stack of experts by a name that is not known", where=name, cure="Report the model")
    for index, each in enumerate(experts):
        own = modules.named(each)
        names[own] = each
        one: Slots = {field: item(leaf, index) for field, leaf in slots.items()}
        yield _target(own), LoRA(**one, scaling=scale)


def _unlisted(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Keys of a fused layer's lists, `lora_a.0`, as `#0.lora_a`: each part is a pair of its own."""
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
    name: str, part: int, count: int, slots: Slots, scale: float, tensors: Mapping[str, Lazy], modules: _Modules,
    names: dict[str, str],
) -> Found:  # fmt: skip
    """A part of a fused weight: the rows behind those of the parts before it."""
    keys = [f"{name}.lora_b.{index}" for index in range(count)]
    if part >= count or any(key not in tensors or len(tensors[key].shape) != 2 for key in keys):
        raise Malformed("a list of factors with gaps", where=name, cure=DAMAGED)
    start = sum(tensors[key].shape[1] for key in keys[:part])
    own = modules.named(name)
    names[own] = name
    update = _one(name, slots, scale)
    yield Target(own, rows=(start, start + update.B.shape[0])), update


def _scale(config: Mapping[str, Any]) -> float:
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or "scale" not in parameters:
        cure = "Add lora_parameters.scale, which MLX-LM itself needs"
        raise Malformed("no scale, so that the strength of the adapter is unknown", where="lora_parameters", cure=cure)
    return finite(parameters["scale"], "lora_parameters.scale")


def _read_whole(tensors: Mapping[str, Lazy], modules: _Modules, names: dict[str, str]) -> Found:
    held: dict[str, Slots] = {}
    for key, tensor in tensors.items():
        module, _, field = key.rpartition(".")
        if field not in ("weight", "bias") or not module:
            raise Malformed("neither a weight nor a bias", where=key, cure=DAMAGED)
        held.setdefault(module, {})[field] = tensor
    for name, fields in held.items():
        experts = _STACKS.back(name, fields["weight"].shape[0] if "weight" in fields else 0)
        for index, each in enumerate([name] if experts is None else experts):
            own = modules.named(each)
            names[own] = each
            part: Slots = fields if experts is None else {
                field: item(leaf, index) for field, leaf in fields.items()
            }  # fmt: skip
            yield Target(own), Replacement(**part)


def _name(target: Target, hints: Mapping[str, Any]) -> str:
    known = hints.get("names", {})
    return str(known.get(target.path, target.path))


def _encode(
    adapter: Adapter, hints: Mapping[str, Any], on_loss: str
) -> tuple[dict[str, Any], dict[str, Lazy], list[str]]:
    kinds = Counter(type(update) for _, update in adapter if isinstance(update, LoRA | DoRA))
    dora = kinds[DoRA] > kinds[LoRA]

    def why(target: Target, update: Pair) -> str:
        if isinstance(update, DoRA) and target.layout != "out *in":
            return "DoRA of an embedding, for which MLX has another law"
        return unfit(Target(target.path, target.layout), update)

    pairs, lines = expressible(adapter, "MLX-LM", on_loss, why, (DoRA,) if dora else (LoRA,))
    first = hints.get("config", {}).get("lora_parameters", {}).get("scale")
    scale, pairs, folded = one_number(
        pairs, lambda u: u.scaling, lambda scale, _: scale, dialect="MLX-LM", on_loss=on_loss, default=1.0, first=first
    )
    tensors = _spelled(pairs, hints)
    return _config(hints, pairs, scale, "dora" if dora else "lora"), tensors, lines + folded


def _spelled(pairs: Pairs, hints: Mapping[str, Any]) -> dict[str, Lazy]:
    tensors: dict[str, Lazy] = {}
    stacks: dict[str, dict[int, Pair]] = {}
    slices: dict[str, list[tuple[tuple[int, int], Pair]]] = {}
    for target, update in pairs.items():
        name = _name(target, hints)
        stack = _STACKS.there(name)
        if stack:
            stacks.setdefault(stack[0], {})[stack[1]] = update
        elif target.rows is not None:
            slices.setdefault(name, []).append((target.rows, update))
        else:
            ends = {"A": ".lora_a", "B": ".lora_b", "magnitude": ".m"}
            turn = {field: turned if field in "AB" else as_lazy for field in ends}
            tensors |= {name + ends[f]: turn[f](as_lazy(leaf)) for f, leaf in update.tensors.items()}
    for name, found in stacks.items():
        tensors |= _of_stack(name, found)
    for name, parts in slices.items():
        tensors |= _of_slices(name, sorted(parts, key=lambda item: item[0]))
    return tensors


def _of_stack(name: str, found: Mapping[int, Pair]) -> dict[str, Lazy]:
    if sorted(found) != list(range(len(found))) or any(isinstance(update, DoRA) for update in found.values()):
        items = [f"{name}: has experts {sorted(found)}"]
        raise Unrepresentable("MLX-LM holds a LoRA of all experts in one stack", items=items, cure=_EXPERTS)
    rank = max(rank_of(update) for update in found.values())
    own = [to_rank(found[index], rank) for index in range(len(found))]
    return {
        f"{name}.lora_a": stacked([as_lazy(u.A) for u in own]),
        f"{name}.lora_b": stacked([as_lazy(u.B) for u in own]),
    }


def _of_slices(name: str, parts: list[tuple[tuple[int, int], Pair]]) -> dict[str, Lazy]:
    ends = [0, *(rows[1] for rows, _ in parts)]
    if [rows[0] for rows, _ in parts] != ends[:-1] or len(parts) < 2 or any(isinstance(u, DoRA) for _, u in parts):
        items = [f"{name}: rows {', '.join(f'{a} to {b}' for (a, b), _ in parts)}"]
        raise Unrepresentable("MLX-LM holds a LoRA of all slices of a weight", items=items, cure=_EXPERTS)
    tensors: dict[str, Lazy] = {}
    for index, (_, update) in enumerate(parts):
        tensors |= {
            f"{name}.lora_a.{index}": turned(as_lazy(update.A)),
            f"{name}.lora_b.{index}": turned(as_lazy(update.B)),
        }
    return tensors


def _config(hints: Mapping[str, Any], pairs: Pairs, scale: float, kind: str) -> dict[str, Any]:
    """What was read where it still holds; else what MLX-LM needs to load the tensors."""
    read = dict(hints.get("config", {}))
    before = read.get("lora_parameters") or {}
    if read and before.get("scale") == scale and read.get("fine_tune_type", "lora") == kind and _same(hints, pairs):
        return read
    ranks = Counter(rank_of(update) for update in pairs.values())
    rank = min(ranks, key=lambda rank: (-ranks[rank], rank))
    keys = sorted({_key(_name(target, hints)) for target in pairs})
    parameters = {"dropout": 0.0, **before, "rank": rank, "scale": scale, "keys": keys}
    return {**read, "fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}


def _same(hints: Mapping[str, Any], pairs: Pairs) -> bool:
    return {*hints.get("order", ())} == {*_spelled(pairs, hints)}


def _key(name: str) -> str:
    """A module as MLX-LM's config names it: below its block, a stack for an expert."""
    stack = _STACKS.there(name)
    head, layers, rest = (stack[0] if stack else name).rpartition(".layers.")
    return rest.partition(".")[2] if layers else head + rest


def _whole(adapter: Adapter, hints: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Lazy], list[str]]:
    stacks: dict[str, dict[int, Lazy]] = {}
    tensors: dict[str, Lazy] = {}
    for target, update in adapter:
        if target.rows is not None or target.layout not in ("out *in", "in out *k"):
            raise Unrepresentable("MLX-LM holds whole parameters", items=[str(target)], cure="Write another format")
        name = _name(target, hints)
        stack = _STACKS.there(name)
        for field, leaf in update.tensors.items():
            stored = as_lazy(leaf)
            stored = turned(stored) if field == "weight" and target.layout == "in out *k" else stored
            if stack:
                stacks.setdefault(f"{stack[0]}.{field}", {})[stack[1]] = stored
            else:
                tensors[f"{name}.{field}"] = stored
    for name, found in stacks.items():
        if sorted(found) != list(range(len(found))):
            raise Unrepresentable("MLX-LM holds all experts in one stack", items=[name], cure=_EXPERTS)
        tensors[name] = stacked([found[index] for index in range(len(found))])
    config = {**hints.get("config", {}), "fine_tune_type": "full"}
    return {"num_layers": -1, **config}, tensors, []


def _save(folder: Path, text: str, tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> None:
    """Writes the folder. Its config goes away first and comes back last: without one it is no adapter."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    safetensors.write(folder / TENSORS, tensors, metadata)
    write_bytes(folder / CONFIG, text.encode())


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


_EXPERTS = "Train all of them, or write another format"
