"""LoRA of Megatron-Bridge and NeMo 2: a torch or safetensors state dict; alpha is in `megatron.json` next to it.

Plain LoRA has one pair for a fused weight; canonical LoRA has a pair for each part. If a checkpoint is distributed over
ranks, its parts must be gathered first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..core.adapter import Adapter, Foreign, Step
from ..errors import AdapterkitError
from ..naming.megatron import bridge
from ._format import Format
from ._leftovers import Leftovers, in_order, remembered
from ._megatron import decode, encode, heads_again, is_of, why_not
from ._one_number import of_one_alpha
from ._state_dicts import keys_of, load, read_settings, save, write_settings

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint

FORMAT = "megatron"
SETTINGS = "megatron.json"
PREFIX = "decoder.layers."


class MegatronHints(Leftovers, total=False):
    """The leftovers of a checkpoint: the prefix of names, whether pairs are fused, the numbers of heads, and alpha."""

    prefix: str
    fused: bool
    heads: tuple[int, int, int]
    alpha: float


class Megatron(Format):
    """Megatron-Bridge's LoRA and canonical LoRA."""

    url = "https://github.com/NVIDIA-NeMo/Megatron-Bridge"
    description = "Megatron-Bridge and NeMo 2: a state dict with adapter.linear_in and linear_out, with megatron.json"
    models = "language"
    file = "adapter.pt"
    methods = frozenset({"lora"})
    owns = frozenset({SETTINGS})

    def sniff(self, path: Path) -> bool:
        return is_of(keys_of(path), bridge())

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        alpha = float(read_settings(path.with_name(SETTINGS), ("alpha",), '{"alpha": <alpha>}')["alpha"])
        heads = heads_again(None, base, "linear_qkv")
        try:
            updates, data = decode(load(path), bridge(), alpha, heads, base)
        except AdapterkitError as error:
            raise error.at(path=path) from None
        if data["fused"] and base is not None and base.config is not None:
            found = heads()
            data["heads"] = [found.query, found.kv, found.dim]
        data["alpha"] = alpha
        return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = remembered(adapter, FORMAT, MegatronHints)
        alpha, pairs, lines = of_one_alpha(
            adapter, why_not(bridge()), dialect="Megatron", on_loss=on_loss, first=hints.get("alpha"), one_rank=True
        )
        heads = heads_again(hints.get("heads"), base, "linear_qkv")
        tensors, _ = encode(pairs, bridge(), hints.get("prefix", PREFIX), heads, hints.get("fused"))
        save(path, in_order(tensors, hints))
        write_settings(path.with_name(SETTINGS), {"alpha": alpha})
        return lines
