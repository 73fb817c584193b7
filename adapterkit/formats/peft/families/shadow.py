"""Shadow: each block has `shadow_down.<name>.weight` etc.; the whole model has `shadow_backbone.<name>.<tensor>`.

`<name>` is the adapter's name, but PEFT always writes `default`. Each block has two small networks,
`shadow_update_transform` and `shadow_update_gate`. Both are `nn.Sequential` modules, whose linear layers have the
indices 0 and 2. For a classifier, the file also contains the classification head that was used in training. Shadow's
formula does not use this head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import SAVE_WITH_PEFT, Malformed, ShapeMismatch, Unsupported
from ....io.lazy import Lazy, as_lazy
from ....methods.shadow import Shadow
from ..file import DecodedUpdate, File, Kept, Key, make
from . import Family, MethodFields, Rank, check_parts, check_rank, check_stem, minority

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue
    from ..file import Findings

NETWORK, PROJECTION, HEAD = "shadow_backbone", "shadow_projection", "shadow_head"
_ENDS = {"in": "0.weight", "in_bias": "0.bias", "out": "2.weight", "out_bias": "2.bias"}
FIELDS = {
    "shadow_down.weight": "down",
    "shadow_up.weight": "up",
    **{f"shadow_update_transform.{leaf}": f"transform_{end}" for end, leaf in _ENDS.items()},
    **{f"shadow_update_gate.{leaf}": f"gate_{end}" for end, leaf in _ENDS.items()},
}
"""A map from the endings of keys to fields of the update."""


class ShadowFields(MethodFields, frozen=True, kw_only=True):
    """The sizes of the shared network, the sizes of the tensors of a block, and the factor `shadow_alpha`."""

    r: Rank = 8
    shadow_alpha: float = 0.1
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None


class ShadowFamily(Family):
    """The family of the peft_type SHADOW."""

    peft_type = "SHADOW"
    method = Shadow
    parts = (*FIELDS, "shadow_update_transform", "shadow_update_gate")
    # The reader uses the patterns without `*`, because it accepts all keys that begin with a pattern. The writer needs
    # the patterns with `*`, because it compares a pattern with the whole key.
    shared = tuple(f"{word}{end}" for word in (NETWORK, PROJECTION, HEAD) for end in ("", "*"))
    method_fields: ClassVar[type[MethodFields]] = ShadowFields
    read: ClassVar[Mapping[str, str]] = {
        "share_embeddings": "whether the network uses the base's embeddings, if they have the network's width",
        "shadow_alpha": "factor on the value that is added to a block's input",
        "shadow_hidden_size": "the network's width; the base's by default",
        "shadow_intermediate_size": "the width of the network's feed-forward layers; the base's by default",
        "shadow_model": "must be mirror, which means that the network has the base's class",
        "shadow_num_attention_heads": "the network's number of heads; the base's by default",
        "shadow_num_hidden_layers": "the network's number of layers; one by default",
        "update_hidden_size": "inner width of a block's two small networks; r by default",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "auxiliary_loss_weight": "training only",
        "shadow_dropout": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True, "share_embeddings": True}

    @classmethod
    def decode(cls, file: File) -> Findings:
        if file.settings.method_fields.shadow_model != "mirror":
            why = "the shadow network does not have the base's class, and the file does not state the network's class"
            raise Unsupported(why, where="shadow_model", cure="Train the adapter with shadow_model='mirror'")
        yield from (Kept(key) for word, key in file.shared.items() if _of(HEAD, word))
        network = _network(file)
        for stem, keys in file.modules(tuple(FIELDS)).items():
            check_stem(stem, next(iter(keys.values())))
            decoded = cls.decode_keys(file, keys)
            yield replace(
                decoded, update=decoded.update.replace(**network.fields), keys={**decoded.keys, **network.keys}
            )

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        """Return the update of one block, with an empty network. `decode` adds the network, which all blocks share."""
        config = file.settings.method_fields
        check_parts(keys, FIELDS)
        tensors = {FIELDS[part]: file.tensors[key] for part, key in keys.items()}
        check_rank(keys["shadow_down.weight"], tensors["down"], config.r)
        check_rank(keys["shadow_update_gate.0.weight"], tensors["gate_in"], config.update_hidden_size or config.r)
        nothing = Lazy((0,), tensors["down"].dtype, bytes)
        update = make("shadow", tensors | {"network": nothing}, alpha=config.shadow_alpha)
        return DecodedUpdate(keys["shadow_down.weight"].path, update, {FIELDS[part]: key for part, key in keys.items()})

    @classmethod
    def encode(cls, update: Shadow) -> dict[str, tuple[str, Lazy]]:
        leaves = {field: as_lazy(leaf) for field, leaf in update.tensors.items()}
        coded = {field: (_named(part), leaves[field]) for part, field in FIELDS.items()}
        if "projection" in leaves:
            coded["projection"] = f"{PROJECTION}.default.weight", leaves["projection"]
        start = 0
        for i, (name, shape) in enumerate(update.parts.items()):
            stop = start + math.prod(shape)
            coded[f"network.{i}"] = f"{NETWORK}.default.{name}", _slice(leaves["network"], start, stop, shape)
            start = stop
        return coded

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        r, m = int(some.down.shape[0]), int(some.gate_in.shape[0])
        return {
            "r": r,
            "shadow_alpha": some.alpha,
            "shadow_hidden_size": None if some.projection is None else int(some.projection.shape[1]),
            "shadow_intermediate_size": some.inner or None,
            "shadow_num_attention_heads": some.heads or None,
            "shadow_num_hidden_layers": None if some.layers == 1 else some.layers,
            "share_embeddings": some.shared_embeddings or some.projection is not None,
            "update_hidden_size": None if m == r else m,
        }

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        members = {t: u for t, group in updates.items() for u in group if isinstance(u, Shadow)}
        sizes = {t: (u.down.shape, u.gate_in.shape, id(u.network), id(u.projection)) for t, u in members.items()}
        for target in minority({t: repr((u.attributes, sizes[t])) for t, u in members.items()}):
            yield target, "the network, sizes or settings of this block's shadow differ from those of most blocks"


def _named(part: str) -> str:
    """Return the ending of a block's key as PEFT writes it, with `default` after the first word."""
    word, _, rest = part.partition(".")
    return f".{word}.default.{rest}"


