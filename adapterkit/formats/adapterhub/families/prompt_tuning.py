"""Read and write prompt tuning: `prompt_embedding.weight` `[n, dim]` is prepended to the output of the embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....core.adapter import Target, Updates
from ....errors import USE_ITS_CONFIG, ShapeMismatch, Unsupported
from ....io.lazy import Lazy, as_lazy
from ..file import EMBEDDINGS, AdapterHubUpdate, make, take
from . import AdapterHubFamily, FamilyFields, Size

if TYPE_CHECKING:
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue
    from ..file import AdapterHubNaming, AdapterHubPart, Findings

KIND, LAYER, SLOT = "prompt_tunings", "prompt_tuning", "prompt_embedding.weight"


class PromptFields(FamilyFields, frozen=True, kw_only=True):
    """The config fields that determine the meaning of the tensor."""

    prompt_length: Size = 10
    combine: str = "prefix"


class PromptTuningFamily(AdapterHubFamily):
    """The family `prompt_tuning`."""

    methods = frozenset({"prompt"})
    fields = PromptFields
    read: ClassVar[Mapping[str, str]] = {
        "combine": "`prefix`: the prompt precedes all tokens; `prefix_after_bos`: not supported",
        "prompt_length": "the number of virtual tokens",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "init_weights_seed": "initial values",
        "prompt_init": "initial values",
        "prompt_init_text": "initial values",
        "random_uniform_scale": "initial values",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "architecture": "prompt_tuning",
        "init_weights_seed": None,
        "prompt_init": "random_uniform",
        "prompt_init_text": None,
    }

    @classmethod
    def decode(cls, part: AdapterHubPart) -> Findings:
        if part.method_fields.combine != "prefix":
            why = f"this version does not support a prompt with combine = {part.method_fields.combine[:60]!r}"
            raise Unsupported(why, where=f"{part.at}.combine", cure="Known: prefix")
        for path, slots in part.groups(KIND).items():
            tensors = take(part, slots, {SLOT: "P"})
            stated, shape = part.method_fields.prompt_length, tensors["P"].shape
            if shape[:1] != (stated,):
                why = f"the shape is {list(shape)}, but the config states {stated} tokens"
                raise ShapeMismatch(why, where=slots[SLOT].text, cure=USE_ITS_CONFIG)
            name = EMBEDDINGS.get(part.settings.model_type or "")
            if name is None:
                why = f"this version does not know the embedding module of a {part.settings.model_type} model"
                raise Unsupported(why, where=slots[SLOT].text, cure=f"Known: {', '.join(sorted(EMBEDDINGS))}")
            yield AdapterHubUpdate(Target(path.removesuffix(LAYER) + name), make("prompt", tensors), (slots[SLOT],))

    @classmethod
    def spell(cls, updates: Updates, naming: AdapterHubNaming) -> Iterator[tuple[str, Lazy]]:
        for group in updates.values():
            for update in group:
                yield naming.key(naming.at_root(LAYER), KIND, SLOT), as_lazy(update.tensors["P"])

    @classmethod
    def compose(cls, updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
        some: Any = next(iter(updates.values()))[0]
        return {"combine": "prefix", "prompt_length": int(some.P.shape[0])}

    @classmethod
    def losses(cls, updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
        for number, (target, position, update) in enumerate(
            (target, position, update) for target, group in updates.items() for position, update in enumerate(group)
        ):
            if number:
                yield target, position, "the adapter has a second prompt"
            elif not target.path.endswith(tuple(EMBEDDINGS.values())):
                yield (
                    target,
                    position,
                    "its target is not the embedding module; the adapters library adds prompts only to embeddings",
                )
            elif update.attributes["used"]:
                yield target, position, "only some rows of the prompt are used"
