"""Read and write AdapterHub folders: `adapter_config.json` and `pytorch_adapter.bin` or `adapter.safetensors`.

A key contains the adapter's name, and the path of the base inside the saved model. The tensors and the config's
sub-dict `config` determine the method. For each value of `architecture`, a class (its family) converts keys to updates
and back; see spec/formats/adapterhub.toml.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...errors import AdapterkitError
from .._format import FORMULA, Departure, Format, derived
from .container import CONFIG, HEAD_CONFIG, HEADS, INTERFACE, SAFETENSORS, TORCH, load, save, sniff
from .readings import DEPARTURES, REFT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...core.adapter import Adapter
    from ...io.checkpoint import Checkpoint


def _methods() -> frozenset[str]:
    from .families import FAMILIES

    return frozenset(method for family in FAMILIES.values() for method in family.methods)


class AdapterHub(Format):
    """Folders from the `adapters` library, and from its predecessor adapter-transformers."""

    url = "https://docs.adapterhub.ml/loading.html"
    description = "AdapterHub's adapters: adapter_config.json with pytorch_adapter.bin or adapter.safetensors"
    models = "language"
    methods = derived(_methods)
    departures: ClassVar[Mapping[str, Departure]] = DEPARTURES
    compat = frozenset({FORMULA, *REFT})
    owns = frozenset({CONFIG, SAFETENSORS, TORCH, INTERFACE, HEAD_CONFIG, *HEADS})

    def sniff(self, path: Path) -> bool:
        return sniff(path)

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        from .reader import decode

        try:
            return decode(load(path), compat=compat, base=base)
        except AdapterkitError as error:
            raise error.at(path=path) from None

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        from .writer import encode

        content, lines = encode(adapter, on_loss=on_loss, base=base)
        save(path, content)
        return lines
