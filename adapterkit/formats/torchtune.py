"""torchtune's adapter checkpoints, `adapter_model.pt`: a torch file with torchtune's module names.

The rows of q and k may be in Meta's order, in which the two rows that RoPE rotates together are adjacent. The file does
not contain alpha. Alpha is in `torchtune.json` next to the file, or in torchtune's `adapter_config.json`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from ..core.adapter import Adapter, Foreign, Step, Target
from ..errors import PASS_BASE, PASS_BASE_WITH_CONFIG, AdapterkitError, Unsupported, UsageError
from ..io.arrange import times, widened
from ..io.checkpoint import read_json
from ..io.lazy import Lazy, as_lazy
from ..methods.dora import DoRA
from ..methods.dora_outputs import DoRAOutputs
from ..methods.lora import LoRA
from ..naming.architectures import namings_of
from ..naming.heads import heads_of, rope_pairs, undone
from ..naming.tool_names import NameTable, TableNames, modules_of
from ._containers import keys_of, load, read_settings, save, write_settings
from ._format import FORMULA, Departure, Format
from ._kit import (
    Leftovers,
    check_factors,
    expressible,
    grouped,
    in_order,
    in_row_order,
    is_finite,
    leftovers,
    one_alpha,
    pair,
    unfit,
)

if TYPE_CHECKING:
    from ..io.arrange import Order
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from ..naming.heads import Rows
    from ._kit import Pair

FORMAT = "torchtune"
SETTINGS, CONFIG = "torchtune.json", "adapter_config.json"
_SLOTS = {".lora_a.weight": "A", ".lora_b.weight": "B", ".magnitude": "magnitude"}


_BIASED = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
"""The ends of the names of the modules that have a bias in some of torchtune's models, such as Qwen2."""

DEPARTURES = {
    "dora_bias": Departure(
        "dora_outputs with scaling * B as B: the quotient of magnitude and norm multiplies the weight and the bias",
        "dora: the bias is unchanged",
    )
}


class TorchtuneHints(Leftovers, total=False):
    """Kept for the writer: alpha, the numbers of heads, and whether the rows of q and k are in Meta's order."""

    alpha: float
    heads: dict[str, Annotated[int, msgspec.Meta(ge=1)] | bool]


class Torchtune(Format):
    """torchtune's adapter checkpoints."""

    url = "https://github.com/pytorch/torchtune"
    description = "torchtune: adapter_model.pt with torchtune's names, and torchtune.json or adapter_config.json"
    models = "language"
    file = "adapter_model.pt"
    methods = frozenset({"lora", "dora"})
    compat = frozenset({FORMULA})
    departures = DEPARTURES
    owns = frozenset({SETTINGS, CONFIG})

    def sniff(self, path: Path) -> bool:
        return any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in keys_of(path))

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        alpha = _alpha(path)
        try:
            tensors = load(path)
            order = _Order({}, base)
            names = TableNames(table(), None if base is None else modules_of(base.tensors))
            updates: dict[Target, tuple[Pair | DoRAOutputs, ...]] = {}
            for foreign, slots in grouped(tensors, _SLOTS, FORMAT).items():
                update = pair(slots, alpha / check_factors(foreign, slots))
                rows = order.of(foreign, update.B.shape[0])
                target = Target(names.back(foreign), "in out *k" if foreign == "tok_embeddings" else "out *in")
                ordered = update if rows is None else in_row_order(update, _undone(rows))
                whole = isinstance(ordered, DoRA) and compat != FORMULA and _has_bias(foreign, target, base)
                updates[target] = (_on_outputs(ordered) if whole else ordered,)
        except AdapterkitError as error:
            raise error.at(path=path) from None
        data: dict[str, JsonValue] = {"order": list(tensors), "alpha": alpha, "heads": order.known}
        return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = leftovers(adapter, FORMAT, TorchtuneHints)
        names, order = TableNames(table()), _Order(hints.get("heads", {}), base)

        outputs = [t for t, us in adapter.updates.items() if any(isinstance(u, DoRAOutputs) for u in us)]

        def why(target: Target, update: Pair) -> str:
            foreign = names.there(target.path)
            if foreign is None:
                return "its module has no name in torchtune"
            if isinstance(update, DoRA) and target not in outputs and _has_bias(foreign, target, base):
                return "torchtune's DoRA also multiplies the module's bias"
            return unfit(target, update)

        # Without a scaling, both methods have the same tensors, and torchtune computes `dora_outputs`.
        updates = {t: tuple(u.without_bias() if t in outputs else u for u in us) for t, us in adapter.updates.items()}
        pairs, lines = expressible(adapter.replace(updates=updates), FORMAT, on_loss, why, (LoRA, DoRA))
        alpha, pairs, folded = one_alpha(pairs, format_name=FORMAT, on_loss=on_loss, first=hints.get("alpha"))
        tensors: dict[str, Lazy] = {}
        for target, update in pairs.items():
            foreign = str(names.there(target.path))
            rows = order.of(foreign, update.B.shape[0])
            ordered = update if rows is None else in_row_order(update, _as_is(rows))
            ends = {field: end for end, field in _SLOTS.items()}
            tensors |= {foreign + ends[field]: as_lazy(leaf) for field, leaf in ordered.tensors.items()}
        save(path, in_order(tensors, hints))
        write_settings(path.with_name(SETTINGS), {"alpha": alpha})
        return lines + folded


