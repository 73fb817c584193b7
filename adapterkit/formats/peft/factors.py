"""Collect the tensors of each LoRA or DoRA, and look up their rank and scaling in the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ...errors import Malformed, ShapeMismatch, Unsupported
from ...io.lazy import from_numpy
from .file import Key, make
from .keys import LATENT

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.lazy import Lazy
    from .file import File
    from .settings import Settings

FIELDS = {
    ("lora_A", "weight"): "A",
    ("lora_B", "weight"): "B",
    ("lora_B", "bias"): "bias",
    ("lora_embedding_A", ""): "A",
    ("lora_embedding_B", ""): "B",
    ("lora_diag", ""): "diag",
    ("lora_magnitude_vector", ""): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
    (LATENT, "weight"): "R",
}
"""A map from (part, leaf) of a key, see `Key`, to the update's field."""


@dataclass(frozen=True, slots=True, eq=False)
class PeftFactors:
    """The tensors of one adapted module or parameter, as stored in the file.

    Attributes:
        stem: the module's path in the keys, including words of PEFT's wrappers.
        keys: the keys by field of the update.
        tensors: the tensors by field of the update.
        embedding: whether the module is an embedding, judged by its keys.
    """

    stem: str
    keys: Mapping[str, Key]
    tensors: Mapping[str, Lazy]
    embedding: bool

    @property
    def key(self) -> Key:
        """Return the key of A, which errors use to name the module."""
        return self.keys["A"]

    @property
    def A(self) -> Lazy:  # noqa: N802 - the paper's name
        return self.tensors["A"]

    @property
    def B(self) -> Lazy:  # noqa: N802 - the paper's name
        return self.tensors["B"]


def find_factors(file: File) -> list[PeftFactors]:
    """Return the factors of all modules, in the file's order.

    Raises:
        Malformed: a tensor's partner is missing, or a tensor contradicts the config.
    """
    parts, settings = {part for part, _ in FIELDS}, file.settings
    groups: dict[str, dict[str, Key]] = {}
    strange: dict[str, Key] = {}
    for key in file.tensors:
        if key.part in parts:
            group = groups.get(key.stem)
            if group is None:
                group = groups[key.stem] = {}
            field = FIELDS.get((key.part, key.leaf))
            if field is None:
                strange.setdefault(key.stem, key)
            else:
                group[field] = key
    needs = {
        "A": True, "B": True, "magnitude": bool(settings.use_dora), "bias": bool(settings.lora_bias),
        "diag": settings.kasa_config is not None,
    }  # fmt: skip
    return [_factors(file, stem, keys, needs, strange.get(stem)) for stem, keys in groups.items()]


def check_rank(factors: PeftFactors, rank: int, experts: int = 1, groups: int = 1) -> None:
    """Check the tensors' rank against the config. For a grouped convolution, B has rank / groups columns.

    Raises:
        ShapeMismatch: the rank of A or B is not the config's.
    """
    for field, axis, share in (("A", 0, 1), ("B", 1, groups)):
        size = factors.tensors[field].shape[axis] * share
        if size != rank * experts:
            each = f" for each of {experts} experts" if experts > 1 else ""
            raise ShapeMismatch(
                f"the shape {list(factors.tensors[field].shape)} has rank {size}; the config states {rank}{each}",
                where=factors.keys[field].text,
                cure="The config does not belong to this file, or its rank_pattern is damaged",
            )  # fmt: skip


def adapt(
    settings: Settings, name: str, tensors: Mapping[str, Lazy], times: float = 1.0,
    *, embedding: bool = False, by_formula: bool = False,
) -> Update:  # fmt: skip
    """Create the update of a module or parameter, with the config's method and scaling.

    Args:
        settings: the settings in the config.
        name: the path of the module or parameter in the base.
        tensors: the tensors by field of the update.
        times: a factor that the config's scaling is multiplied by.
        embedding: whether the module is an embedding.
        by_formula: whether to use the paper's formula where PEFT's forward differs from it.
    """
    method = _method(settings, tensors, embedding)
    if method == "alora":
        tensors = {**tensors, "invocation": _numbers(tuple(settings.alora_invocation_tokens or ()))}
    if method == "arrow":
        return _router(settings.arrow_config, tensors, settings.scaling(name))
    update = make(method, tensors, scaling=settings.scaling(name) * times)
    return update.replace(regrouped=not by_formula) if method == "grouped_dora" else update


