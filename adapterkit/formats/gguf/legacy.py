"""Read `ggla` files, the format before GGUF: only Llama; A is transposed; all modules have one r and one alpha."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...core.adapter import Adapter, Step, Target
from ...errors import ShapeMismatch, TargetNotFound, UsageError
from ...io.arrange import turned
from ...io.ggla import read_ggla
from ...methods.lora import LoRA
from ...naming.architectures import WEIGHT
from ...naming.binding import bind
from ...naming.binding.translating import moves_of, translated
from ...naming.gguf import family_of
from ...naming.heads import undone
from .._pairs import DAMAGED, check_factors, grouped, in_row_order
from .place import GgufPlace
from .reader import FORMAT

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint
    from ...naming.heads import Rows
    from .._pairs import Pair


def read_legacy(path: Path, compat: str | None, base: Checkpoint | None) -> Adapter:
    """Read the adapter in a file; see the format for `compat`."""
    file = read_ggla(path)
    place = GgufPlace("llama", family_of("llama", ()), None if base is None else base.config)
    held: dict[Target, tuple[Pair, ...]] = {}
    for name, slots in grouped(file.tensors, {".weight.loraA": "A", ".weight.loraB": "B"}, "a ggla file").items():
        foreign = _modern(name)
        slots = {**slots, "A": turned(slots["A"])} if len(slots["A"].shape) == 2 else slots
        if check_factors(name, slots) != file.rank:
            raise ShapeMismatch(f"the rank is not the file's {file.rank}", where=name, cure=DAMAGED)
        update = LoRA(**slots, scaling=file.alpha / file.rank)
        order = _legacy_order(place, name, foreign, compat, update.B.shape[0])
        held[Target(foreign)] = (
            update if order is None else in_row_order(update, lambda order=order: undone(order)),  # type: ignore[misc]
        )  # fmt: skip
    moves = moves_of(held, place.family, WEIGHT)
    if unknown := next((target.path for target in held if target.path not in moves), None):
        raise TargetNotFound("a Llama has no weight with this name", where=unknown, cure=DAMAGED)
    updates = translated(held, moves)
    if base is not None:
        updates = dict(bind(Adapter(updates), base).adapter.updates)
    return Adapter(updates, recipe=(Step("read", {"format": FORMAT, "container": "ggla"}),))


def _legacy_order(place: GgufPlace, name: str, foreign: str, compat: str | None, rows: int) -> Rows | None:
    """Return the order of rows, or None: llama.cpp's converter kept PEFT's order, its training has its base's."""
    where = place.where(foreign)
    if where is None or where.rows is None or compat == "convert-lora-to-ggml":
        return None
    if name.startswith("layers.") and compat is None:
        return None
    if compat is None:
        why = "the order of these rows depends on the tool that wrote the file, which the file does not state"
        cure = (
            "State the tool with --compat (compat=): convert-lora-to-ggml for PEFT, finetune for llama.cpp's training"
        )
        raise UsageError(why, where=name, cure=cure)
    return place.order(foreign, rows)


_OLD = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
}  # fmt: skip


def _modern(name: str) -> str:
    """Return today's GGUF name for a name in old files."""
    first, _, rest = name.partition(".")
    number, _, module = rest.partition(".")
    return f"blk.{number}.{_OLD[module]}" if first == "layers" and module in _OLD else name
