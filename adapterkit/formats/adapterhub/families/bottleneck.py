"""Bottleneck adapters, Compacter and invertible adapters: configs without an `architecture`.

What stands where is in `sublayers`, what is called how in `slots`, and what a new config must say in `stacks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ....core.adapter import Target, Updates
from ....errors import Malformed, Unsupported
from ....io.lazy import Lazy, as_lazy
from ....linalg.activations import ACTIVATIONS
from .. import stacks
from ..file import Found, check_same, make, take
from ..slots import COUPLING, own_slots, shared_slots, words_of
from ..sublayers import EMBEDDINGS, MODELS, hanging, standing
from ._family import Family, Fields, Number

if TYPE_CHECKING:
    from ....io.checkpoint import Checkpoint
    from ..config import Settings
    from ..file import Findings, Part
    from ..keys import Key
    from ..naming import Naming

KIND, INVERTIBLE, SHARED = "adapters", "invertible_adapters", "shared_parameters"

OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Activations as configs without a version call them -> as the library does since."""

TWICE = {"adapter_norm_before.weight": "norm_before", "adapter_norm_before.bias": "norm_before_bias"}
"""Second names of the tensors of a norm before the adapter, which `adapter_down` holds as well."""


class BottleneckFields(Fields, frozen=True, kw_only=True):
    """What the tensors mean, and where they stand."""

    non_linearity: str
    mh_adapter: bool = False
    output_adapter: bool = False
    cross_adapter: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    ln_before: bool = False
    ln_after: bool = False
    is_parallel: bool = False
    scaling: Number | str = 1.0
    use_gating: bool = False
    inv_adapter: str | None = None
    phm_layer: bool = False
    phm_bias: bool | None = True
    shared_phm_rule: bool | None = True
    factorized_phm_rule: bool | None = False
    shared_W_phm: bool | None = False
    factorized_phm_W: bool | None = True


