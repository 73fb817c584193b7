"""PEFT's folder for experts with shared outer factors: all experts of a stack have the same A, or the same B.

SGLang serves such adapters with `--experts-shared-outer-loras`, and Megatron-Bridge trains them. The outer factor is
the A of gate and up, and the B of down; its shape is `[1, ...]`. The other (inner) factor has one slice per expert.
SGLang also reads stacks without shared factors, with the shapes `[e, r, in]` and `[e, out, r]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import AdapterkitError
from ...io import safetensors
from ...naming.shared_outer import is_shared_outer
from .._folders import folder_of
from .._format import Format
from ..peft.container import CONFIG, SAFETENSORS

if TYPE_CHECKING:
    from ...core.adapter import Adapter
    from ...io.checkpoint import Checkpoint


class SharedOuter(Format):
    """Folders of adapters whose experts share their outer factors."""

    url = "https://github.com/sgl-project/sglang/pull/21466"
    description = (
        "SGLang, Megatron-Bridge: PEFT's folder with stacked experts that share A of gate and up, and B of down"
    )
    methods = frozenset({"lora"})
    owns = frozenset({CONFIG, SAFETENSORS})

    def sniff(self, path: Path) -> bool:
        folder = folder_of(path)
        if not path.is_dir() and path.name not in (CONFIG, SAFETENSORS):
            return False
        try:
            return (folder / CONFIG).is_file() and is_shared_outer(
                safetensors.read_header(folder / SAFETENSORS).entries
            )
        except AdapterkitError:
            return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        from .reading import read_folder

        return read_folder(path, base)

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        from .writing import write_folder

        return write_folder(adapter, path, on_loss, base)
