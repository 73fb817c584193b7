"""The parts that a hook at a module runs; each part holds the updates of one target, and the way to apply them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .leaves import LiveUpdates
from .outputs import OutputSite
from .scopes import Switch

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..core.updates import Update

HOOK = "_adapterkit_hook"
"""The attribute of a module that holds its hook, even if other tools have moved its forward."""

SCRIPTING = "__prepare_scriptable__"
"""The attribute of a module that torch.jit.script calls before it compiles the module."""


@dataclass(frozen=True, eq=False)
class Part:
    """One target's updates at a hook; `weight` and `bias` are parameter paths relative to the hook's module.

    Updates of outputs are in a separate part, which has an output site. `dropout` is the dropout probability in
    training.
    """

    switch: Switch
    target: Target
    bound: LiveUpdates
    weight: str | None
    bias: str | None
    direct: bool
    output_site: OutputSite | None = None
    dropout: float = 0.0

    @property
    def home(self) -> str:
        """The path of the hook's module at the time of attaching; a target may be a module or parameter below it."""
        path = self.target.path
        below = self.weight or self.bias or ""
        for rest in (below, below.rpartition(".")[0]):
            if rest and f".{path}".endswith(f".{rest}"):
                return path.removesuffix(rest).removesuffix(".")
        return path

    @property
    def updates(self) -> tuple[Update, ...]:
        """The updates with the tensors that the model holds now."""
        return self.bound.updates

    @property
    def foldable(self) -> bool:
        """Whether changed parameters of the module can express all updates, and every bias that they change exists."""
        kinds = all(update.kind in ("additive", "weight") for update in self.updates)
        return kinds and (self.bias is not None or not any(u.changes_bias and u.needs_bias for u in self.updates))
