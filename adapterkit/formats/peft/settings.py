"""Define the config fields that change the meaning of the tensors, with PEFT's defaults."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ...errors import Malformed
from .patterns import first_match, matches, unwrapped

if TYPE_CHECKING:
    from ...io.strict_json import JsonValue


RESIDUAL = ("olora", "pissa")
"""Initialisations that subtract an exactly computable value from the base. The methods have the same names."""

Number = Annotated[int, msgspec.Meta(ge=-(1 << 53), le=1 << 53)] | float
Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Tokens = list[Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]]


class Kasa(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kasa_config`: the weights of the terms that KaSA adds to the loss in training."""

    beta: float = 1e-4
    gamma: float = 1e-3


class BlockSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`use_bdlora`: words in module names. They select the modules whose A, or whose B, is block-diagonal."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: Rank = 1
    match_strict: bool = True

    def factor(self, name: str) -> str:
        """Return `A` or `B`, whichever is block-diagonal in the module `name`; empty if neither is."""
        named = {"A": self.target_modules_bd_a, "B": self.target_modules_bd_b}
        found = [factor for factor, words in named.items() if any(word in name for word in words or ())]
        if len(found) > 1:
            why = "both target_modules_bd_a and target_modules_bd_b name this module"
            raise Malformed(why, where=name, cure="Write the adapter again with PEFT")
        return found[0] if found else ""


class Router(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`arrow_config`: how Arrow selects experts, and the experts' names; the experts are not loaded.

    PEFT searches for the router's vectors with random numbers, so the config has a seed. adapterkit computes the
    vectors exactly.
    """

    top_k: Rank = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The config fields that change the function, with PEFT's defaults; `own` has the fields of a family."""

    peft_type: str
    r: Rank = 8
    lora_alpha: Number = 8
    use_rslora: bool | None = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Number] | None = None
    use_dora: bool | None = False
    lora_bias: bool | None = False
    fan_in_fan_out: bool | None = False
    init_lora_weights: bool | str | None = True
    kasa_config: Kasa | None = None
    use_bdlora: BlockSettings | None = None
    alora_invocation_tokens: Tokens | None = None
    arrow_config: Router | None = None
    enable_lora: list[bool] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: Tokens | dict[str, Tokens] | None = None
    token_indices: Tokens | None = None
    feedforward_modules: list[str] | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    lora_B_layout: Literal["rank_major", "grouped_by_expert"] | None = None
    peft_version: str | None = None
    auto_mapping: Any = None
    own: Any = None

    @property
    def unsloth(self) -> bool:
        """Whether the config shows that Unsloth wrote the file, or that the base is one of Unsloth's copies."""
        return written_by_unsloth(
            {"auto_mapping": self.auto_mapping, "base_model_name_or_path": self.base_model_name_or_path}
        )

    def before(self, release: tuple[int, int]) -> bool:
        """Whether the file was written by a PEFT release older than `release`; False if the config has no release."""
        return parse_version(self.peft_version) < release

    @property
    def residual(self) -> str:
        """Return `olora` or `pissa` if the adapter's initial values were subtracted from the base; otherwise empty."""
        word = self.init_lora_weights
        return word.lower() if isinstance(word, str) and word.lower() in RESIDUAL else ""

    def rank(self, name: str) -> int:
        """Return the rank of the module or parameter `name`."""
        return first_match(self.rank_pattern or {}, name, self.r)

    def scaling(self, name: str) -> float:
        """Return the scaling of B @ A for the module or parameter `name`."""
        alpha, rank = first_match(self.alpha_pattern or {}, name, self.lora_alpha), self.rank(name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def written_by_unsloth(config: Mapping[str, JsonValue]) -> bool:
    """Whether a config shows that Unsloth wrote the file, or that the base is one of Unsloth's copies."""
    mapping = config.get("auto_mapping")
    marked = isinstance(mapping, Mapping) and bool(mapping.get("unsloth_fixed"))
    return marked or str(config.get("base_model_name_or_path") or "").startswith("unsloth/")


def parse_version(version: str | None) -> tuple[int, ...]:
    """Return the first two numbers of a PEFT release, such as (0, 18).

    A very large number if the release is missing.
    """
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else (1 << 30,)


def names_module(target_modules: Iterable[str] | str | None, path: str) -> bool:
    """Whether `target_modules` selects a module.

    A text is a pattern. An item of a list is a path or the end of a path.
    """
    path = unwrapped(path)
    if isinstance(target_modules, str):
        return matches(target_modules, path, whole=True)
    return any(path == name or path.endswith(f".{name}") for name in target_modules or ())