class _Order:
    """Determines the order of a module's rows, which depends on the base's model family and its numbers of heads."""

    def __init__(self, known: Mapping[str, int | bool], base: Checkpoint | None) -> None:
        self.known, self.base = dict(known), base

    def of(self, foreign: str, rows: int) -> Rows | None:
        kind = next((kind for end, kind in turned().items() if foreign.endswith(end)), None)
        if kind is None or not self._turned(foreign):
            return None
        if kind not in self.known:
            heads = heads_of(None if self.base is None else self.base.config, foreign)
            self.known |= {"query": heads.query, "kv": heads.kv}
        return rope_pairs(rows, self.known[kind], foreign)

    def _turned(self, where: str) -> bool:
        if "turned" not in self.known:
            config = (None if self.base is None else self.base.config) or {}
            if not config:
                why = "the order of this module's rows depends on the base's model family and numbers of heads"
                raise UsageError(why, where=where, cure=PASS_BASE_WITH_CONFIG)
            model = config.get("model_type")
            if not isinstance(model, str) or model not in meta_order():
                known = f"Known: {', '.join(meta_order())}"
                raise Unsupported(
                    f"the order of rows is unknown for model_type {model!r}", where="config.json", cure=known
                )
            self.known["turned"] = meta_order()[model]
        return bool(self.known["turned"])


def _has_bias(foreign: str, target: Target, base: Checkpoint | None) -> bool:
    """Whether the base's module has a bias.

    Raises:
        UsageError: there is no base, and this module has a bias in some families.
    """
    if base is not None:
        return f"{target.path}.bias" in base.tensors
    if foreign.endswith(_BIASED):
        why = "torchtune's DoRA also multiplies the module's bias, and only the base shows whether there is one"
        raise UsageError(why, where=foreign, cure=PASS_BASE)
    return False


def _on_outputs(update: Pair) -> DoRAOutputs:
    """Return the function that torchtune's DoRA computes at a module with a bias."""
    assert isinstance(update, DoRA)
    B = times(widened(as_lazy(update.B), "F32"), update.scaling)
    return DoRAOutputs.from_fields(A=update.A, B=B, magnitude=update.magnitude)


def _alpha(path: Path) -> float:
    config = path.with_name(CONFIG)
    if not path.with_name(SETTINGS).exists() and config.exists():
        alpha = is_finite(read_json(config, strict=True).get("lora_alpha"), f"{CONFIG}: lora_alpha")
        if alpha:
            return alpha
    return float(read_settings(path.with_name(SETTINGS), ("alpha",), '{"alpha": <lora_alpha>}')["alpha"])


def _undone(rows: Rows) -> Order:
    return lambda: undone(rows)


def _as_is(rows: Rows) -> Order:
    return lambda: rows


_EXPORTED = {"base_model_name_or_path", "lora_alpha", "peft_type", "r", "target_modules"}
"""The fields of the configs that torchtune writes for PEFT. PEFT and all other tools write more fields."""


def check_export(folder: Path, settings: Collection[str], keys: Collection[str], base: Checkpoint | None) -> None:
    """Refuse a folder of torchtune whose files for PEFT do not compute what torchtune trained.

    torchtune saves an adapter twice: as `adapter_model.pt`, and converted for PEFT. The conversion reorders the rows of
    q and k for every family, also for those whose rows are not in Meta's order. It does not reorder the magnitudes of
    DoRA.

    Args:
        folder: the folder of PEFT's files.
        settings: the fields of PEFT's config.
        keys: the keys of PEFT's tensors.
        base: the base, if known. Otherwise its config.json shows the family; torchtune copies this file to `folder`.

    Raises:
        Unsupported: the files for PEFT have rows in a wrong order.
    """
    unchanged = folder / Torchtune.file
    magnitude = next((key for key in keys if key.endswith("lora_magnitude_vector")), None)
    turned_key = next((key for key in keys if ".self_attn.q_proj." in key or ".self_attn.k_proj." in key), None)
    where = magnitude or turned_key
    if where is None or not _EXPORTED.issuperset(settings) or not Torchtune().sniff(unchanged):
        return
    if base is not None and base.config is not None:
        config: Mapping[str, object] = base.config
    else:
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    cure = f"Pass the file {unchanged}, which torchtune saved unchanged"
    if magnitude is not None:
        why = "torchtune's conversion for PEFT omits use_dora, and puts the magnitudes of q and k into a wrong order"
        raise Unsupported(why, where=where, cure=cure)
    if meta_order().get(str(config.get("model_type"))) is False:
        why = "torchtune's conversion for PEFT puts the rows of B of q and k into a wrong order"
        raise Unsupported(why, where=where, cure=cure)


# torchtune's names and orders of rows, from spec/architectures/namings.


@cache
def table() -> NameTable:
    """Return the table that maps our name templates to torchtune's. All model families have the same table."""
    return NameTable({key: place.name for key, place in namings_of("torchtune")[0].places().items()})


@cache
def meta_order() -> dict[str, bool]:
    """Return, for each model_type, whether torchtune stores the rows of q and k in Meta's order."""
    return {
        model_type: any(place.rows for place in naming.places().values())
        for naming in namings_of("torchtune")
        for model_type in naming.model_types
    }


@cache
def turned() -> dict[str, str]:
    """Map the end of a module's name to `query` or `kv`, the kind of heads to which the module's rows belong."""
    places = [place for naming in namings_of("torchtune") for place in naming.places().values()]
    return {place.name.rpartition("{n}.")[2]: place.heads for place in places if place.heads is not None}
