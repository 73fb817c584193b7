"""Find the updates that a PEFT file cannot express, before the file is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, cast

from ...core.updates import ContextUpdate
from ...io.lazy import Lazy, as_array, as_lazy
from ...methods._grouped import AcrossGroups
from ...methods.dora import DoRA
from ...methods.grouped_dora import GroupedDoRA
from ...methods.ia3 import IA3
from ...methods.lora import LoRA
from ...methods.rows import Rows
from .._losses import Loss
from .families import FAMILIES, family_of, family_of_method
from .file import make
from .pairs import BESIDE, BIASED, LINEAR, PAIRS, RESIDUAL, ROUTED, may_stand, why_not_there
from .spelling import config_name, is_embedding, is_parameter, lora_paths

if TYPE_CHECKING:
    import torch

    from ...core.adapter import Target, Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint


PLAIN = {"embeddings": "prompt", "past": "prefix"}
"""A map from where a context update acts (`place`) to the method that stores its output instead of its network."""


def has_encoder(update: Update) -> bool:
    """Whether a context update has a network; PEFT's files can only store the network's output."""
    return isinstance(update, ContextUpdate) and update.place in PLAIN and family_of(update) is None


def without_encoders(
    updates: Mapping[Target, tuple[Update, ...]],
) -> tuple[dict[Target, tuple[Update, ...]], list[str]]:
    """Replace the networks of context updates with the networks' outputs, and return a line for each replacement."""
    lines = [
        f"{t}: wrote the output of {u.method}'s network, not the network"
        for t, us in updates.items()
        for u in us
        if has_encoder(u)
    ]
    changed = {
        t: tuple(_computed(cast(ContextUpdate, u)) if has_encoder(u) else u for u in us) for t, us in updates.items()
    }
    return changed, lines


def _computed(update: ContextUpdate) -> Update:
    import numpy as np

    dtype = as_lazy(next(iter(update.tensors.values()))).dtype
    wide = update.map(lambda leaf: cast("torch.Tensor", as_array(leaf).astype(np.float64)))
    values = np.ascontiguousarray(getattr(wide, update.place)()).astype(dtype.array)
    P = Lazy(values.shape, dtype, lambda: values.tobytes())
    return make(PLAIN[update.place], {"P": P})


def find_losses(updates: Updates, base: Checkpoint | None, by_formula: bool = False) -> list[Loss]:
    """Return each update that a PEFT file cannot express, at most once; see `File` for `by_formula`."""
    found: dict[tuple[Target, int], str] = {}
    parties = (_biases(updates, base, by_formula), _attentions(updates), _families(updates, base))
    for losses in (_alone(updates, base, by_formula), _together(updates), *parties):
        for target, position, why in losses:
            found.setdefault((target, position), why)
    return [(target, position, why) for (target, position), why in found.items()]


def acting_method(updates: Updates) -> type[Update] | None:
    """Return the most frequent main method (see `_acts`) of the updates; None if no update has a main method."""
    count = Counter(type(u) for found in updates.values() for u in found if _acts(type(u)))
    return min(count, key=lambda method: (-count[method], _rank(method)), default=None)


def _may_stand(update: Update, method: type[Update] | None) -> bool:
    """Whether an update may be in a file whose main method is `method`."""
    family = family_of(update)
    return may_stand(update, method) or (family is not None and method in family.methods())


def _acts(method: type[Update]) -> bool:
    """Whether a method can be a file's main method; other updates, such as token rows, are possible in any file."""
    return method in (*PAIRS, IA3) or family_of_method(method) is not None


def _rank(method: type[Update]) -> int:
    """Return a sort key that decides between main methods that equally many updates have."""
    return [*PAIRS, IA3].index(method) if method in BESIDE else len(BESIDE) + _position(method)


def _position(method: type[Update]) -> int:
    return next(i for i, family in enumerate(FAMILIES.values()) if method in family.methods())


def _alone(updates: Updates, base: Checkpoint | None, by_formula: bool) -> Iterator[Loss]:
    method, paths = acting_method(updates), lora_paths(updates)
    for target, found in updates.items():
        for position, update in enumerate(found):
            why = _why_not(target, update, method) or _why_not_there(target, update, paths, base, by_formula)
            if why:
                yield target, position, why


def _why_not(target: Target, update: Update, method: type[Update] | None) -> str:
    if has_encoder(update):
        return f"PEFT cannot store the network of {update.method}; --on-loss fold (on_loss='fold') writes its output"
    if not (type(update) in BESIDE or family_of(update)):
        return f"PEFT files cannot store the method {update.method}"
    if _acts(type(update)) and not _may_stand(update, method):
        return f"a PEFT file cannot store both {update.method} and {_name(method)}"
    if isinstance(update, Rows) and method not in (*PAIRS, None):
        return f"the config of {_name(method)} has no field for token rows"
    if target.rows is not None:
        return f"PEFT has no {update.method} on some rows of a fused weight"
    return ""