def _method(settings: Settings, tensors: Mapping[str, Lazy], embedding: bool) -> str:
    if "magnitude" in tensors:
        return "grouped_dora" if _in_groups(tensors) else "dora"
    if "R" in tensors:
        return "lora_xs"
    if "diag" in tensors:
        return "kasa"
    if "A_blocks" in tensors or "B_blocks" in tensors:
        return "bdlora"
    law = "alora" if settings.alora_invocation_tokens is not None else "arrow" if settings.arrow_config else None
    if law and (embedding or len(tensors["A"].shape) != 2):
        why = f"{law} cannot adapt an embedding or a convolution"
        raise Unsupported(why, where=law, cure="Remove these modules from target_modules")
    if law:
        return law
    if _in_groups(tensors):
        return "grouped_lora"
    # Use plain LoRA for an embedding: PEFT subtracts no initial values from an embedding's table.
    return "lora" if embedding else settings.residual or "lora"


def _router(said: Any, tensors: Mapping[str, Lazy], scaling: float) -> Update:
    """Create Arrow's update, with the settings of the router; the factors are stored, but only the router uses them."""
    idle = {f"idle_{name}": tensor for name, tensor in tensors.items()}
    tasks, general = len(said.task_adapter_names or ()), len(said.gks_adapter_names or ()) if said.use_gks else 0
    return make("arrow", idle, scaling=scaling).replace(
        top_k=said.top_k, temperature=float(said.router_temperature), tasks=tasks, general=general
    )


def _in_groups(tensors: Mapping[str, Lazy]) -> bool:
    A, B = tensors["A"].shape, tensors["B"].shape
    return len(A) > 2 and len(B) == 2 and A[0] != B[1]


@lru_cache(16)
def _numbers(tokens: tuple[int, ...]) -> Lazy:
    """Return token ids as a tensor; calls with equal ids return the same tensor."""
    import numpy as np

    return from_numpy(np.array(tokens, dtype=np.int64))


def _factors(
    file: File, stem: str, keys: Mapping[str, Key], needs: Mapping[str, bool], strange: Key | None
) -> PeftFactors:
    first = strange or next(iter(keys.values()))
    _check_partners(file.settings, keys, needs, first.text)
    tensors = {name: file.tensors[key] for name, key in keys.items()}
    for name in ("A", "B"):
        if len(tensors[name].shape) < 2:
            raise ShapeMismatch(
                f"a factor has shape {list(tensors[name].shape)}, not that of a matrix", where=keys[name].text,
                cure="The factor was saved from one shard of a model: gather the shards first",
            )  # fmt: skip
    embedding = keys["A"].part == "lora_embedding_A" or keys["B"].part == "lora_embedding_B"
    return PeftFactors(stem, keys, tensors, embedding)


def _check_partners(settings: Settings, keys: Mapping[str, Key], needs: Mapping[str, bool], where: str) -> None:
    """Check that a module has exactly the tensors that the config requires.

    Args:
        settings: the config's settings.
        keys: the keys by field of the update.
        needs: whether the config requires each field.
        where: a key of the module, for errors.
    """
    for name, needed in needs.items():
        if needed and name not in keys:
            raise Malformed(f"the file lacks the matching tensor: {_WORDS[name]}", where=where, cure=_AGAIN)
        if not needed and name in keys:
            why = f"the file has {_WORDS[name]}, but the config has no such field"
            raise Malformed(why, where=keys[name].text, cure="The config does not belong to this file")
    if "R" in keys and (keys.keys() & {"magnitude", "bias", "diag"} or settings.use_bdlora or settings.residual):
        raise Unsupported(
            "LoRA-XS cannot be combined with another method or a bias",
            where=keys["R"].text,
            cure="Save the adapter without the other method and the bias",
        )


_WORDS = {
    "A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector of DoRA", "bias": "the bias of lora_bias",
    "diag": "lora_diag of KaSA",
}  # fmt: skip
_AGAIN = "Save the adapter again with PEFT"
