"""Read and write Keras Hub's LoRA files: `.lora.h5`, from `backbone.save_lora_weights`.

A file stores one rank for all layers. For each adapted layer, it stores the layer's number, `lora_kernel_a` and
`lora_kernel_b`. It stores no alpha, because Keras uses a scaling of 1. It stores no layer names, because the base's
model type determines the order of the layers.

The kernels of query, key and value have an axis for the heads. Their `lora_kernel_b` is `[rank, dim]`, and all heads
share it:

    change[in, head, dim] = sum over r of a[in, head, r] * b[r, dim]

The B of a LoRA is `[heads * dim, rank]`, so each head has its own part `[dim, rank]`. The writer stores each distinct
column of these parts as a row of `lora_kernel_b`. If there are more than `dim` distinct columns, `lora_kernel_b` is the
identity, and `lora_kernel_a` contains the whole weight change. In both cases, the result is exact except for rounding
to the file's dtype, but the file may need a larger rank than the LoRA. For all other layers, A and B are only
transposed, and padded to the file's rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ..core.adapter import Adapter, Foreign, Step, Target
from ..errors import (
    PASS_BASE_WITH_CONFIG,
    USE_ITS_BASE,
    WRITE_AGAIN,
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    Unrepresentable,
    Unsupported,
    UsageError,
)
from ..io.arrange import block_diagonal, padded, turned, widened, zeros
from ..io.hdf5 import is_hdf5, read_hdf5, write_hdf5
from ..io.inputs import read_input
from ..io.lazy import DTYPES, Lazy, as_array, as_lazy, bytes_of, check_finite
from ..methods.lora import LoRA
from ..naming.heads import Heads, heads_of
from ..naming.tool_names import NameTable, TableNames, modules_of
from ._format import Format
from ._kit import Leftovers, expressible, leftovers, of_no_number, rank_of, unfit

if TYPE_CHECKING:
    import numpy as np

    from ..io.checkpoint import Checkpoint
    from ..io.lazy import DType
    from ..io.strict_json import JsonValue
    from ._kit import Pair, Pairs, Slots

    Array = np.ndarray[Any, Any]


# Read the numbers, names and kernel axes of the layers in Keras Hub's backbones from spec/keras_hub.toml.


class KerasLayer(NamedTuple):
    """A layer of a block.

    Attributes:
        name: the layer's name in Keras Hub, such as `query`.
        offset: the layer's number minus the number of the block's first layer.
        axes: the axes of the layer's kernel, such as `in heads dim`.
    """

    name: str
    offset: int
    axes: str

    @property
    def shares(self) -> bool:
        """Whether all heads share one `lora_kernel_b`. They do if the kernel's last axis is the width of a head."""
        return self.axes.endswith("dim")


class _KerasRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model_types: list[str]
    first: int
    stride: int
    modules: dict[str, tuple[str, int, str]]


@dataclass(frozen=True)
class KerasFamily:
    """A group of Keras Hub's backbones that have their layers in the same order.

    Attributes:
        name: the group's name in spec/keras_hub.toml.
        record: the group's entry in spec/keras_hub.toml.
    """

    name: str
    record: _KerasRecord

    @cached_property
    def layers(self) -> Mapping[str, KerasLayer]:
        """A map from module paths to Keras Hub's layers.

        A path is relative to a block of the base, such as `self_attn.q_proj`.
        """
        return {path: KerasLayer(*layer) for path, layer in self.record.modules.items()}

    @cached_property
    def table(self) -> NameTable:
        """A table that translates the base's module paths to names such as `{n}.query`.

        Here, `{n}` is the block's number, and `query` is the layer's name in Keras Hub.
        """
        return NameTable({f"model.layers.{{n}}.{path}": f"{{n}}.{layer.name}" for path, layer in self.layers.items()})

    def number(self, block: int, layer: KerasLayer) -> int:
        """Return the number that files use for a layer of a block."""
        return self.record.first + self.record.stride * block + layer.offset

    def at(self, number: int) -> tuple[int, str] | None:
        """Return (block number, module path in the block) for a layer number; None if that layer cannot have LoRA."""
        block, offset = divmod(number - self.record.first, self.record.stride)
        path = next((path for path, layer in self.layers.items() if layer.offset == offset), None)
        return None if path is None or block < 0 else (block, path)