class BottleneckFamily(Family):
    """No `architecture` at all."""

    methods = frozenset({"bottleneck", "compacter", "invertible"})
    fields = BottleneckFields
    read: ClassVar[Mapping[str, str]] = {
        "adapter_residual_before_ln": "the adapter's own residual is added before its last norm",
        "cross_adapter": "it stands behind attention to an encoder",
        "factorized_phm_W": "Compacter: a factor is a product of two",
        "factorized_phm_rule": "Compacter: a rule is a product of two",
        "inv_adapter": "nice: a coupling block behind the embeddings; glow: refused",
        "is_parallel": "the adapter reads the residual and is added to the output",
        "ln_after": "a norm behind the adapter",
        "ln_before": "a norm before the adapter",
        "mh_adapter": "it stands behind the attention",
        "non_linearity": "the activation",
        "original_ln_after": "the block's residual and norm follow",
        "original_ln_before": "the block's residual and norm come first",
        "output_adapter": "it stands behind the feed-forward layers",
        "phm_bias": "Compacter: layers have a bias",
        "phm_layer": "the layers are Compacter's",
        "residual_before_ln": "where the adapter's own residual begins: true, false or post_add",
        "scaling": "a number, learned or channel",
        "shared_W_phm": "Compacter: all layers share their factors",
        "shared_phm_rule": "Compacter: all layers share one rule",
        "use_gating": "a gate weights the change",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "dropout": "training only",
        "hypercomplex_nonlinearity": "initial values",
        "init_weights": "initial values",
        "init_weights_seed": "initial values",
        "inv_adapter_reduction_factor": "sizes; the tensors say them",
        "learn_phm": "training only",
        "leave_out": "which layers have tensors; the keys say so",
        "phm_c_init": "initial values",
        "phm_dim": "sizes; the tensors say them",
        "phm_init_range": "initial values",
        "phm_rank": "sizes; the tensors say them",
        "reduction_factor": "sizes; the tensors say them",
        "stochastic_depth": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = stacks.FRESH

    @classmethod
    def settle(cls, fields: BottleneckFields, settings: Settings) -> BottleneckFields:
        name = fields.non_linearity.lower()
        renamed = OLD_NAMES.get(name, name) if settings.version is None else name
        return msgspec.structs.replace(fields, non_linearity=renamed)

    @classmethod
    def decode(cls, part: Part) -> Findings:
        _check_words(part)
        words = msgspec.structs.asdict(part.own)
        shared, keys = _shared(part, words)
        for path, slots in part.groups(KIND).items():
            found = standing(path, part.settings.model_type) if part.settings.model_type in MODELS else None
            if found is None:
                why = f"where an adapter at {path} of a {part.settings.model_type} stands is not known to this version"
                known = f"Known: {', '.join(sorted(MODELS))}"
                raise Unsupported(why, where=next(iter(slots.values())).text, cure=known)
            target, rule = found
            if getattr(part.own, rule.flag):
                tensors, own_keys = _own(part, words, slots)
                place = {"residual": rule.residual, "norm": rule.norm}
                method = "compacter" if part.own.phm_layer else "bottleneck"
                update = make(method, tensors | shared, **_attributes(part.own), **place)
                yield Found(Target(target), update, (*own_keys, *keys))
        if part.own.inv_adapter:
            yield from _invertible(part)

    @classmethod
    def spell(cls, updates: Updates, naming: Naming) -> Iterator[tuple[str, Lazy]]:
        for own in stacks.forms(updates):
            words = words_of([update for _, update in own])
            for target, update in own:
                hung = hanging(target.path, update.residual, update.norm, naming.model_type)
                path = target.path if hung is None else hung[0]
                for slot, field in {**own_slots(words), **(TWICE if words["ln_before"] else {})}.items():
                    yield naming.key(path, KIND, slot), as_lazy(update.tensors[field])
            for slot, fields in shared_slots(words).items():
                yield naming.key(naming.root, SHARED, slot), as_lazy(own[0][1].tensors[fields[0]])
        for update in (u for found in updates.values() for u in found if u.method == "invertible"):
            for slot, field in COUPLING.items():
                yield naming.key(naming.root, INVERTIBLE, slot), as_lazy(update.tensors[field])

    @classmethod
    def compose(cls, updates: Updates, base: Checkpoint | None) -> dict[str, Any]:
        return stacks.compose(updates, base)

    @classmethod
    def losses(cls, updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
        return stacks.losses(updates, base)


def _check_words(part: Part) -> None:
    own = part.own
    known = {
        "non_linearity": (own.non_linearity, tuple(ACTIVATIONS)),
        "scaling": (own.scaling if isinstance(own.scaling, str) else "channel", ("learned", "channel")),
        "residual_before_ln": (str(own.residual_before_ln).lower(), ("true", "false", "post_add")),
        "inv_adapter": (own.inv_adapter or "nice", ("nice",)),
    }
    for field, (word, words) in known.items():
        if word not in words:
            why = f"an unknown {field} {word[:60]!r}"
            raise Unsupported(why, where=f"{part.at}.{field}", cure=f"Known: {', '.join(words)}")


def _own(part: Part, words: Mapping[str, Any], slots: Mapping[str, Key]) -> tuple[dict[str, Lazy], list[Key]]:
    """The tensors of one adapter by field, and their keys."""
    fields = own_slots(words)
    tensors = take(part, slots, fields)
    keys = [slots[slot] for slot in fields]
    for slot, field in TWICE.items() if words["ln_before"] else ():
        if slot in slots:
            check_same(part, slots[slot], next(slots[s] for s, f in fields.items() if f == field))
            keys.append(slots[slot])
    return tensors, keys


def _shared(part: Part, words: Mapping[str, Any]) -> tuple[dict[str, Lazy], list[Key]]:
    """The tensors by field that all adapters of the model share, and their keys."""
    fields = shared_slots(words)
    groups = [*part.groups(SHARED).values()]
    missing = [slot for slot in fields if not groups or slot not in groups[0]]
    if missing:
        why = f"the shared {', '.join(missing)} are not in the file: saving from a model without a head drops them"
        raise Malformed(why, where=SHARED, cure="Save it again from a model with a head, where it was trained")
    keys = [groups[0][slot] for slot in fields]
    tensors = {field: part.tensors[key] for key, slot in zip(keys, fields, strict=True) for field in fields[slot]}
    return tensors, keys


def _attributes(own: BottleneckFields) -> dict[str, Any]:
    return {
        "non_linearity": own.non_linearity,
        "scaling": 1.0 if isinstance(own.scaling, str) else float(own.scaling),
        "parallel": own.is_parallel,
        "original_ln_before": own.original_ln_before,
        "original_ln_after": own.original_ln_after,
        "residual_before_ln": str(own.residual_before_ln).lower(),
        "adapter_residual_before_ln": own.adapter_residual_before_ln,
    }


def _invertible(part: Part) -> Iterator[Found]:
    """The coupling block behind the embeddings; an output head that it is inverted before is no part of the base."""
    for path, slots in part.groups(INVERTIBLE).items():
        name = EMBEDDINGS.get(part.settings.model_type or "")
        if name is None:
            why = f"where the embeddings of a {part.settings.model_type} end is not known to this version"
            raise Unsupported(
                why, where=next(iter(slots.values())).text, cure=f"Known: {', '.join(sorted(EMBEDDINGS))}"
            )
        update = make("invertible", take(part, slots, COUPLING), non_linearity=part.own.non_linearity)
        yield Found(Target(f"{path}.{name}" if path else name), update, tuple(slots[slot] for slot in COUPLING))
