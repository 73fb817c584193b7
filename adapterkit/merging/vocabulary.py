"""Merge adapters that were trained on an embedding or a head with more or fewer rows than the base has.

Users add tokens with `resize_token_embeddings` before training, so the stored base lacks the rows of these tokens. The
adapter's file may contain these rows, because PEFT saves the complete resized layers next to the low-rank factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ..errors import USE_ITS_BASE, NotMergeable, ShapeMismatch, Unsupported, UsageError
from ..io.lazy import Lazy, as_array, as_lazy, bytes_of
from ..methods.replacement import Replacement
from ..methods.rows import Rows
from ..naming.ties import is_embedding, is_head
from ..quant import Dequantized

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Array, Buffer, Leaf
    from ..io.strict_json import JsonValue
    from ..naming.binding import Site
    from ..naming.binding.fitting import Shapes

GROW, KEEP = "grow", "keep"

PADDING = 32
"""If the base has more rows than the adapter was trained with, the base's extra rows at the end count as padding.

If more than `1 / PADDING` of the base's rows are extra, the merge raises an error, unless `--vocab` is `keep`.

Examples of padding, according to configs and tokenizers: Qwen 2.5 has 271 such rows among 151,936 rows; Phi-3 has 53
among 32,064; DeepSeek has 2,385 among 102,400.
"""

_BLOCK = 1 << 20
"""The number of elements that are read per step to compute the mean row."""

_ZEROS = "final_logits_bias"
"""The name of the bias `[1, rows]` of BART's and Marian's logits; transformers fills new elements with zeros."""


def parse_vocab(vocab: str | None) -> str | None:
    """Check and return the option `vocab`.

    Raises:
        UsageError: `vocab` is not `grow`, `keep` or None.
    """
    if vocab not in (None, GROW, KEEP):
        raise UsageError(
            f"the choice {vocab!r} for the vocabulary is unknown", cure=f"Pass {_flag(GROW)} or {_flag(KEEP)}"
        )
    return vocab


@dataclass(frozen=True, slots=True, eq=False)
class _Use:
    """One adapter's updates of one embedding or head.

    Attributes:
        position: the adapter's index in the merge's list of adapters.
        adapter: the adapter's name.
        layer: the name of the tensor that the adapter changes. For a tied head, this name differs from `stored`.
        stored: the name under which the base stores the tensor.
        axis: the axis of the updates that runs over token ids, `in` or `out`.
        updates: the adapter's updates of the tensor.
        rows: the number of rows that the tensor had in training; None if the adapter changes only individual rows.
        tokens: the ids of the tokens whose rows the adapter changes individually, with `Rows` updates.
    """

    position: int
    adapter: str
    layer: str
    stored: str
    axis: str
    updates: tuple[Update, ...]
    rows: int | None
    tokens: tuple[int, ...]

    def given(self, start: int, stop: int) -> set[int]:
        """Return the row numbers from `start` to `stop - 1` for which the adapter's file contains values."""
        whole = any(isinstance(update, Replacement) and update.changes_weight for update in self.updates)
        given_tokens = set(range(start, min(stop, self.rows or 0))) if whole else set()
        return given_tokens | {token for token in self.tokens if start <= token < stop}

    def values(self, start: int, stop: int) -> Iterator[tuple[int, Array]]:
        """Yield (row number, values in the adapter's file) for each row that `given` returns."""
        wanted = self.given(start, stop)
        for update in self.updates:
            if isinstance(update, Replacement) and update.weight is not None and start < (self.rows or 0):
                last = min(stop, self.rows or 0)
                for number, row in zip(range(start, last), self._whole(update.weight, start, last), strict=True):
                    wanted.discard(number)
                    yield number, row
            elif isinstance(update, Rows):
                table = as_array(update.values)
                yield from ((n, table[at]) for at, n in enumerate(self.tokens) if n in wanted)

    def _whole(self, leaf: Leaf, start: int, stop: int) -> Array:
        import numpy as np

        tensor = as_lazy(leaf)
        if self.axis == "in":
            return as_array(tensor)[:, start:stop].T
        width = tensor.shape[1]
        data = tensor.read(start * width, (stop - start) * width)
        return np.frombuffer(data, tensor.dtype.numpy).view(tensor.dtype.array).reshape(stop - start, width)