@cache
def families() -> Mapping[str, KerasFamily]:
    """Return a map from transformers' `model_type` to the family."""
    installed = Path(__file__).parent / "data" / "keras_hub.toml"
    file = installed if installed.is_file() else Path(__file__).parents[2] / "spec" / "keras_hub.toml"
    records = msgspec.toml.decode(read_input(file), type=dict[str, _KerasRecord])
    all_families = [KerasFamily(name, record) for name, record in records.items()]
    return {kind: family for family in all_families for kind in family.record.model_types}


# The format.


FORMAT = "keras_hub"
SUFFIX = ".lora.h5"
RANK, A_KEY, B_KEY = "lora/vars/rank", "lora_kernel_a", "lora_kernel_b"

MODEL_TYPE = "adapterkit_model_type"
"""The root attribute in which adapterkit stores transformers' `model_type`. Keras neither writes nor reads it."""

DEFAULT = ("query", "value")
"""The layers that `load_lora_weights` adapts if `enable_lora` was not called before.

Without that call, `load_lora_weights` fails if the file lacks one of these layers.
"""

MOST_ELEMENTS = 1 << 31
"""The largest B, in elements, that the reader creates. B grows with the square of the number of heads in the file."""

_FACTORS = {"BF16", "F16", "F32", "F64"}
_GIVE = PASS_BASE_WITH_CONFIG


class KerasHubHints(Leftovers, total=False):
    """The data that `Adapter.foreign` keeps from a Keras Hub file: the file's rank and model type."""

    rank: int
    model_type: str


class KerasHub(Format):
    """LoRA files of Keras Hub's backbones."""

    url = "https://keras.io/keras_hub/api/base_classes/backbone/"
    description = "Keras Hub: a .lora.h5 file from backbone.save_lora_weights"
    models = "language"
    methods = frozenset({"lora"})
    dtypes = frozenset({"F32", "F64"})
    file = f"adapter{SUFFIX}"

    def sniff(self, path: Path) -> bool:
        return path.name.endswith(SUFFIX) and is_hdf5(path)

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        try:
            tensors, kind = read_hdf5(path, MODEL_TYPE)
            family, kind = _family(base, kind)
            rank, layers = _layers(tensors)
            updates = {t: (u,) for t, u in _decode(family, rank, layers, base)}
        except AdapterkitError as error:
            raise error.at(path=path) from None
        data: dict[str, JsonValue] = {"order": list(tensors), "rank": rank, "model_type": kind}
        return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        if not path.name.endswith(SUFFIX):
            cure = f"Rename the file to {path.name.partition('.')[0]}{SUFFIX}"
            raise UsageError(f"Keras Hub loads only files whose name ends in {SUFFIX}", path=path, cure=cure)
        hints = leftovers(adapter, FORMAT, KerasHubHints)
        try:
            family, kind = _family(base, "")
        except Unsupported as error:
            raise Unrepresentable(error.why, cure=error.cure) from None
        names = TableNames(family.table)

        def why_not(target: Target, update: Pair) -> str:
            if names.there(target.path) is None:
                return f"in Keras Hub's backbones of {kind} models, this module cannot have LoRA"
            return "its weight is stored as [in, out]" if target.layout != "out *in" else unfit(target, update)

        pairs, lines = expressible(adapter, "Keras Hub", on_loss, why_not)
        _check_shapes(pairs, base)
        # A file has one dtype. Convert the factors to float32 or float64 before the scaling is multiplied into them. A
        # half-precision type would round the products.
        dtypes = {as_lazy(leaf).dtype.name for update in pairs.values() for leaf in (update.A, update.B)}
        dtype = "F64" if "F64" in dtypes else "F32"
        pairs = {
            target: update.replace(A=widened(as_lazy(update.A), dtype), B=widened(as_lazy(update.B), dtype))
            for target, update in pairs.items()
        }
        pairs, folded = of_no_number(pairs, format_name="Keras Hub", on_loss=on_loss)
        by_layer = _by_layer(pairs, names)
        writer = _KerasWriter(family, by_layer, _Sizes.of(base), hints.get("rank", 1))
        write_hdf5(path, writer.tensors(), {MODEL_TYPE: kind})
        # If the source file is also from Keras Hub, the user can load the new file as before, so omit the notes.
        notes = [] if hints else writer.notes(max(map(rank_of, pairs.values())))
        return lines + folded + notes


