"""LLaMA-Adapter: `adaption_prompt` [1, tokens, width] and `adaption_gate` [1] in the last layers' attentions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import ShapeMismatch
from ....io.lazy import as_lazy
from ....methods.adaption_prompt import AdaptionPrompt
from ..file import File, Found, Key, make
from ._family import Family, Own, check_parts

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue

GPT2 = "attn"
"""The name of GPT-2's attentions. PEFT adds to their outputs; in other models it adds before the heads are mixed."""


class AdaptionPromptFields(Own, frozen=True, kw_only=True):
    """The number of virtual tokens, and the number of the last layers that have them."""

    adapter_len: int | None = None
    adapter_layers: int | None = None


class AdaptionPromptFamily(Family):
    """The family of the peft_type ADAPTION_PROMPT."""

    peft_type = "ADAPTION_PROMPT"
    method = AdaptionPrompt
    parts = ("adaption_gate", "adaption_prompt")
    names_modules = False
    own: ClassVar[type[Own]] = AdaptionPromptFields
    read: ClassVar[Mapping[str, str]] = {
        "adapter_layers": "number of the last layers, which have tensors",
        "adapter_len": "number of virtual tokens",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        check_parts(keys, cls.parts)
        prompt, gate = keys["adaption_prompt"], keys["adaption_gate"]
        tensor, count = file.tensors[prompt], file.settings.own.adapter_len
        if len(tensor.shape) != 3 or tensor.shape[0] != 1 or count not in (None, tensor.shape[1]):
            why = f"the shape is {list(tensor.shape)}, but the config states [1, {count}, width]"
            raise ShapeMismatch(why, where=prompt.text, cure="The config does not belong to this file")
        tensors = {"P": tensor.reshape(*tensor.shape[1:]), "gate": file.tensors[gate]}
        projected = prompt.path.rpartition(".")[2] != GPT2
        update = make("adaption_prompt", tensors, projected=projected)
        return Found(prompt.path, update, {"P": prompt, "gate": gate})

    @classmethod
    def encode(cls, update: AdaptionPrompt) -> dict[str, tuple[str, Lazy]]:
        P = as_lazy(update.P)
        return {"P": ("adaption_prompt", P.reshape(1, *P.shape)), "gate": ("adaption_gate", as_lazy(update.gate))}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        found = cls.of_it(updates)
        name = next(iter(found)).rpartition(".")[2]
        return {"adapter_len": _length(found), "adapter_layers": len(found), "target_modules": name}

    @classmethod
    def why_not(cls, target: Target, update: AdaptionPrompt) -> str:
        if update.gate.shape[0] != 1:
            return "it has a gate for each head, but PEFT has one for all"
        name = target.path.rpartition(".")[2]
        if update.projected == (name == GPT2):
            side = "after" if update.projected else "before"
            return f"PEFT adds to the attention {name!r} {side} the output projection, unlike this update"
        return "" if re.search(r"\.\d+\.\w+$", f".{target.path}") else "its attention is not in a numbered layer"


def _length(found: Mapping[str, AdaptionPrompt]) -> int | None:
    """Return the number of virtual tokens; None if modules differ, which a config cannot state."""
    lengths = {int(update.P.shape[0]) for update in found.values()}
    return lengths.pop() if len(lengths) == 1 else None
