"""Stack the experts of a router into its adapter; see `adapterkit/torch/experts.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from ..core.adapter import Adapter
from ..errors import Unsupported
from ..io.lazy import as_lazy


def with_experts(adapter: Adapter, experts: Sequence[Adapter]) -> Adapter:
    """Return the adapter with its experts; unchanged if it lacks none.

    Raises:
        Unsupported: the assignment of its logits depends on the order of the torch model's modules.
        And what `adapterkit/torch/experts.py` raises.
    """
    if not experts and not any(getattr(update, "lacks_experts", False) for _, update in adapter):
        return adapter
    from ..torch.experts import with_experts as stacked

    return stacked(_no_order, adapter, experts).map(as_lazy)


def _no_order() -> NoReturn:
    why = "a classifier with logits for each layer, whose order is that of the torch model's modules"
    cure = "Inject it into the torch model, and write the adapter with its experts"
    raise Unsupported(why, where="(model): xlora", cure=cure)
