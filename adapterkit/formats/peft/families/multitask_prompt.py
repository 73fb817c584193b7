"""Multitask prompt tuning: `prompt_embeddings` [n, dim], `prefix_task_cols` [tasks, n, r], `prefix_task_rows`.

If the model has a decoder beside its encoder, the second half of n is the decoder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....io.lazy import as_lazy
from ....methods.multitask_prompt import MultitaskPrompt
from ..file import File, Found, Key, make
from ._context import EMBEDDINGS, SIZES, ContextFamily, Sizes, check_sizes, rows, stacks
from ._family import Own

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.lazy import Lazy

FIELDS = {EMBEDDINGS: "P", "prefix_task_cols": "columns", "prefix_task_rows": "rows"}
"""Key -> field of the update."""


class Tasks(Sizes, frozen=True, kw_only=True):
    """Sizes, and the number of tasks and their rank."""

    num_ranks: int | None = 1
    num_tasks: int | None = 1


class MultitaskPromptFamily(ContextFamily):
    """The family of the peft_type MULTITASK_PROMPT_TUNING."""

    peft_type = "MULTITASK_PROMPT_TUNING"
    method = MultitaskPrompt
    shared = tuple(FIELDS)
    own: ClassVar[type[Own]] = Tasks
    read: ClassVar[Mapping[str, str]] = {
        **SIZES,
        "num_ranks": "rank of a task's change",
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
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        own, n = file.settings.own, rows(file.settings.own)
        shapes = {
            EMBEDDINGS: (n, own.token_dim),
            "prefix_task_cols": (own.num_tasks, n, own.num_ranks),
            "prefix_task_rows": (own.num_tasks, own.num_ranks, own.token_dim),
        }
        for word, key in keys.items():
            check_sizes(key, file.tensors[key], *shapes[word])
        tensors = {FIELDS[word]: file.tensors[key] for word, key in keys.items()}
        update = make("multitask_prompt", tensors, decoder=own.parts == 2)
        return Found("", update, {FIELDS[word]: key for word, key in keys.items()})

    @classmethod
    def encode(cls, update: MultitaskPrompt) -> dict[str, tuple[str, Lazy]]:
        return {field: (word, as_lazy(update.tensors[field])) for word, field in FIELDS.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        (update,) = cls.of_it(updates).values()
        parts = 2 if update.decoder else 1
        tasks, n, r = map(int, update.columns.shape)
        tokens = {"num_virtual_tokens": n // parts, "token_dim": int(update.P.shape[1]), "num_tasks": tasks}
        others = {"num_layers": None, "num_attention_heads": None}
        return {**tokens, "num_ranks": r, **stacks(parts), **others}

    @classmethod
    def why_not(cls, target: Target, update: Any) -> str:
        return "a chosen task: PEFT's callers choose it" if update.task else super().why_not(target, update)
