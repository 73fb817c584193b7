"""Read and write llama.cpp's LoRA adapters: GGUF files whose `general.type` is `adapter`.

Older `ggla` files can be read, but not written.

An adapter file has the same module names as the base's GGUF file. For each architecture, a table translates these names
to the names in transformers. For some architectures, llama.cpp stores the rows of q and k in Meta's order. This order
depends on the numbers of heads, so for these architectures, the reader and the writer need the base's config.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import AdapterkitError
from ...io.inputs import is_ggla, is_gguf
from .._format import Format

if TYPE_CHECKING:
    from ...core.adapter import Adapter
    from ...io.checkpoint import Checkpoint


class GgufAdapter(Format):
    """llama.cpp's LoRA adapters, including activated LoRA."""

    url = "https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py"
    description = "llama.cpp: a GGUF file of type adapter; ggla files are only read"
    models = "language"
    file = "adapter.gguf"
    methods = frozenset({"alora", "lora"})
    compat = frozenset({"convert-lora-to-ggml", "finetune"})

    def sniff(self, path: Path) -> bool:
        return is_ggla(path) or (is_gguf(path) and _is_adapter(path))

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        from ...io.gguf_file import read_gguf
        from .conversion import decode, read_legacy

        try:
            if is_ggla(path):
                return read_legacy(path, compat, base)
            return decode(read_gguf(path), base)
        except AdapterkitError as error:
            raise error.at(path=path) from None

    def outline(self, path: Path) -> Adapter:
        from ...io.gguf_file import read_gguf
        from .conversion import decode

        return self.read(path) if is_ggla(path) else decode(read_gguf(path), None, outline=True)

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        from .conversion import save

        return save(adapter, path, on_loss, base)


def _is_adapter(path: Path) -> bool:
    from ...io.gguf_file import GgufValue, read_gguf
    from .conversion import TYPE

    try:
        return read_gguf(path, tensors=False).values.get(TYPE) == GgufValue("string", "adapter")
    except AdapterkitError:
        return False