def _family(base: Checkpoint | None, stored: str) -> tuple[KerasFamily, str]:
    """Return (family, model type). The model type comes from the base's config, or from the file if there is no config.

    Raises:
        UsageError: neither the base's config nor the file states the model type.
        Unsupported: the order of the layers of this model type is unknown.
        Malformed: the file's model type and the base's model type belong to different families.
    """
    config = None if base is None else base.config
    kind = stored if config is None else str(config.get("model_type", ""))
    if not kind:
        why = "Keras Hub's files identify layers only by number, so the base's model type is needed to find the modules"
        raise UsageError(why, where="config.json: model_type", cure=_GIVE)
    family = families().get(kind)
    if family is None:
        cure = f"Known: {', '.join(families())}. Merge the adapter instead: adapterkit merge"
        raise Unsupported(f"the order of layers in Keras Hub's models of type {kind!r} is unknown", cure=cure)
    if stored and families().get(stored) is not family:
        cure = USE_ITS_BASE
        raise Malformed(f"the file is for a {stored}, and the base is a {kind}", where=MODEL_TYPE, cure=cure)
    return family, kind


# Reading


def _layers(tensors: Mapping[str, Lazy]) -> tuple[int, dict[int, dict[str, Lazy]]]:
    """Return the file's rank, and a dict from the number of a layer to the layer's two tensors.

    Raises:
        Malformed: the file has an unknown key, an invalid rank, or a layer with only one tensor.
    """
    layers: dict[int, dict[str, Lazy]] = {}
    for key, leaf in tensors.items():
        if key == RANK:
            continue
        match key.split("/"):
            case ["lora", number, "vars", name] if _is_number(number) and name in (A_KEY, B_KEY):
                layers.setdefault(int(number), {})[name] = leaf
            case _:
                cure = f"Keras Hub's keys are {RANK} and lora/<number>/vars/{A_KEY} or {B_KEY}"
                raise Malformed("this is not a key of Keras Hub's LoRA files", where=key, cure=cure)
    rank = tensors.get(RANK)
    if rank is None or rank.shape != () or rank.dtype.name not in ("I32", "I64"):
        raise Malformed("the rank is missing, or is not a single I32 or I64", where=RANK, cure=WRITE_AGAIN)
    value = int(rank.numpy())
    for index, slots in layers.items():
        if len(slots) != 2:
            raise Malformed(f"this layer has only {next(iter(slots))}", where=f"lora/{index}", cure=WRITE_AGAIN)
        other = {leaf.dtype.name for leaf in slots.values()} - _FACTORS
        if other:
            why = f"this layer has tensors of dtype {', '.join(other)}"
            raise Unsupported(why, where=f"lora/{index}", cure=f"Convert them to {', '.join(sorted(_FACTORS))}")
    if not layers:
        raise Malformed("the file has no layers", where="lora", cure=WRITE_AGAIN)
    return value, layers


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10 and (text == "0" or text[0] != "0")


def _decode(
    family: KerasFamily, rank: int, layers: Mapping[int, dict[str, Lazy]], base: Checkpoint | None
) -> Iterator[tuple[Target, LoRA]]:
    names = TableNames(family.table, None if base is None else modules_of(base.tensors))
    heads = None if base is None or base.config is None else heads_of(base.config, A_KEY)
    for number in sorted(layers):
        place = family.at(number)
        if place is None:
            cure = USE_ITS_BASE
            raise Malformed(
                f"in {family.name} models, the layer with this number cannot have LoRA",
                where=f"lora/{number}",
                cure=cure,
            )
        block, path = place
        layer = family.layers[path]
        pair: Slots = _pair(layer, layers[number], rank, heads, path, f"lora/{number}")
        yield Target(names.back(f"{block}.{layer.name}")), LoRA(**pair)


