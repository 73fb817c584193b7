"""Placement of adapters in a transformer block.  No method itself.

A sub-layer of a block ends with `norm(hidden + residual)`; some models have no norm there. The attributes are named as
in AdapterHub, https://docs.adapterhub.ml/classes/adapter_config.html, and cover all of its options.
"""

from __future__ import annotations

from typing import Any

from ..core.updates import OutputUpdate, attribute
from ..errors import ShapeMismatch


class Sublayer(OutputUpdate):
    """h' = h + change(h), or h + change(residual) in parallel; h is the sub-layer's output before its residual."""

    placed = True

    parallel: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: str = attribute("true", among=("true", "false", "post_add"))
    adapter_residual_before_ln: bool = False
    residual: str = ""
    norm: str = ""

    @property
    def whole(self) -> bool:
        return self.original_ln_after

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        if self.parallel and not self.residual and shape[1:2] != shape[:1]:
            why = f"stands parallel to a layer of {list(shape[:2])} outputs and inputs"
            raise ShapeMismatch(why, cure="Name the residual to read")

    def changed(self, h: Any, layer: Any) -> Any:
        """Return the change for the adapter's input."""
        raise AssertionError("each make defines it")

    def after(self, h: Any, layer: Any) -> Any:
        """Return the adapter's output after its optional norm."""
        return h

    def inside(self, x: Any, layer: Any) -> Any:
        hidden, residual = layer.hidden(x), layer.residual(x)
        if self.parallel:
            return hidden + self.after(self.changed(x if residual is None else residual, layer), layer)
        read, skip = self.read(hidden, residual, layer)
        change, first = self.changed(read, layer), self.adapter_residual_before_ln
        return self.after(change + skip, layer) if first else self.after(change, layer) + skip

    def read(self, hidden: Any, residual: Any, layer: Any) -> tuple[Any, Any]:
        """Return the adapter's input, and the value of its own skip connection."""
        added = hidden if residual is None or not self.original_ln_before else hidden + residual
        read = layer.norm(added) if self.original_ln_before else hidden
        return read, {"true": hidden, "post_add": added, "false": read}[self.residual_before_ln]
