"""A format of a package of its own: one JSON file of factors in base64, as an example of what a plug-in writes."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Malformed, Unrepresentable
from adapterkit.formats._format import Format
from adapterkit.io.computed import load
from adapterkit.io.lazy import from_numpy
from adapterkit.methods.lora import LoRA

MARK = "acme-1"


class Acme(Format):
    """Acme's adapters: `{"format": "acme-1", "updates": {path: {"A": ..., "B": ..., "scaling": ...}}}`."""

    url = "https://example.org/acme"
    description = "Acme's one JSON file of LoRA factors"
    methods = frozenset({"lora"})
    dtypes = frozenset({"F32"})
    file = "adapter.acme.json"

    def sniff(self, path: Path) -> bool:
        """Whether the file starts as Acme's does; a small part of it is read."""
        try:
            with path.open("rb") as file:
                return file.read(64).replace(b" ", b"").startswith(f'{{"format":"{MARK}"'.encode())
        except OSError:
            return False

    def read(self, path: Path, *, compat: str | None = None, base: Any = None) -> Adapter:
        """Read the factors of every target."""
        try:
            document = json.loads(path.read_text("utf-8"))
            updates = {}
            for name, entry in document["updates"].items():
                update = LoRA(A=_array(entry["A"]), B=_array(entry["B"]), scaling=entry["scaling"])
                updates[_target(name)] = (update,)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Malformed(f"no adapter of Acme's ({error})", path=path, cure="Download the file again") from None
        return Adapter(updates)

    def write(self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Any = None) -> list[str]:
        """Write the factors of every target; whatever the file cannot express is refused."""
        items = [f"{target}: {why}" for target, found in adapter.updates.items() if (why := _why_not(target, found))]
        if items:
            raise Unrepresentable("Acme's file cannot express these", items=items, cure="Write adapterkit's own format")
        updates = {str(target): _entry(found[0]) for target, found in adapter.updates.items()}
        path.write_text(json.dumps({"format": MARK, "updates": updates}), encoding="utf-8")
        return []


def _why_not(target: Target, updates: tuple[Any, ...]) -> str:
    """Why the file cannot express the updates of a target; empty if it can."""
    update = updates[0]
    if len(updates) > 1:
        return "it has more than one update"
    if not isinstance(update, LoRA) or update.bias is not None:
        return "the file has LoRA alone, without a bias"
    if target.rows is not None or target.layout != "out *in":
        return "the file has no rows or layouts of weights"
    return ""


def _target(path: str) -> Target:
    return Target(path)


def _entry(update: Any) -> dict[str, Any]:
    return {"A": _text(update.A), "B": _text(update.B), "scaling": update.scaling}


def _text(leaf: Any) -> dict[str, Any]:
    array = load(leaf).astype("<f4")
    return {"shape": array.shape, "data": base64.b64encode(array.tobytes()).decode()}


def _array(entry: Any) -> Any:
    data = np.frombuffer(base64.b64decode(entry["data"], validate=True), "<f4")
    return from_numpy(data.reshape(entry["shape"]))