def _pair(layer: KerasLayer, slots: Mapping[str, Lazy], rank: int, heads: Heads | None, path: str, where: str) -> Slots:
    """Return A and B of a layer.

    Raises:
        ShapeMismatch: the tensors do not have the shapes of this layer, or do not fit the number or width of the
            base's heads.
    """
    a, b = slots[A_KEY], slots[B_KEY]
    right = len(a.shape) == len(layer.axes.split()) and len(b.shape) == 2 and rank > 0 and 0 not in (*a.shape, *b.shape)
    if not right or a.shape[-1] != rank or b.shape[0] != rank:
        why = (
            f"{A_KEY} is {list(a.shape)}, {B_KEY} is {list(b.shape)}; these are not the shapes of the layer "
            f"{layer.name} with rank {rank}"
        )
        raise ShapeMismatch(why, where=where, cure=USE_ITS_BASE)
    if layer.axes == "heads dim out" and heads is not None and a.shape[:2] != (heads.query, heads.dim):
        raise _other_heads(where, a.shape[:2], heads)
    if not layer.shares:
        return {"A": turned(a.reshape(-1, rank)), "B": turned(b)}
    first = layer.axes == "heads in dim"
    count, width = (a.shape[0], a.shape[1]) if first else (a.shape[1], a.shape[0])
    wanted = None if heads is None else (_count(path, heads), heads.dim)
    if heads is not None and (count, b.shape[1]) != wanted:
        raise _other_heads(where, (count, b.shape[1]), heads)
    if count * count * rank * b.shape[1] > MOST_ELEMENTS:
        why = (
            f"{count} heads with rank {rank} would give a B of {count * b.shape[1]} x {count * rank}, which has more "
            f"than {MOST_ELEMENTS} elements"
        )
        raise Unsupported(
            why, where=where, cure="Merge the file in Keras Hub, then extract an adapter: adapterkit extract"
        )
    order = (0, 2, 1) if first else (1, 2, 0)
    A = a.map(lambda values: values.transpose(order).reshape(count * rank, width), (count * rank, width))
    return {"A": A, "B": block_diagonal([turned(b)] * count)}


def _other_heads(where: str, counts: tuple[int, ...], heads: Heads) -> ShapeMismatch:
    why = (
        f"the layer has {counts[0]} heads of width {counts[1]}; the base has {heads.query} query heads "
        f"and {heads.kv} key and value heads of width {heads.dim}"
    )
    return ShapeMismatch(why, where=where, cure=USE_ITS_BASE)


def _count(path: str, heads: Heads) -> int:
    return heads.query if path == "self_attn.q_proj" else heads.kv


# Writing


def _check_shapes(pairs: Pairs, base: Checkpoint | None) -> None:
    """Check that updates fit the base's weights.

    If a layer has no update in some blocks, the writer stores zeros for these blocks. It takes the zeros' shapes from
    the layer's update in another block.

    Raises:
        ShapeMismatch: an update does not fit.
        Malformed: a factor contains a NaN or an infinity.
    """
    for target, update in pairs.items():
        weight = None if base is None else base.tensors.get(f"{target.path}.weight")
        shape = (update.B.shape[0], update.A.shape[1])
        # Skip quantized weights, because their stored tensors may have other shapes.
        if weight is not None and weight.dtype.floating and weight.shape != shape:
            why = f"the update is for a weight of shape {list(shape)}, but the base's weight is {list(weight.shape)}"
            raise ShapeMismatch(why, where=str(target), cure=USE_ITS_BASE)
        for name in ("A", "B"):
            check_finite(update.tensors[name], f"{target}: {update.method}.{name}")


def _by_layer(pairs: Pairs, names: TableNames) -> dict[tuple[int, str], Pair]:
    """Return a map from (block number, module path in the block) to updates.

    Raises:
        UsageError: two targets, with different prefixes, belong to the same layer of Keras Hub.
    """
    by_layer: dict[tuple[int, str], Pair] = {}
    for target, update in pairs.items():
        foreign = names.there(target.path)
        assert foreign is not None
        block, path = str(names.table.back(foreign)).removeprefix("model.layers.").split(".", 1)
        if (int(block), path) in by_layer:
            why = "another target of the adapter belongs to the same layer of Keras Hub"
            raise UsageError(why, where=str(target), cure="Write the two targets to separate files, or remove one")
        by_layer[int(block), path] = update
    return by_layer


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The number of blocks in the base, and the base's numbers of heads."""

    blocks: int
    heads: Heads

    @classmethod
    def of(cls, base: Checkpoint | None) -> _Sizes:
        """Read the numbers of blocks and heads from the base's config.

        Raises:
            UsageError: the config does not state one of the numbers.
        """
        assert base is not None
        config: Mapping[str, object] = base.config or {}
        inner = config.get("text_config")
        blocks = (inner if isinstance(inner, dict) else config).get("num_hidden_layers")
        if type(blocks) is not int or blocks < 1:
            raise UsageError("the base's config does not state num_hidden_layers", where="config.json", cure=_GIVE)
        return cls(blocks, heads_of(config, "self_attn.q_proj"))