@dataclass(frozen=True, slots=True, eq=False)
class _Network:
    """The fields that the updates of all blocks share, and the keys of the tensors in these fields."""

    fields: dict[str, Any]
    keys: dict[str, Key]


def _network(file: File) -> _Network:
    config = file.settings.method_fields
    keys = {word.removeprefix(f"{NETWORK}."): key for word, key in sorted(file.shared.items()) if _of(NETWORK, word)}
    projection = file.shared.get(f"{PROJECTION}.weight")
    if not keys:
        some = next(iter(file.tensors))
        raise Malformed("the file lacks the network (shadow_backbone)", where=some.text, cure=SAVE_WITH_PEFT)
    tensors = {name: file.tensors[key] for name, key in keys.items()}
    fields: dict[str, Any] = {
        "network": _joined(list(tensors.values()), keys[next(iter(keys))]),
        "names": "\n".join(" ".join([name, *map(str, tensor.shape)]) for name, tensor in tensors.items()),
        "layers": config.shadow_num_hidden_layers or 1,
        "heads": config.shadow_num_attention_heads or 0,
        "inner": config.shadow_intermediate_size or 0,
        "shared_embeddings": config.share_embeddings and projection is None,
    }
    named = {f"network.{i}": key for i, key in enumerate(keys.values())}
    if projection is None:
        return _Network(fields, named)
    return _Network(fields | {"projection": file.tensors[projection]}, named | {"projection": projection})


def _of(part: str, word: str) -> bool:
    return word.startswith(f"{part}.")


def _joined(tensors: list[Lazy], key: Key) -> Lazy:
    """Join the tensors of the network into one vector."""
    kinds = sorted({tensor.dtype.name for tensor in tensors})
    if len(kinds) > 1:
        raise ShapeMismatch(
            f"the network's tensors have several dtypes: {' and '.join(kinds)}",
            where=key.text,
            cure="Save the network's tensors in one dtype",
        )
    size = sum(math.prod(tensor.shape) for tensor in tensors)
    return Lazy((size,), tensors[0].dtype, lambda: b"".join(bytes(tensor.fetch()) for tensor in tensors))


def _slice(whole: Lazy, start: int, stop: int, shape: tuple[int, ...]) -> Lazy:
    return whole.map(lambda values: values[start:stop].reshape(shape), shape)
