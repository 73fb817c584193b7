"""Families of virtual tokens: prompts, P-tuning, CPT, multitask prompts, prefixes, cartridges, LLaMA-Adapter.

The config states the tensors' sizes. LLaMA-Adapter has tensors for each adapted module; the other families have tensors
for the whole model only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import SAVE_WITH_PEFT, USE_ITS_CONFIG, Malformed, ShapeMismatch
from ....io.lazy import as_lazy
from ....methods.adaption_prompt import AdaptionPrompt
from ....methods.multitask_prompt import MultitaskPrompt
from ....methods.prefix import Prefix
from ....methods.prompt import Prompt
from ..file import DecodedUpdate, File, Findings, Key, make
from . import Family, MethodFields, check_parts

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue
    from ....methods.prefix import Prefix
    from ....methods.prompt import Prompt


EMBEDDINGS = "prompt_embeddings"

SIZES = {
    "num_attention_heads": "for prefixes: number of heads of keys and values",
    "num_layers": "for prefixes: number of layers",
    "num_transformer_submodules": "2 for a model with an encoder and a decoder",
    "num_virtual_tokens": "number of virtual tokens",
    "token_dim": "width of an embedding; for prefixes, the total width of a layer's keys",
}


class Sizes(MethodFields, frozen=True, kw_only=True):
    """The sizes of the tensors; if a size is missing, PEFT reads it from the model."""

    num_attention_heads: int | None = None
    num_layers: int | None = None
    num_transformer_submodules: int | None = None
    num_virtual_tokens: int | None = None
    token_dim: int | None = None

    @property
    def parts(self) -> int:
        """Return how many stacks of layers the model has: 2 for an encoder and a decoder, otherwise 1."""
        return 1 if self.num_transformer_submodules is None else self.num_transformer_submodules


class ContextFamily(Family):
    """The base class for families of virtual tokens."""

    shared: ClassVar[tuple[str, ...]] = (EMBEDDINGS,)
    shared_prefix = ""
    prefix = "base_model."
    names_modules = False
    method_fields: ClassVar[type[MethodFields]] = Sizes
    read: ClassVar[Mapping[str, str]] = SIZES

    @classmethod
    def decode(cls, file: File) -> Findings:
        keys = {word: key for word, key in file.shared.items() if word in cls.shared}
        if not keys:
            raise Malformed("the file has no virtual tokens", where=EMBEDDINGS, cure=SAVE_WITH_PEFT)
        check_parts(keys, cls.shared)
        if file.settings.method_fields.parts not in (1, 2):
            why = f"num_transformer_submodules must be 1 or 2, but is {file.settings.method_fields.parts}"
            raise Malformed(why, where="num_transformer_submodules", cure=SAVE_WITH_PEFT)
        yield cls.decode_keys(file, keys)

    @classmethod
    def why_not(cls, target: Target, update: Any) -> str:
        return f"PEFT supports {update.method} only for a whole model" if target.path else ""


class PromptLike(ContextFamily):
    """Prompts: `prompt_embeddings` [tokens, dim].

    For a model with an encoder and a decoder, PEFT stores 2 * tokens rows and uses only the first half of them.
    """

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        key, config = keys[EMBEDDINGS], file.settings.method_fields
        tensor = file.tensors[key]
        check_sizes(key, tensor, rows(config), config.token_dim)
        update = make("prompt", {"P": tensor}, used=config.num_virtual_tokens if config.parts == 2 else 0)
        return DecodedUpdate("", update, {"P": key})

    @classmethod
    def encode(cls, update: Prompt) -> dict[str, tuple[str, Lazy]]:
        return {"P": (EMBEDDINGS, as_lazy(update.P))}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        (update,) = cls.of_it(updates).values()
        count, dim = update.P.shape
        parts = 2 if update.used else 1
        tokens = {"num_virtual_tokens": int(count) // parts, "token_dim": int(dim)}
        return {**tokens, **stacks(parts), "num_layers": None, "num_attention_heads": None}

    @classmethod
    def why_not(cls, target: Target, update: Prompt) -> str:
        if update.used and 2 * update.used != update.P.shape[0]:
            return f"this prompt uses {update.used} of {update.P.shape[0]} rows; PEFT uses all rows or the first half"
        return super().why_not(target, update)


class PrefixLike(ContextFamily):
    """Prefixes: `prompt_embeddings` [tokens, layers * 2 * heads * d]."""

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        key, config = keys[EMBEDDINGS], file.settings.method_fields
        tensor = file.tensors[key]
        layers, heads, width = config.num_layers, config.num_attention_heads, config.token_dim
        if not (layers and heads and width) or min(layers, heads, width) < 1 or width % heads:
            why = f"num_layers ({layers}), num_attention_heads ({heads}) and token_dim ({width}) must be positive"
            raise Malformed(
                f"{why}, and token_dim must be a multiple of num_attention_heads",
                where="token_dim",
                cure=SAVE_WITH_PEFT,
            )
        check_sizes(key, tensor, config.num_virtual_tokens, layers * 2 * width)
        shape = (tensor.shape[0], layers, 2, heads, width // heads)
        P = tensor.map(lambda values: values.reshape(shape).transpose(1, 2, 3, 0, 4), (*shape[1:4], shape[0], shape[4]))
        return DecodedUpdate("", make("prefix", {"P": P}, step=config.parts), {"P": key})

    @classmethod
    def encode(cls, update: Prefix) -> dict[str, tuple[str, Lazy]]:
        P = as_lazy(update.P)
        count = P.shape[3]
        flat = (count, P.shape[0] * 2 * P.shape[2] * P.shape[4])
        return {"P": (EMBEDDINGS, P.map(lambda values: values.transpose(3, 0, 1, 2, 4).reshape(flat), flat))}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        (update,) = cls.of_it(updates).values()
        layers, _, heads, count, d = map(int, update.P.shape)
        tokens = {"num_virtual_tokens": count, "token_dim": heads * d}
        return {**tokens, **stacks(update.step), "num_layers": layers, "num_attention_heads": heads}

    @classmethod
    def why_not(cls, target: Target, update: Prefix) -> str:
        return (
            f"this prefix has step = {update.step}, but PEFT supports at most 2"
            if update.step > 2
            else super().why_not(target, update)
        )


def stacks(parts: int) -> dict[str, JsonValue]:
    """Return the config fields for a model with `parts` stacks of layers; for two stacks, also the `task_type`."""
    fields: dict[str, JsonValue] = {"num_transformer_submodules": parts}
    return fields | ({"task_type": "SEQ_2_SEQ_LM"} if parts == 2 else {})


def rows(config: Any) -> int | None:
    """Return the number of rows that the config requires for `prompt_embeddings`; None if the config states none."""
    return None if config.num_virtual_tokens is None else int(config.num_virtual_tokens * config.parts)


def check_sizes(key: Key, tensor: Lazy, *wanted: int | None) -> None:
    """Check that a tensor has the shape `wanted`, which comes from the config.

    If an entry of `wanted` is None, the axis at that position may have any size.

    Raises:
        ShapeMismatch: the shape does not match the config.
    """
    shape = tensor.shape
    if len(shape) != len(wanted) or any(w is not None and w != size for w, size in zip(wanted, shape, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in wanted)
        why = f"the shape is {list(shape)}, but the config states [{expected}]"
        raise ShapeMismatch(why, where=key.text, cure=USE_ITS_CONFIG)


class PromptFamily(PromptLike):
    """Prompt tuning: `prompt_embeddings` [tokens, dim]."""

    name = "prompt"
    peft_type = "PROMPT_TUNING"
    method = Prompt
    harmless: ClassVar[Mapping[str, str]] = {
        "prompt_tuning_init": "initial values",
        "prompt_tuning_init_text": "initial values",
        "tokenizer_kwargs": "initial values",
        "tokenizer_name_or_path": "initial values",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"prompt_tuning_init": "RANDOM", "task_type": "CAUSAL_LM"}


class PTuningFamily(PromptLike):
    """P-tuning: `prompt_embeddings` [tokens, dim], the output of the prompt encoder."""

    name = "p_tuning"
    peft_type = "P_TUNING"
    method = Prompt
    harmless: ClassVar[Mapping[str, str]] = {
        "encoder_dropout": "training only",
        "encoder_hidden_size": "a setting of the encoder; the file contains only the encoder's output",
        "encoder_num_layers": "a setting of the encoder; the file contains only the encoder's output",
        "encoder_reparameterization_type": "a setting of the encoder; the file contains only the encoder's output",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}


class CptFamily(PromptLike):
    """CPT: `prompt_embeddings` [tokens, dim], the sum of the examples' embeddings and the trained change."""

    name = "cpt"
    peft_type = "CPT"
    method = Prompt
    harmless: ClassVar[Mapping[str, str]] = {
        "cpt_mask": "training only",
        "cpt_token_ids": "initial values, and labels in training",
        "cpt_tokens_type_mask": "training only",
        "opt_loss_decay_factor": "training only",
        "opt_projection_epsilon": "training only",
        "opt_projection_format_epsilon": "training only",
        "opt_weighted_loss_type": "training only",
        "tokenizer_name_or_path": "initial values",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}