class _KerasWriter:
    """Encode pairs of factors A and B as the tensors of a file. The scaling of each pair must be 1.

    Keras Hub adapts a layer such as `query` in all blocks. So if the adapter has no pair for the layer in a block, the
    file has zeros there.
    """

    def __init__(
        self, family: KerasFamily, by_layer: Mapping[tuple[int, str], Pair], sizes: _Sizes, least: int
    ) -> None:
        self.family, self.by_layer, self.sizes = family, by_layer, sizes
        beyond = max(block for block, _ in by_layer)
        if beyond >= sizes.blocks:
            why = f"the adapter changes the block with index {beyond}, but the base has only {sizes.blocks} blocks"
            raise ShapeMismatch(why, cure=USE_ITS_BASE)
        self.dtype: DType = as_lazy(next(iter(by_layer.values())).A).dtype
        adapted = {path for _, path in by_layer}
        self.adapted = [path for path in family.layers if path in adapted]
        needs = (self._needs(path, update) for (_, path), update in by_layer.items())
        self.rank = max(least, *needs)

    def tensors(self) -> dict[str, Lazy]:
        """Return the tensors of the file by key, in the order of the layers' numbers."""
        rank = Lazy((), DTYPES["I64"], lambda: self.rank.to_bytes(8, "little", signed=True))
        tensors = {RANK: rank}
        places = [
            (self.family.number(n, self.family.layers[path]), n, path)
            for n in range(self.sizes.blocks)
            for path in self.adapted
        ]
        for number, block, path in sorted(places):
            a, b = self._layer(block, path)
            tensors |= {f"lora/{number}/vars/{A_KEY}": a, f"lora/{number}/vars/{B_KEY}": b}
        return tensors

    def notes(self, rank: int) -> list[str]:
        """Return notes for the user, such as the call that must precede `load_lora_weights`.

        Args:
            rank: the largest rank of the pairs. If the file's rank is larger, a note says so.
        """
        names = [self.family.layers[path].name for path in self.adapted]
        lines = []
        if self.rank > rank:
            why = "all heads of a query, key or value layer share one lora_kernel_b"
            lines.append(f"the rank grew from {rank} to {self.rank}: in Keras Hub, {why}")
        if {*names} != {*DEFAULT}:
            call = f"backbone.enable_lora({self.rank}, target_layer_names={names})"
            lines.append(f"call {call} before load_lora_weights, which by itself loads only query and value")
        return lines

    def _needs(self, path: str, update: Pair) -> int:
        """Return the smallest rank with which a file can store a pair."""
        layer = self.family.layers[path]
        if not layer.shares:
            return rank_of(update)
        rows, _ = _shared_rows(as_array(update.B), self._heads(path, update))
        return max(1, min(len(rows), self.sizes.heads.dim))

    def _heads(self, path: str, update: Pair) -> int:
        """Return the number of heads of a projection. Check that the rows of B fit these heads."""
        count, heads = _count(path, self.sizes.heads), self.sizes.heads
        if update.B.shape[0] != count * heads.dim:
            why = f"B has {update.B.shape[0]} rows, which do not fit the base's {count} heads of width {heads.dim}"
            raise ShapeMismatch(why, where=path, cure=USE_ITS_BASE)
        return count

    def _layer(self, block: int, path: str) -> tuple[Lazy, Lazy]:
        layer, update = self.family.layers[path], self.by_layer.get((block, path))
        heads = self.sizes.heads
        if update is None:
            out, width = self._shape(path)
            lead = {
                "in out": (width,), "heads dim out": (heads.query, heads.dim),
                "in heads dim": (width, _count(path, heads)), "heads in dim": (_count(path, heads), width),
            }[layer.axes]  # fmt: skip
            last = heads.dim if layer.shares else out
            return zeros((*lead, self.rank), self.dtype), zeros((self.rank, last), self.dtype)
        A, B = as_lazy(update.A), as_lazy(update.B)
        if not layer.shares:
            a = padded(turned(A), self.rank, 1)
            if layer.axes == "heads dim out":
                if A.shape[1] != heads.query * heads.dim:
                    why = (
                        f"A has {A.shape[1]} columns, which do not fit the base's {heads.query} heads of width "
                        f"{heads.dim}"
                    )
                    raise ShapeMismatch(why, where=path, cure=USE_ITS_BASE)
                a = a.reshape(heads.query, heads.dim, self.rank)
            return a, padded(turned(B), self.rank, 0)
        return self._shared(A, B, self._heads(path, update), layer)

    def _shared(self, A: Lazy, B: Lazy, count: int, layer: KerasLayer) -> tuple[Lazy, Lazy]:
        """Return the tensors of a projection whose heads share `lora_kernel_b`."""
        dim, width = self.sizes.heads.dim, A.shape[1]
        first = layer.axes == "heads in dim"
        shape = (count, width, self.rank) if first else (width, count, self.rank)

        def b() -> Array:
            import numpy as np

            rows, _ = _shared_rows(as_array(B), count)
            whole = np.zeros((self.rank, dim), self.dtype.array)
            if len(rows) > dim:
                np.fill_diagonal(whole[:dim], 1)
            else:
                whole[: len(rows)] = rows
            return whole

        def a() -> Array:
            import numpy as np

            rows, places = _shared_rows(as_array(B), count)
            factor = as_array(A).astype("f8")
            whole = np.zeros((count, width, self.rank))
            if len(rows) > dim:
                change = as_array(B).astype("f8") @ factor
                whole[:, :, :dim] = change.reshape(count, dim, width).transpose(0, 2, 1)
            else:
                for head, row, column in places:
                    whole[head, :, column] += factor[row]
            with np.errstate(over="ignore"):
                joined_leaf = np.ascontiguousarray(whole if first else whole.transpose(1, 0, 2), self.dtype.array)
            largest = float(np.abs(whole).max())
            if not np.isfinite(joined_leaf).all() or 0 < largest < float(np.finfo(self.dtype.array).smallest_normal):
                cure = "Write a format that stores A and B, such as adapterkit's own: --to adapterkit"
                raise Malformed(f"the change is outside the range of {self.dtype}", where=layer.name, cure=cure)
            return joined_leaf

        return _computed(shape, self.dtype, a), _computed((self.rank, dim), self.dtype, b)

    def _shape(self, path: str) -> tuple[int, int]:
        """Return (out, in) of a module without an update, from the update of the same module in another block."""
        return next((u.B.shape[0], u.A.shape[1]) for (_, name), u in self.by_layer.items() if name == path)