def _why_not_there(target: Target, update: Update, paths: set[str], base: Checkpoint | None, by_formula: bool) -> str:
    adapts = isinstance(update, PAIRS)
    if target.stacked and not (isinstance(update, LoRA) and update.bias is None and "." in target.path):
        return f"PEFT adapts stacked experts only by plain LoRA on a module's parameter, not by {update.method}"
    if adapts and 0 in next(iter(update.tensors.values())).shape:
        return f"its {update.method} has rank 0"
    if isinstance(update, AcrossGroups) and (len(update.A.shape) < 3 or update.groups == 1):
        return f"{update.method} with one group is a plain {update.method.removeprefix('grouped_')}"
    if isinstance(update, GroupedDoRA) and update.regrouped == by_formula:
        norms = "of the matrix that PEFT divides by" if update.regrouped else "of its own kernels"
        return f"{update.method} divides by the norms {norms}, but the written file would be read with the other norms"
    if isinstance(update, (LoRA, DoRA)) and target.layout == "in out *k" and len(update.tensors["A"].shape) > 2:
        return f"PEFT has no {update.method} on a transposed convolution"
    apart = isinstance(update, (DoRA, AcrossGroups, *LINEAR, *RESIDUAL, *ROUTED))
    if apart and (is_parameter(target, paths, base) or config_name(target, paths) != target.path):
        return f"PEFT has no {update.method} on a parameter or an attention"
    if isinstance(update, (*RESIDUAL, *ROUTED)) and is_embedding(target):
        return f"PEFT has no {update.method} on an embedding"
    if why := why_not_there(target, update):
        return why
    if family := family_of(update):
        if not family.empty and _empty(update):
            return f"its {update.method} has a tensor without elements"
        return (
            f"PEFT has no {update.method} on a parameter"
            if is_parameter(target, paths, base)
            else family.why_not(target, update)
        )
    if isinstance(update, Rows) and (target.path in paths or target.layout != "in out *k"):
        return "PEFT stores single token rows only for an embedding without a LoRA"
    return ""


def _together(updates: Updates) -> Iterator[Loss]:
    seen: dict[str, Target] = {}
    for target, found in updates.items():
        if seen.setdefault(target.path, target) != target and target.rows is None:
            yield from (
                (target, position, "a weight has two targets with different layouts") for position in range(len(found))
            )
        ranks = [_order(type(update)) for update in found]
        for position in range(1, len(found)):
            if ranks[position] <= max(ranks[:position]):
                yield (
                    target,
                    position,
                    f"PEFT cannot apply {found[position].method} after {found[position - 1].method} on one module",
                )


def _order(method: type[Update]) -> int:
    """Return a sort key for methods in the order in which PEFT applies them: replacements, main methods, token rows."""
    return 2 if method is Rows else int(_acts(method))


def _biases(updates: Updates, base: Checkpoint | None, by_formula: bool) -> Iterator[Loss]:
    """Yield the LoRAs with a bias, or those without one if these are fewer: `lora_bias` is one setting for a file.

    PEFT's forward ignores the bias of an attention's input projection, so a LoRA of this projection without a bias fits
    both groups.
    """
    paths = lora_paths(updates)
    parties: dict[bool, list[Loss]] = {True: [], False: []}
    impossible: list[Loss] = []
    for target, found in updates.items():
        for position, update in enumerate(found):
            if isinstance(update, BIASED):
                has = update.bias is not None
                input_projection = not by_formula and _is_input_projection(target, paths)
                if input_projection and not has:
                    continue
                where = is_parameter(target, paths, base) or is_embedding(target) or input_projection
                own, others = ("has a", "have none") if has else ("has no", "have one")
                if has and where:
                    impossible.append((target, position, f"PEFT has no {update.method} with a bias at this target"))
                else:
                    why = f"this {update.method} {own} bias, but others {others}"
                    parties[has].append((target, position, why))
    # After `--on-loss drop` omitted the impossible ones, the remaining LoRAs are compared again.
    if impossible:
        yield from impossible
    elif parties[True] and parties[False]:
        yield from min(parties[True], parties[False], key=len)


def _is_input_projection(target: Target, paths: Collection[str]) -> bool:
    return target.path.endswith(".in_proj_weight") and config_name(target, paths) != target.path


def _attentions(updates: Updates) -> Iterator[Loss]:
    """Yield updates of an attention's projection if their rank differs from the rank of the other projection."""
    paths, first = lora_paths(updates), dict[str, int]()
    for target, found in updates.items():
        for position, update in enumerate(found):
            if isinstance(update, LoRA):
                rank = int(update.A.shape[-2 if target.stacked else 0])
                if first.setdefault(config_name(target, paths), rank) != rank:
                    yield target, position, "its rank differs from the attention's other projection"


def _families(updates: Updates, base: Checkpoint | None) -> Iterator[Loss]:
    """Yield updates that need other config values than most updates; a config has one value for all modules."""
    method = acting_method(updates)
    family = family_of_method(method)
    methods = family.methods() if family else ()
    own = [update for found in updates.values() for update in found if type(update) in methods]
    if family and not family.empty and any(map(_empty, own)):
        return  # Updates with empty tensors are already losses. The next call checks the remaining updates.
    for target, why in family.apart(updates, base) if family else ():
        position = next(i for i, update in enumerate(updates[target]) if type(update) in methods)
        yield target, position, why


def _empty(update: Update) -> bool:
    return any(0 in leaf.shape for leaf in update.tensors.values())


def _name(method: type[Update] | None) -> str:
    return "others" if method is None else method.__module__.rpartition(".")[2]