FIELDS = {EMBEDDINGS: "P", "prefix_task_cols": "columns", "prefix_task_rows": "rows"}
"""A map from keys to fields of the update."""


class Tasks(Sizes, frozen=True, kw_only=True):
    """The sizes of the tensors, the number of tasks, and the rank of each task's matrix."""

    num_ranks: int | None = 1
    num_tasks: int | None = 1


class MultitaskPromptFamily(ContextFamily):
    """Multitask prompt tuning: each task multiplies a shared prompt elementwise by its own matrix of rank r.

    `prompt_embeddings` is [n, dim], `prefix_task_cols` is [tasks, n, r], and `prefix_task_rows` is [tasks, r, dim]. If
    the model has an encoder and a decoder, the second half of the n rows belongs to the decoder.
    """

    name = "multitask_prompt"
    peft_type = "MULTITASK_PROMPT_TUNING"
    method = MultitaskPrompt
    shared = tuple(FIELDS)
    method_fields: ClassVar[type[MethodFields]] = Tasks
    read: ClassVar[Mapping[str, str]] = {
        **SIZES,
        "num_ranks": "rank of the matrix by which each task multiplies the prompt",
        "num_tasks": "number of tasks",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "prompt_tuning_init": "initial values",
        "prompt_tuning_init_state_dict_path": "initial values",
        "prompt_tuning_init_task": "initial values",
        "prompt_tuning_init_text": "initial values",
        "tokenizer_kwargs": "initial values",
        "tokenizer_name_or_path": "initial values",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"prompt_tuning_init": "RANDOM", "task_type": "CAUSAL_LM"}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        config, n = file.settings.method_fields, rows(file.settings.method_fields)
        shapes = {
            EMBEDDINGS: (n, config.token_dim),
            "prefix_task_cols": (config.num_tasks, n, config.num_ranks),
            "prefix_task_rows": (config.num_tasks, config.num_ranks, config.token_dim),
        }
        for word, key in keys.items():
            check_sizes(key, file.tensors[key], *shapes[word])
        tensors = {FIELDS[word]: file.tensors[key] for word, key in keys.items()}
        update = make("multitask_prompt", tensors, decoder=config.parts == 2)
        return DecodedUpdate("", update, {FIELDS[word]: key for word, key in keys.items()})

    @classmethod
    def encode(cls, update: MultitaskPrompt) -> dict[str, tuple[str, Lazy]]:
        return {field: (word, as_lazy(update.tensors[field])) for word, field in FIELDS.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        (update,) = cls.of_it(updates).values()
        parts = 2 if update.decoder else 1
        tasks, n, r = map(int, update.columns.shape)
        tokens = {"num_virtual_tokens": n // parts, "token_dim": int(update.P.shape[1]), "num_tasks": tasks}
        others = {"num_layers": None, "num_attention_heads": None}
        return {**tokens, "num_ranks": r, **stacks(parts), **others}

    @classmethod
    def why_not(cls, target: Target, update: MultitaskPrompt) -> str:
        return (
            "this multitask_prompt has a selected task, but in PEFT the caller selects the task"
            if update.task
            else super().why_not(target, update)
        )


class PrefixFamily(PrefixLike):
    """Prefix tuning: `prompt_embeddings` [tokens, layers * 2 * heads * d]."""

    name = "prefix"
    peft_type = "PREFIX_TUNING"
    method = Prefix
    harmless: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_size": "a setting of the encoder; the file contains only the encoder's output",
        "init_weights": "initial values",
        "prefix_projection": "whether an encoder computed the prefix; the file contains the encoder's output",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"prefix_projection": False, "task_type": "CAUSAL_LM"}


class CartridgeFamily(PrefixLike):
    """Cartridges: `prompt_embeddings` [tokens, layers * 2 * heads * d]."""

    name = "cartridge"
    peft_type = "CARTRIDGE"
    method = Prefix
    harmless: ClassVar[Mapping[str, str]] = {"num_frozen_tokens": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}


# LLaMA-Adapter: `adaption_prompt` [1, tokens, width] and `adaption_gate` [1] for the attention module in each of the
# last layers.


GPT2 = "attn"
"""The name of GPT-2's attention modules.

In GPT-2, PEFT adds the change after the attention module's output projection. In all other models, PEFT adds the change
before the output projection.
"""


class AdaptionPromptFields(MethodFields, frozen=True, kw_only=True):
    """The number of virtual tokens, and how many of the last layers have virtual tokens."""

    adapter_len: int | None = None
    adapter_layers: int | None = None


class AdaptionPromptFamily(Family):
    """The family of the peft_type ADAPTION_PROMPT."""

    name = "adaption_prompt"
    peft_type = "ADAPTION_PROMPT"
    method = AdaptionPrompt
    parts = ("adaption_gate", "adaption_prompt")
    names_modules = False
    method_fields: ClassVar[type[MethodFields]] = AdaptionPromptFields
    read: ClassVar[Mapping[str, str]] = {
        "adapter_layers": "how many of the last layers have tensors",
        "adapter_len": "number of virtual tokens",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        check_parts(keys, cls.parts)
        prompt, gate = keys["adaption_prompt"], keys["adaption_gate"]
        tensor, count = file.tensors[prompt], file.settings.method_fields.adapter_len
        if len(tensor.shape) != 3 or tensor.shape[0] != 1 or count not in (None, tensor.shape[1]):
            why = f"the shape is {list(tensor.shape)}, but the config states [1, {count}, width]"
            raise ShapeMismatch(why, where=prompt.text, cure=USE_ITS_CONFIG)
        tensors = {"P": tensor.reshape(*tensor.shape[1:]), "gate": file.tensors[gate]}
        projected = prompt.path.rpartition(".")[2] != GPT2
        update = make("adaption_prompt", tensors, projected=projected)
        return DecodedUpdate(prompt.path, update, {"P": prompt, "gate": gate})

    @classmethod
    def encode(cls, update: AdaptionPrompt) -> dict[str, tuple[str, Lazy]]:
        P = as_lazy(update.P)
        return {"P": ("adaption_prompt", P.reshape(1, *P.shape)), "gate": ("adaption_gate", as_lazy(update.gate))}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        members = cls.of_it(updates)
        name = next(iter(members)).rpartition(".")[2]
        # The config has only one `adapter_len` for all modules. It is None if their numbers of virtual tokens differ.
        lengths = {int(update.P.shape[0]) for update in members.values()}
        length = lengths.pop() if len(lengths) == 1 else None
        return {"adapter_len": length, "adapter_layers": len(members), "target_modules": name}

    @classmethod
    def why_not(cls, target: Target, update: AdaptionPrompt) -> str:
        if update.gate.shape[0] != 1:
            return "this adaption_prompt has a gate for each head, but PEFT has one gate for all heads"
        name = target.path.rpartition(".")[2]
        if update.projected == (name == GPT2):
            side = "after" if update.projected else "before"
            other = "before" if update.projected else "after"
            return f"for {name!r}, PEFT adds the change {side} the output projection, but this update adds it {other}"
        return (
            ""
            if re.search(r"\.\d+\.\w+$", f".{target.path}")
            else "this module is not a direct child of a numbered layer"
        )