def _shared_rows(B: Array, count: int) -> tuple[Array, list[tuple[int, int, int]]]:
    """Return the rows that `lora_kernel_b` needs to express a factor B, and the heads that use each row.

    Args:
        B: the factor `[heads * dim, r]`.
        count: the number of heads.

    Returns:
        (rows, uses). B has one part `[dim, r]` for each head. `rows` is `[n, dim]`: it contains each distinct non-zero
        column of these parts once. `uses` has an entry (head, row of A, index in `rows`) for each non-zero column.
    """
    import numpy as np

    by_head = B.reshape(count, -1, B.shape[1]).transpose(0, 2, 1)
    index: dict[bytes, int] = {}
    rows: list[Array] = []
    places: list[tuple[int, int, int]] = []
    for head, row in np.argwhere(by_head.any(axis=2)):
        values = by_head[head, row] + 0  # A negative zero becomes zero.
        at = index.setdefault(values.tobytes(), len(rows))
        if at == len(rows):
            rows.append(values)
        places.append((int(head), int(row), at))
    return (np.stack(rows) if rows else np.zeros((0, by_head.shape[2]), B.dtype)), places


def _computed(shape: tuple[int, ...], dtype: DType, compute: Callable[[], Array]) -> Lazy:
    return Lazy(shape, dtype, lambda: bytes_of(compute()))
