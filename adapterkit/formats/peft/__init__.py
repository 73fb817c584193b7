"""PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`); see spec/formats/peft.toml.

The file's tensors and about twelve fields of the config determine the method. The module `config` lists every field and
its effect. Each family of tensors has a module that converts keys to updates; `writer` does the reverse.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...core.metadata import read_with, with_metadata
from ...errors import AdapterkitError
from .._format import FORMULA, Departure, Format, derived
from .container import CONFIG, METADATA, SAFETENSORS, SHARDED, TORCH, check_stated, header_of, load, save, sniff

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ...core.adapter import Adapter
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint


def _methods() -> frozenset[str]:
    from .families import FAMILIES
    from .pairs import BESIDE

    return frozenset(map(_name, (*BESIDE, *(m for f in FAMILIES.values() for m in f.methods()))))


def _name(method: type[Update]) -> str:
    return method.__module__.rpartition(".")[2]


def _departures() -> Mapping[str, Departure]:
    from .families import FAMILIES
    from .lora import DEPARTURES

    return DEPARTURES | {name: each for family in FAMILIES.values() for name, each in family.departures.items()}


def _departures_of(methods: Collection[str]) -> Mapping[str, Departure] | None:
    """Return LoRA's departures if all methods are LoRA or its variants; otherwise None.

    For LoRA, this function avoids importing all families.
    """
    from .lora import DEPARTURES
    from .pairs import BESIDE

    return DEPARTURES if {*methods} <= {*map(_name, BESIDE)} else None


def _experts_orders() -> frozenset[str]:
    from .experts import ORDERS

    return ORDERS


def _profiles() -> frozenset[str]:
    from .profiles import profiles

    return frozenset(profiles())


class Peft(Format):
    """Hugging Face PEFT's folders: LoRA and its variants, IA3, whole parameters, token rows, and all of `families`."""

    url = "https://huggingface.co/docs/peft/developer_guides/checkpoint"
    description = "Hugging Face PEFT: adapter_config.json with adapter_model.safetensors or .bin"
    methods = derived(_methods)
    departures = derived(_departures)
    compat = frozenset({FORMULA})
    options = frozenset({"alpha", "rank", "strict"})
    experts_orders = derived(_experts_orders)
    profiles = derived(_profiles)
    owns = frozenset({CONFIG, SAFETENSORS, TORCH, SHARDED[0], "adapter_model-*-of-*.safetensors"})

    @classmethod
    def departures_of(cls, methods: Collection[str]) -> Mapping[str, Departure]:
        found = _departures_of(methods)
        return cls.departures if found is None else found

    def sniff(self, path: Path) -> bool:
        return sniff(path)

    def sniff_loosely(self, path: Path) -> bool:
        from .bare import sniff as sniff_bare

        return sniff_bare(path)

    def read(
        self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None, alpha: float | None = None,
        rank: int | None = None, strict: bool = False,
    ) -> Adapter:  # fmt: skip
        """Read an adapter, lazily.

        Args:
            path: see `Format.read`; may also be a tensor file without adapter_config.json, see `bare`.
            compat: see `Format.read`.
            base: see `Format.read`.
            alpha: LoRA's alpha; needed if neither a config nor the file has alpha.
            rank: the expected rank; an error if the shapes or the config have another rank.
            strict: whether to refuse every field of the config that PEFT does not define.
        """
        from . import bare
        from .reader import decode, without_config

        alone, assumed = bare.is_bare(path) and (path.is_dir() or bare.sniff(path)), False
        if alone:
            config, tensors, header = bare.load(path, alpha, rank)
            assumed = bool(config.pop(bare.ASSUMED, False))
        else:
            config, tensors = load(path)
            header = header_of(path)
        try:
            if not alone:
                check_stated(config, alpha, rank)
            adapter = decode(config, tensors, compat=compat, base=base, strict=strict)
        except AdapterkitError as error:
            raise error.at(path=path) from None
        if alone:
            adapter = without_config(adapter, config, assumed=assumed)
        further = {key: value for key, value in header.items() if METADATA.get(key) != value}
        return read_with(adapter, further)

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        from .writer import encode

        config, tensors, lines = encode(adapter, on_loss=on_loss, base=base)
        save(path, config, tensors, dict(with_metadata(METADATA.items(), adapter)))
        return lines

    def fit(
        self, adapter: Adapter, profile: str, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> tuple[Adapter, list[str]]:
        from .profiles import fitted

        return fitted(adapter, profile, on_loss, base)