class Vocabulary:
    """Compares the vocabulary sizes of a base and of the adapters to merge, and adds missing rows to the base.

    Args:
        base: the base as the merge reads it.
        aliases: a map from the names of tied tensors to the name under which the base stores the tensor.
        choice: `grow`, `keep`, or None. With None, the merge adds rows if the adapters' files contain all new rows,
            and raises an error otherwise.
    """

    def __init__(self, base: Checkpoint, aliases: Mapping[str, str], choice: str | None) -> None:
        self.base, self.aliases, self.choice = base, aliases, choice
        embeddings = {name: t.shape for name, t in base.tensors.items() if is_embedding(name) and len(t.shape) == 2}
        heads = {name: t.shape for name, t in base.tensors.items() if is_head(name) and t.shape in embeddings.values()}
        self.tables = embeddings | heads
        self.uses: list[_Use] = []
        self.made_for: dict[tuple[int, str], int] = {}
        self.warnings: list[str] = []
        self.sizes: dict[int, int] = {}
        self.filled: dict[str, str] = {}

    def settle(
        self, position: int, adapter: str, sites: Sequence[Site], shapes: Shapes
    ) -> tuple[list[Site], dict[str, tuple[int, ...]]]:
        """Compare an adapter's vocabulary size with the base's; cut the adapter's updates, or record the new size.

        Args:
            position: the adapter's index in the merge's list of adapters.
            adapter: the adapter's name.
            sites: the adapter's targets with their stored tensors.
            shapes: the shapes of the base's tensors, including tied names.

        Returns:
            (sites, shapes). If `choice` is `keep`, updates that have more rows than the base are cut to the base's
            rows. For all other updates, `shapes` has the number of rows that their tensor had in training.

        Raises:
            ShapeMismatch: the adapter has far fewer rows than the base.
            NotMergeable: an update cannot be cut to the base's rows.
        """
        sites, shapes = list(sites), dict(shapes)
        uses = [(at, use) for at, site in enumerate(sites) if (use := self._use(position, adapter, site)) is not None]
        for layer in dict.fromkeys(use.layer for _, use in uses):
            here = [(at, use) for at, use in uses if use.layer == layer]
            rows = {use.rows for _, use in here if use.rows is not None}
            table = self.tables[here[0][1].stored]
            if len(rows) > 1:  # The updates disagree on the number of rows; a later check of shapes refuses them.
                continue
            tokens = max((token for _, use in here for token in use.tokens), default=-1)
            needed = max(next(iter(rows), table[0]), tokens + 1)
            self.uses += [use for _, use in here]
            if needed > table[0] and self.choice == KEEP:
                for at, use in here:
                    sites[at] = replace(sites[at], updates=_cut(use, table[0]))
                self._say_kept(adapter, layer, table[0], needed)
                continue
            if needed < table[0]:
                self._check_padded(adapter, layer, table[0], needed)
            if needed != table[0]:
                shapes[layer] = (needed, *table[1:])
                for bias in {bias for at, _ in here if (bias := sites[at].bias) is not None}:
                    shapes[bias] = (needed,)
                    self.made_for[position, bias] = needed
                self.made_for[position, layer] = needed
        return sites, shapes

    def rows(self, position: int, layer: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a weight or bias, with the number of rows that this tensor had in training."""
        rows = self.made_for.get((position, layer))
        return (rows, *shape[1:]) if shape and rows is not None else shape

    def grown(self) -> Checkpoint:
        """Return the base, extended by the rows that the adapters need.

        Raises:
            ShapeMismatch: some of the rows are in no adapter's file, and the choice is not `grow`.
            UsageError: two adapters have different rows for the same new token.
            Unsupported: the base would have to be quantized again.
        """
        for use in self.uses:
            rows, needed = self.tables[use.stored][0], self.made_for.get((use.position, use.layer), 0)
            if needed > rows:
                self.sizes[rows] = max(needed, self.sizes.get(rows, 0))
        if not self.sizes:
            if self.choice == GROW:
                self.warnings.append(
                    '--vocab grow (vocab="grow") changes nothing: no adapter has more rows than the base'
                )
            return self.base
        if isinstance(self.base, Dequantized) and self.base.packs:
            cure = 'Merge with --quantized dequantize (quantized="dequantize"), or --vocab keep (vocab="keep")'
            raise Unsupported("the vocabulary of a quantized model cannot grow", path=self.base.root, cure=cure)
        tensors = dict(self.base.tensors)
        # Add rows to every embedding and head that has `rows` rows, because a separate head needs as many rows as the
        # embedding.
        for rows, needed in self.sizes.items():
            for name in self._growing(rows):
                tensors[name] = self._grow(name, rows, needed)
            tables = "; ".join(f"{name}: {how}" for name, how in self.filled.items())
            self.warnings.append(f"the vocabulary grows from {rows} to {needed} rows; new rows of {tables}")
        return replace(self.base, tensors=tensors)

    def config_changes(
        self, config: Mapping[str, JsonValue] | None, changes: Mapping[str, JsonValue]
    ) -> dict[str, JsonValue]:
        """Return the config entries that store the vocabulary size, with the new number of rows as their value.

        Args:
            config: the config of the base.
            changes: the entries of the config that the merge changes for other reasons.
        """
        config_changes: dict[str, Any] = {}
        if config is None:
            return config_changes
        for rows, needed in self.sizes.items():
            now = {**config, **changes, **config_changes}
            keys = [key for key in _SIZES if now.get(key) == rows]
            nested = [
                key for key, value in now.items()
                if isinstance(value, Mapping) and any(value.get(size) == rows for size in _SIZES)
            ]  # fmt: skip
            if not keys and not nested:
                keys, nested = (
                    ([], ["text_config"]) if isinstance(now.get("text_config"), Mapping) else (["vocab_size"], [])
                )
            config_changes |= dict.fromkeys(keys, needed)
            for key in nested:
                sizes = [size for size in _SIZES if now[key].get(size) == rows] or ["vocab_size"]
                config_changes[key] = {**now[key], **dict.fromkeys(sizes, needed)}
        return config_changes

    def record(self) -> dict[str, JsonValue] | None:
        """Return the vocabulary's entry in the merge record; None if no rows are added and `choice` is not `keep`."""
        if self.sizes:
            rows, needed = next(iter(self.sizes.items()))
            return {"choice": GROW, "from": rows, "rows": needed, "filled": dict(self.filled)}
        return {"choice": KEEP} if self.choice == KEEP else None

    def _use(self, position: int, adapter: str, site: Site) -> _Use | None:
        stored = None if site.weight is None else self.aliases.get(site.weight, site.weight)
        target = site.target
        if stored not in self.tables or target.stacked or target.rows is not None or site.weight is None:
            return None
        declared = "in" if target.layout.startswith("in") else "out"
        for axis in dict.fromkeys((declared, "out", "in")):
            rows_here = _rows_along(axis, site.updates, self.tables[stored][1])
            if rows_here is not None:
                return _Use(position, adapter, site.weight, stored, axis, site.updates, *rows_here)
        return None

    def _check_padded(self, adapter: str, layer: str, rows: int, made_for: int) -> None:
        """Warn if the base seems to have padding rows that the adapter lacks; refuse an adapter of another model.

        Raises:
            ShapeMismatch: the base has more than `rows // PADDING` rows that the adapter lacks.
        """
        if rows - made_for > rows // PADDING and self.choice != KEEP:
            cure = (
                f"{USE_ITS_BASE}. If the base's last rows are padding, "
                f"pass {_flag(KEEP)} to change only the first {made_for} rows"
            )
            raise ShapeMismatch(f"{adapter} was made for {made_for} rows; the base has {rows}", where=layer, cure=cure)
        self.warnings.append(
            f"{adapter} was trained on {made_for} rows of {layer}; the base has {rows}: the other rows stay unchanged"
        )

    def _say_kept(self, adapter: str, layer: str, rows: int, needed: int) -> None:
        self.warnings.append(
            f"rows {rows} to {needed - 1} of {layer} in {adapter} are dropped: the output has the base's {rows} rows, "
            f"without the trained rows of the added tokens; pass {_flag(GROW)} to keep these rows"
        )

    def _growing(self, rows: int) -> list[str]:
        """Return the names of the embeddings and heads with `rows` rows, and of the heads' biases."""
        tables = [name for name, shape in self.tables.items() if shape[0] == rows]
        biases = [
            name for name, tensor in self.base.tensors.items()
            if (tensor.shape == (rows,) and name.endswith(".bias") and is_head(f"{name.removesuffix('.bias')}.weight"))
            or (tensor.shape == (rows,) and name.endswith("cls.predictions.bias"))
            or (tensor.shape == (1, rows) and name.endswith(_ZEROS))
        ]  # fmt: skip
        return tables + biases

    def _grow(self, name: str, rows: int, needed: int) -> Lazy:
        """Return the base's tensor `name` with its new rows.

        Raises:
            ShapeMismatch, UsageError: as for `grown`.
        """
        tensor = self.base.tensors[name]
        if name.endswith(_ZEROS):
            self.filled[name] = "zeros"
            return _longer(tensor, (1, needed), lambda: bytes((needed - rows) * tensor.dtype.itemsize))
        # For the embedding, also use the rows of a tied head: an adapter's file may contain only the head's rows.
        uses = sorted((use for use in self._holding(name)), key=lambda use: use.layer != use.stored)
        given = set[int]().union(*(use.given(rows, needed) for use in uses))
        if len({use.position for use in uses if use.given(rows, needed)}) > 1:
            _check_alike(name, uses, rows, needed)
        missing = needed - rows - len(given)
        if missing and self.choice != GROW:
            raise self._unknown(name, rows, needed, missing)
        who = " and ".join(dict.fromkeys(use.adapter for use in uses if use.given(rows, needed)))
        mean = (
            f"the mean of the base's rows for {missing} new rows, because no file has the values that these rows had "
            "at the start of training (transformers draws new rows at random around this mean)"
        )
        self.filled[name] = " and ".join([*([f"from {who}"] if who else ()), *([mean] if missing else ())])
        return _longer(tensor, (needed, *tensor.shape[1:]), partial(_fresh, tensor, uses, rows, needed, bool(missing)))

    def _holding(self, name: str) -> list[_Use]:
        return [use for use in self.uses if use.stored == name]

    def _unknown(self, name: str, rows: int, needed: int, missing: int) -> ShapeMismatch:
        who = " and ".join(
            dict.fromkeys(use.adapter for use in self.uses if self.made_for.get((use.position, use.layer), 0) > rows)
        )
        why = (
            f"{who} was trained on {needed} rows of the vocabulary; the base has {rows}, and {missing} of the new rows "
            f"of {name} are in no adapter's file"
        )
        cure = (
            f"{_flag(GROW)} adds all new rows, and fills rows that are in no file with the mean of the base's rows; "
            f"{_flag(KEEP)} drops the added tokens. "
        )
        if is_head(name):
            # PEFT saves a resized embedding next to the factors. It does not save a head that has no adapter, not even
            # with save_embedding_layers=True.
            cure += (
                "PEFT saves the new rows of a head only if the adapter changes the head. For an exact merge, save the "
                "resized model with save_pretrained, and pass it as the base. "
            )
        cure += USE_ITS_BASE
        return ShapeMismatch(why, path=self.base.root, where=name, cure=cure)


def _rows_along(axis: str, updates: Sequence[Update], width: int) -> tuple[int | None, tuple[int, ...]] | None:
    """Return (number of rows, token ids of `Rows` updates); None if `axis` cannot be the axis of token ids."""
    rows: set[int] = set()
    tokens: list[int] = []
    for update in updates:
        dims: dict[str, Any] = dict(update.dims())
        rest = dims.get("rest", ())
        out, inputs = dims.get("out"), dims.get("in", rest[0] if len(rest) == 1 else dims.get("columns"))
        along, across = (out, inputs) if axis == "out" else (inputs, out)
        if across is not None and across != width:
            return None
        if isinstance(update, Rows):
            if axis != "in":
                return None
            tokens += (int(number) for number in as_lazy(update.index).numpy())
        elif along is not None:
            rows.add(along)
    return (next(iter(rows), None), tuple(tokens)) if len(rows) < 2 else None


def _cut(use: _Use, rows: int) -> tuple[Update, ...]:
    """Cut the updates to the first `rows` rows of the vocabulary.

    Raises:
        NotMergeable: an update's method cannot be computed for only some of the rows.
    """
    kept_updates: list[Update] = []
    for update in use.updates:
        if isinstance(update, Rows):
            kept_updates.append(_without_tokens(update, use.tokens, rows))
            continue
        if not update.cuts(use.axis) and not isinstance(update, Replacement):
            why = f"{update.method} needs all rows of the vocabulary that it was trained on"
            raise NotMergeable(why, where=use.layer, cure=f"Pass {_flag(GROW)} to add the rows")
        changes = {}
        for name, leaf in update.tensors.items():
            tensor = as_lazy(leaf)
            if isinstance(update, Replacement):
                at = 0 if use.axis == "out" else 1 if name == "weight" else None
            else:
                at = update.tensor_fields()[name].metadata["axes"].index(use.axis)
            if at is not None:
                changes[name] = _first(tensor, at % len(tensor.shape), rows)
        kept_updates.append(update.replace(**changes))
    return tuple(kept_updates)


def _without_tokens(update: Rows, tokens: Sequence[int], rows: int) -> Rows:
    """Return the update without the rows of tokens that the base lacks. The result may have no rows."""
    kept = [at for at, token in enumerate(tokens) if token < rows]
    index, values = as_lazy(update.index), as_lazy(update.values)
    parts = {
        "index": index.map(lambda array: array[kept], (len(kept),)),
        "values": values.map(lambda array: array[kept], (len(kept), values.shape[1])),
    }
    return update.replace(**parts)


def _first(tensor: Lazy, axis: int, count: int) -> Lazy:
    shape = (*tensor.shape[:axis], count, *tensor.shape[axis + 1 :])
    if axis == 0:
        elements = count * (tensor.nbytes // tensor.dtype.itemsize // tensor.shape[0])
        return Lazy(shape, tensor.dtype, lambda: tensor.read(0, elements), None, tensor.read)
    return tensor.map(lambda array: array[(*[slice(None)] * axis, slice(count))], shape)


def _longer(tensor: Lazy, shape: tuple[int, ...], more: Callable[[], bytes]) -> Lazy:
    """Return a tensor with the bytes of `more()` appended; `more` is called once, when these bytes are first read."""
    size = tensor.dtype.itemsize
    stored_rows = tensor.nbytes // size
    more = cache(more)

    def part(first: int, count: int) -> Buffer:
        before = min(max(stored_rows - first, 0), count)
        data = bytes(tensor.read(first, before)) if before else b""
        if before == count:
            return data
        start = max(first - stored_rows, 0)
        return data + bytes(memoryview(more())[start * size : (start + count - before) * size])

    return Lazy(shape, tensor.dtype, lambda: bytes(tensor.fetch()) + bytes(more()), None, part)


def _fresh(tensor: Lazy, uses: Sequence[_Use], rows: int, needed: int, mean: bool) -> bytes:
    """Return the bytes of a tensor's new rows. Rows that are in no adapter's file get the tensor's mean row."""
    import numpy as np

    table = np.zeros((needed - rows, *tensor.shape[1:]), np.float64)
    if mean:
        table[:] = _mean(tensor)
    for use in reversed(uses):  # Write the first use last, because its rows take precedence.
        for number, row in use.values(rows, needed):
            table[number - rows] = row.astype(np.float64)
    narrow = table if tensor.dtype.name == "F64" else table.astype(np.float32)
    return bytes(bytes_of(narrow.astype(tensor.dtype.array)))


def _mean(tensor: Lazy) -> Array:
    """Return the mean row of a tensor in float64; read about `_BLOCK` elements per step."""
    import numpy as np

    rows, *rest = tensor.shape
    width = tensor.nbytes // tensor.dtype.itemsize // rows
    total = np.zeros(width)
    step = max(1, _BLOCK // width)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        data = np.frombuffer(tensor.read(start * width, count * width), tensor.dtype.numpy).view(tensor.dtype.array)
        total += data.reshape(count, width).astype(np.float64).sum(0)
    return (total / rows).reshape(rest)


def _check_alike(name: str, uses: Sequence[_Use], rows: int, needed: int) -> None:
    """Refuse adapters with different rows for the same new id, because they may use the id for different tokens.

    Raises:
        UsageError: two adapters have different rows for the same token.
    """
    import numpy as np

    seen: dict[int, tuple[_Use, Any]] = {}
    for use in uses:
        for number, row in use.values(rows, needed):
            other, known = seen.setdefault(number, (use, row))
            if other.position != use.position and not np.array_equal(known.astype("f8"), row.astype("f8")):
                raise UsageError(
                    f"{other.adapter} and {use.adapter} have different rows for the added token {number}", where=name,
                    cure="Merge one adapter, or drop the added tokens with --vocab keep (vocab=\"keep\")",
                )  # fmt: skip


def _flag(choice: str) -> str:
    return f'--vocab {choice} (vocab="{choice}")'


_SIZES = ("vocab_size", "decoder_vocab_size")
"""The config keys for the vocabulary size."""
