"""Read and write minLoRA's checkpoints: a torch file of parametrizations, and `minlora.json` with alpha next to it.

For an embedding, the file stores the transposes of A and B. So the change of the weight is the stored A times the
stored B. For a convolution, A is `[r, in * kernel]`: the second axis is the input channels and the kernel's positions,
flattened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.adapter import Adapter, Foreign, Step, Target
from ..errors import WRITE_AGAIN, AdapterkitError, ShapeMismatch
from ..io.arrange import turned
from ..io.lazy import Lazy, as_lazy
from ..methods.lora import LoRA
from ..naming.ties import EMBEDDINGS
from ._containers import keys_of, load, read_settings, save, write_settings
from ._format import Format
from ._kit import Leftovers, check_factors, grouped, in_order, leftovers, of_one_alpha, stored_layout, unfit

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from ._kit import Pair, Slots

FORMAT = "minlora"
SETTINGS = "minlora.json"
_EXAMPLE = '{"alpha": <lora_alpha>}'
_STEM = ".parametrizations.weight.0.lora_"
_SLOTS = {f"{_STEM}A": "A", f"{_STEM}B": "B"}


class MinLoraHints(Leftovers, total=False):
    """The data that `Adapter.foreign` keeps from a minLoRA checkpoint.

    It consists of the contents of `minlora.json`, and the paths of embeddings whose names do not show that they are
    embeddings.
    """

    settings: dict[str, float]
    embeddings: list[str]


class MinLora(Format):
    """State dicts from `minlora.get_lora_state_dict`."""

    url = "https://github.com/cccntu/minLoRA"
    description = "minLoRA: a torch file from get_lora_state_dict, with minlora.json"
    file = "lora.pt"
    methods = frozenset({"lora"})
    owns = frozenset({SETTINGS})

    def sniff(self, path: Path) -> bool:
        keys = keys_of(path) if path.suffix != ".safetensors" else []
        return any(".parametrizations.weight." in key and ".lora_" in key for key in keys)

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        settings = read_settings(path.with_name(SETTINGS), ("alpha",), _EXAMPLE)
        try:
            tensors = load(path)
            updates = {t: (u,) for t, u in _decode(tensors, settings["alpha"], base)}
        except AdapterkitError as error:
            raise error.at(path=path) from None
        turned_paths = [t.path for t in updates if t.layout != "out *in" and not _is_embedding(t.path)]
        data: dict[str, JsonValue] = {"order": list(tensors), "settings": settings}
        data |= {"embeddings": turned_paths} if turned_paths else {}
        return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = leftovers(adapter, FORMAT, MinLoraHints)
        first = hints.get("settings", {}).get("alpha")
        embeddings = set(hints.get("embeddings", ()))

        def why_not(target: Target, update: Pair) -> str:
            return _why_not(target, update, target.path in embeddings)

        alpha, pairs, lines = of_one_alpha(adapter, why_not, format_name="minLoRA", on_loss=on_loss, first=first)
        tensors: dict[str, Lazy] = {}
        for target, update in pairs.items():
            A, B = as_lazy(update.A), as_lazy(update.B)
            A = A.reshape(A.shape[0], -1)
            factors = {"A": A, "B": B} if target.layout == "out *in" else {"A": turned(A), "B": turned(B)}
            tensors |= {f"{target.path}{_STEM}{field}": leaf for field, leaf in factors.items()}
        save(path, in_order(tensors, hints))
        write_settings(path.with_name(SETTINGS), {"alpha": alpha})
        return lines


def _decode(tensors: Mapping[str, Lazy], alpha: float, base: Checkpoint | None) -> Iterator[tuple[Target, LoRA]]:
    for path, slots in grouped(tensors, _SLOTS, "minLoRA").items():
        transposed = _is_transposed(path, slots, base)
        if transposed:
            slots = {field: turned(leaf) for field, leaf in slots.items()}
        rank = check_factors(path, slots)
        factors = _with_kernel(path, slots, base)
        update = LoRA(**factors, scaling=alpha / rank)
        linear = "out *in" if _is_embedding(path) else stored_layout(path, update, base)
        yield Target(path, "in out *k" if transposed else linear), update


def _is_transposed(path: str, slots: Slots, base: Checkpoint | None) -> bool:
    """Whether a module is an embedding, for which the file stores the transposes of A and B.

    The axis of A that equals an axis of B is the rank, and shows this. If the shapes fit both ways, the shape of the
    base's weight decides; without a base, the module's name.
    """
    A: tuple[int, ...] = slots["A"].shape
    B: tuple[int, ...] = slots["B"].shape
    if len(A) != 2 or len(B) != 2:
        return False
    as_stored, transposed = A[0] == B[1], A[1] == B[0]
    if as_stored != transposed:
        return transposed
    weight = None if base is None else base.tensors.get(f"{path}.weight")
    if weight is not None and A[0] != A[1]:
        return weight.shape == (A[0], B[1])
    return _is_embedding(path)


def _with_kernel(path: str, slots: Slots, base: Checkpoint | None) -> Slots:
    """Reshape a convolution's A from `[r, in * kernel]` to `[r, in, *kernel]`, with the sizes of the base's weight."""
    weight = None if base is None else base.tensors.get(f"{path}.weight")
    if weight is None or len(weight.shape) < 3:
        return dict(slots)
    if slots["A"].shape[1] != weight.nbytes // weight.dtype.itemsize // weight.shape[0]:
        why = (
            f"A is {list(slots['A'].shape)}, and the base's weight is {list(weight.shape)}; "
            "for a weight [out, in, *kernel], A must be [r, in * kernel]"
        )
        raise ShapeMismatch(why, where=path, cure=WRITE_AGAIN)
    return {**slots, "A": slots["A"].reshape(-1, *weight.shape[1:])}


def _is_embedding(path: str) -> bool:
    return path.rpartition(".")[2] in EMBEDDINGS


def _why_not(target: Target, update: Pair, embedding: bool) -> str:
    if target.rows is None and not target.stacked and not (isinstance(update, LoRA) and update.bias is not None):
        named = embedding or _is_embedding(target.path)
        return "" if target.layout == "out *in" or named else "its weight is stored as [in, out]"
    return unfit(target, update)
