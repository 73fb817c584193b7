"""GLoRA: each module has up to five matrices or vectors, A to E, which the paper calls support tensors.

A's keys are `glora_A.Xd` and `glora_A.Xu` for a low-rank product, or `glora_A.X` for a vector or a constant. If A is
unused, its key is `glora_A.zeros`. B and C have the same kinds of keys. D and E are never low-rank products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....errors import SAVE_WITH_PEFT, USE_ITS_CONFIG, Malformed, ShapeMismatch
from ....io.arrange import zeros
from ....io.lazy import Lazy, as_array, as_lazy
from ....methods.glora import GLoRA
from ..file import DecodedUpdate, File, Findings, Kept, Key, make
from . import Family, MethodFields, check_rank

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.strict_json import JsonValue

FORMS = {"lora": ("_d", "_u"), "vector": ("",), "constant": ("_c",), "none": ()}
"""A map from each form in the config to the suffixes of the field names. For example, in the form `lora`, A is stored
in the fields `A_d` and `A_u`."""


LEAVES = ("Xd", "Xu", "X", "zeros")


class GLoRAFields(MethodFields, frozen=True, kw_only=True):
    """The rank, and the form of each support tensor."""

    r: int = 4
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"

    def form(self, support: str) -> str:
        return {"A": self.config_A_B, "B": self.config_A_B, "C": self.config_C}.get(support, self.config_D_E)


class GloraFamily(Family):
    """The family of the peft_type GLORA."""

    peft_type = "GLORA"
    method = GLoRA
    parts = tuple(f"glora_{s}.{leaf}" for s in "ABCDE" for leaf in LEAVES if s in "ABC" or leaf in ("X", "zeros"))
    method_fields: ClassVar[type[MethodFields]] = GLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "config_A_B": "form of A and B",
        "config_C": "form of C, if the module has a bias",
        "config_D_E": "form of D and E, if the module has a bias",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "init_weights": True}

    @classmethod
    def decode(cls, file: File) -> Findings:
        for decoded in super().decode(file):
            if not isinstance(decoded, DecodedUpdate) or decoded.update.tensors:
                yield decoded
        yield from (Kept(key) for key in file.tensors if key.part.startswith("glora_") and key.part.endswith(".zeros"))

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        fields = {field: key for support in "ABCDE" for field, key in _fields(file, support, keys)}
        tensors = {field: _flat(field, file.tensors[key]) for field, key in fields.items()}
        return DecodedUpdate(next(iter(keys.values())).path, make("glora", tensors), fields)

    @classmethod
    def encode(cls, update: GLoRA) -> dict[str, tuple[str, Lazy]]:
        return cls.encode_at(update, None)

    @classmethod
    def encode_at(cls, update: GLoRA, shape: tuple[int, ...] | None) -> dict[str, tuple[str, Lazy]]:
        leaves = {name: as_lazy(leaf) for name, leaf in update.tensors.items()}
        encoded = {name: (_part(name), _full(name, leaf)) for name, leaf in leaves.items()}
        anchor, dims = (
            next(iter(leaves)),
            dict(zip(("out", "in"), shape or (), strict=False)) | update.dims() | {"1": 1},
        )
        for support, axes in _SIZES.items():
            sizes = [size for axis in axes if isinstance(size := dims.get(axis), int)]
            if len(sizes) == len(axes) and not any(name[0] == support for name in leaves):
                encoded[f"{anchor}.{support}"] = f"glora_{support}.zeros", zeros(tuple(sizes), leaves[anchor].dtype)
        return encoded

    @classmethod
    def why_not(cls, target: Target, update: GLoRA) -> str:
        forms = {s: {name[1:] for name in update.tensors if name[0] == s} for s in "ABCDE"}
        if forms["A"] != forms["B"] or forms["D"] != forms["E"]:
            return "in this glora, A and B (or D and E) have different forms, but the config states one form for both"
        return super().why_not(target, update)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        members = list(cls.of_it(updates).values())
        ranks = [int(str(update.dims()["r"])) for update in members if "r" in update.dims()]
        fields = {"config_A_B": "A", "config_C": "C", "config_D_E": "D"}
        return {"r": max(ranks, default=4), **{name: _form(support, members) for name, support in fields.items()}}


def _fields(file: File, support: str, keys: Mapping[str, Key]) -> Iterator[tuple[str, Key]]:
    """Yield (field, key) for each tensor of `support`, one of A to E. Yield nothing if the support is unused.

    Raises:
        Malformed: the support's tensors are missing, or do not have the form that the config states; or the tensor
            `zeros` has other values than 0.
        ShapeMismatch: the rank of a low-rank product is not the config's `r`; or a vector or constant does not have
            the shape [n, 1] for A, B and C, or [n] for D and E.
    """
    leaves = {leaf: keys[part] for leaf in LEAVES if (part := f"glora_{support}.{leaf}") in keys}
    form = file.settings.method_fields.form(support)
    unbiased = not any(part[6] in "CDE" and not part.endswith(".zeros") for part in keys)
    if not leaves and (form == "none" or (support in "CDE" and unbiased)):
        return
    if leaves.keys() == {"zeros"}:
        if as_array(file.tensors[leaves["zeros"]]).any():
            raise Malformed(
                "the tensor must be all zeros, but has other values", where=leaves["zeros"].text, cure=SAVE_WITH_PEFT
            )
    elif form == "none" or leaves.keys() != ({"Xd", "Xu"} if form == "lora" else {"X"}):
        some = next(iter(leaves.values()), next(iter(keys.values())))
        why = f"the config states the form {form} for glora_{support}, but the tensors have another form"
        raise Malformed(why, where=some.text, cure=USE_ITS_CONFIG)
    elif form == "lora":
        check_rank(leaves["Xd"], file.tensors[leaves["Xd"]], file.settings.method_fields.r, axis=1)
        yield from ((f"{support}_d", leaves["Xd"]), (f"{support}_u", leaves["Xu"]))
    else:
        field = support if form == "vector" else f"{support}_c"
        _check_vector(field, leaves["X"], file.tensors[leaves["X"]])
        yield field, leaves["X"]


def _check_vector(field: str, key: Key, tensor: Lazy) -> None:
    column = field in ("A", "B", "C")
    if len(tensor.shape) != 1 + column or (column and tensor.shape[1] != 1):
        why = f"the shape is {list(tensor.shape)}, but must be {'[n, 1]' if column else '[n]'}"
        raise ShapeMismatch(why, where=key.text, cure=USE_ITS_CONFIG)


def _flat(field: str, tensor: Lazy) -> Lazy:
    return tensor.reshape(tensor.shape[0]) if field in ("A", "B", "C") else tensor


def _full(field: str, tensor: Lazy) -> Lazy:
    return tensor.reshape(*tensor.shape, 1) if field in ("A", "B", "C") else tensor


def _part(field: str) -> str:
    leaf = {"_d": "Xd", "_u": "Xu"}.get(field[1:], "X")
    return f"glora_{field[0]}.{leaf}"


def _form(support: str, updates: list[GLoRA]) -> str:
    ends = next(
        (
            tuple(n[1:] for n in u.tensors if n[0] == support)
            for u in updates
            if any(n[0] == support for n in u.tensors)
        ),
        (),
    )
    return next(word for word, form in FORMS.items() if form == ends)


_SIZES = {"A": ("out", "in"), "B": ("out", "in"), "C": ("in", "1"), "D": ("out",), "E": ("out",)}
"""For each support, the axes of the tensor `zeros` that PEFT saves if the support is unused."""
