"""Find the factors, rank and scaling of each LoRA and DoRA, for modules and for stacks of experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import TYPE_CHECKING, Any

from ...errors import (
    PASS_BASE,
    SAVE_WITH_PEFT,
    USE_ITS_CONFIG,
    USE_ITS_CONFIG_AND_BASE,
    Malformed,
    ShapeMismatch,
    Unsupported,
    UsageError,
)
from ...io.lazy import Lazy, as_lazy, bytes_of, from_numpy
from ...naming.moves import stored_in_out
from .file import LATENT, DecodedUpdate, File, Findings, Key, make, names_module, parse_version, written_by_unsloth
from .patterns import unwrapped

if TYPE_CHECKING:
    from ...core.adapter import Target
    from ...core.updates import Update
    from ...io.lazy import Array, Buffer, Shape
    from ...io.strict_json import JsonValue
    from .file import PeftSettings


# Collect the tensors of each LoRA or DoRA, and look up its rank and scaling in the config.


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
"""A map from a key's (part, leaf) to the update's field; see `Key`."""


@dataclass(frozen=True, slots=True, eq=False)
class PeftFactors:
    """The tensors of one adapted module or parameter, as stored in the file.

    Attributes:
        stem: the module's path in the keys, including the words that PEFT's wrappers insert, such as `base_layer`.
        keys: a map from each field of the update to its key.
        tensors: a map from each field of the update to its tensor.
        embedding: whether the keys show that the module is an embedding.
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
        Malformed: a module lacks a tensor, or has a tensor that the config does not enable.
        ShapeMismatch: a factor has fewer than two axes.
        Unsupported: a module combines LoRA-XS with another method or a bias.
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
    """Check the rank of A and B against the config. For a grouped convolution, B has `rank / groups` columns.

    Raises:
        ShapeMismatch: the rank of A or B does not match the config.
    """
    for field, axis, share in (("A", 0, 1), ("B", 1, groups)):
        size = factors.tensors[field].shape[axis] * share
        if size != rank * experts:
            each = f" for each of {experts} experts" if experts > 1 else ""
            raise ShapeMismatch(
                f"the shape {list(factors.tensors[field].shape)} implies rank {size}; the config states {rank}{each}",
                where=factors.keys[field].text,
                cure=USE_ITS_CONFIG,
            )  # fmt: skip


def adapt(
    settings: PeftSettings, name: str, tensors: Mapping[str, Lazy], times: float = 1.0,
    *, embedding: bool = False, by_formula: bool = False,
) -> Update:  # fmt: skip
    """Create the update of a module or parameter, with the config's method and scaling.

    Args:
        settings: the settings in the config.
        name: the path of the module or parameter in the base.
        tensors: a map from each field of the update to its tensor.
        times: a number by which the config's scaling is multiplied.
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


def _method(settings: PeftSettings, tensors: Mapping[str, Lazy], embedding: bool) -> str:
    if "magnitude" in tensors:
        return "grouped_dora" if _in_groups(tensors) else "dora"
    if "R" in tensors:
        return "lora_xs"
    if "diag" in tensors:
        return "kasa"
    if "A_blocks" in tensors or "B_blocks" in tensors:
        return "bdlora"
    variant = "alora" if settings.alora_invocation_tokens is not None else "arrow" if settings.arrow_config else None
    if variant and (embedding or len(tensors["A"].shape) != 2):
        why = f"{variant} cannot adapt an embedding or a convolution"
        raise Unsupported(why, where=variant, cure="Remove embeddings and convolutions from target_modules")
    if variant:
        return variant
    if _in_groups(tensors):
        return "grouped_lora"
    # Use plain LoRA for an embedding: PEFT subtracts no initial values from an embedding's table.
    return "lora" if embedding else settings.residual or "lora"


def _router(arrow: Any, tensors: Mapping[str, Lazy], scaling: float) -> Update:
    """Create an Arrow update with the router's settings.

    Arrow does not use this file's A and B. The update's `idle_*` fields store them, so that they can be written again.
    """
    idle = {f"idle_{name}": tensor for name, tensor in tensors.items()}
    tasks, general = len(arrow.task_adapter_names or ()), len(arrow.gks_adapter_names or ()) if arrow.use_gks else 0
    return make("arrow", idle, scaling=scaling).replace(
        top_k=arrow.top_k, temperature=float(arrow.router_temperature), tasks=tasks, general=general
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
                f"factor {name} needs two or more axes, but has shape {list(tensors[name].shape)}",
                where=keys[name].text,
                cure="The factor was saved from one shard of a model: gather the shards, then save again",
            )  # fmt: skip
    embedding = keys["A"].part == "lora_embedding_A" or keys["B"].part == "lora_embedding_B"
    return PeftFactors(stem, keys, tensors, embedding)


def _check_partners(settings: PeftSettings, keys: Mapping[str, Key], needs: Mapping[str, bool], where: str) -> None:
    """Check that a module has exactly the tensors that the config requires.

    Args:
        settings: the settings in the config.
        keys: a map from each field of the update to its key.
        needs: a map from each field of the update to whether the config requires the field.
        where: a key of the module, for errors.
    """
    for name, needed in needs.items():
        if needed and name not in keys:
            raise Malformed(
                f"the file lacks a tensor that this one needs: {_WORDS[name]}", where=where, cure=SAVE_WITH_PEFT
            )
        if not needed and name in keys:
            why = f"the file has {_WORDS[name]}, but the config does not enable it"
            raise Malformed(why, where=keys[name].text, cure=USE_ITS_CONFIG)
    if "R" in keys and (keys.keys() & {"magnitude", "bias", "diag"} or settings.use_bdlora or settings.residual):
        raise Unsupported(
            "LoRA-XS cannot be combined with another method or a bias",
            where=keys["R"].text,
            cure="Save the adapter without the other method and the bias",
        )


_WORDS = {
    "A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector of DoRA", "bias": "lora_B.bias (lora_bias)",
    "diag": "lora_diag of KaSA",
}  # fmt: skip

# Read and write LoRA that adapts parameters listed in `target_parameters`, such as stacks of experts.
#
# lora_A and lora_B are two matrices. Each matrix contains the factors of all experts.
#
# A file has keys such as `experts.lora_A` and `experts.base_layer.lora_A`, without the names of the parameters. PEFT
# wraps a module once for each adapted parameter, in the order in which the module defines its parameters. The config
# lists the names in any order. The tensors' shapes show which pair belongs to which parameter.
#
# Files differ in two ways that the keys do not show:
#
# * PEFT before 0.19 assumes that every stack is `[expert, in, out]`, but nearly all models store `[expert, out, in]`.
#   In old files for these models, lora_A's columns are outputs and lora_B's rows are inputs (peft #3165).
# * lora_B's columns have one of two orders. In PEFT, the expert's index varies fastest (`rank_major`). In Unsloth's
#   training until September 2026, the expert's index varied slowest (`grouped_by_expert`), and the config does not show
#   the order (unsloth-zoo #1232, #1269).


RANK_MAJOR, GROUPED, PEFT_0_18 = "rank_major", "grouped_by_expert", "peft_0.18"

ORDERS = frozenset({RANK_MAJOR, GROUPED, PEFT_0_18})
"""The values of `experts_order`. All but `peft_0.18` are also values of `lora_B_layout` in a config."""

SWAPPED_BEFORE = (0, 19)
"""The first release of PEFT that does not swap inputs and outputs of stacks stored as `[expert, out, in]`."""

OLD_VERSION = "0.18.1"
"""The `peft_version` to write into the config if the file swaps inputs and outputs, as PEFT before 0.19 does."""

MAX_NAMES = 6
"""The maximum number of names in `target_parameters` that may refer to parameters of the same module.

Real models need two. The limit is low because the reader tries all permutations of the names.
"""

IN_ORDER = ("gate_up_proj", "down_proj")
"""The parameters of stacked experts in transformers, in the order in which the module defines them."""


def adapts_parameter(file: File, path: str) -> bool:
    """Whether a pair of factors adapts a parameter listed in `target_parameters`, not the module at `path`.

    If `target_modules` selects the module, the pair adapts the module, as in PEFT.
    """
    return bool(file.settings.target_parameters and _names(file, path)) and not names_module(
        file.settings.target_modules, path
    )


def decode_parameters(file: File, factors: Iterable[PeftFactors]) -> Findings:
    """Yield an update for each parameter that a pair of factors adapts.

    Raises:
        UsageError: the file does not show which parameter a pair adapts, and the caller gave no base. Or the file does
            not show the layout of the experts, and neither the base nor `experts_order` shows it.
        Unsupported: the shapes of several parameters in the base fit the same pair.
        Malformed: a pair fits no parameter in `target_parameters`.
        ShapeMismatch: a factor is not a matrix, or its rank does not match the config.
    """
    modules: dict[str, list[PeftFactors]] = {}
    for each in factors:
        modules.setdefault(each.key.path, []).append(each)
    for path, group in modules.items():
        for each in group:
            _check_matrices(each)
        names = _assign(file, path, group)
        sizes = {name: _size(file, each, f"{path}.{name}") for each, name in zip(group, names, strict=True)}
        related = _related(sizes)
        for each, name in zip(group, names, strict=True):
            yield _parameter(file, each, f"{path}.{name}", None if related is None else related == "swapped")


def stack(B: Lazy, experts: int, order: str = RANK_MAJOR) -> Lazy:
    """Reorder lora_B from the file's [out, r * e] to [e, out, r].

    Args:
        B: the matrix lora_B, which contains the columns of all experts.
        experts: the number of experts.
        order: the order of the columns: `rank_major` (the expert's index varies fastest) or `grouped_by_expert`
            (slowest).
    """
    out, r = B.shape[0], B.shape[1] // experts
    if order == GROUPED:
        return _by_expert(B, (experts, out, r), lambda b, e: b.reshape(out, experts, r)[:, e].transpose(1, 0, 2))
    return _by_expert(B, (experts, out, r), lambda b, e: b.reshape(out, r, experts)[:, :, e].transpose(2, 0, 1))


def stack_swapped(A: Lazy, B: Lazy, experts: int, order: str) -> tuple[Lazy, Lazy]:
    """Return A as [e, r, in] and B as [e, out, r], from a file that swaps inputs and outputs.

    Args:
        A: the matrix lora_A, [r * e, out]; along the rows, the expert's index varies slowest.
        B: the matrix lora_B, [in, r * e].
        experts: the number of experts.
        order: the order of B's columns; see `stack`.
    """
    (rows, out), in_ = A.shape, B.shape[0]
    r = rows // experts
    axes = (in_, experts, r) if order == GROUPED else (in_, r, experts)
    forward = (1, 2, 0) if order == GROUPED else (2, 1, 0)

    def inputs(b: Array, e: slice) -> Array:
        return b.reshape(axes).transpose(forward)[e]

    def outputs(a: Array, e: slice) -> Array:
        return a.reshape(experts, r, out)[e].swapaxes(1, 2)

    return _by_expert(B, (experts, r, in_), inputs), _by_expert(A, (experts, out, r), outputs)


def _by_expert(leaf: Lazy, shape: Shape, take: Callable[[Array, slice], Array]) -> Lazy:
    """Return a lazy stack of experts. If only some experts are read, `take` gathers only these from the matrix."""
    each = math.prod(shape[1:])

    def part(first: int, count: int) -> Buffer:
        start, stop = first // each, -(-(first + count) // each)
        size, skipped = leaf.dtype.itemsize, first - start * each
        return bytes_of(take(_values(leaf), slice(start, stop)))[skipped * size : (skipped + count) * size]

    return Lazy(shape, leaf.dtype, lambda: part(0, math.prod(shape)), part=part)


@lru_cache(maxsize=4)
def _values(leaf: Lazy) -> Array:
    """Read a whole matrix and cache its values.

    The whole matrix is read even for one expert, because the values of one expert are scattered over lora_B. The cache
    helps a merge into a base that stores each expert separately. Such a merge reads one expert at a time and alternates
    between two parameters.
    """
    return leaf.numpy()


def unstack(B: Lazy) -> Lazy:
    """Reorder lora_B from [e, out, r] to PEFT's [out, r * e]."""
    experts, out, r = B.shape
    return B.map(lambda b: b.transpose(1, 2, 0).reshape(out, r * experts), (out, r * experts))


def factor_in(order: str, name: str, target: Target, update: Update) -> Lazy:
    """Return lora_A or lora_B for a file with the layout `order`; the inverse of `stack` and `stack_swapped`.

    Args:
        order: the layout: `grouped_by_expert` or `peft_0.18`.
        name: the matrix to return, `A` or `B`.
        target: the parameter. Its layout decides whether PEFT before 0.19 swaps outputs and inputs.
        update: the parameter's LoRA, with A `[e, r, in]` and B `[e, out, r]`.
    """
    A, B = as_lazy(update.tensors["A"]), as_lazy(update.tensors["B"])
    swaps = order == PEFT_0_18 and target.layout == "e out *in"
    if name == "A":
        rows = B.map(lambda b: b.swapaxes(1, 2), (B.shape[0], B.shape[2], B.shape[1])) if swaps else A
        return rows.reshape(-1, rows.shape[-1])
    columns = A.map(lambda a: a.swapaxes(1, 2), (A.shape[0], A.shape[2], A.shape[1])) if swaps else B
    if order != GROUPED:
        return unstack(columns)
    experts, out, r = columns.shape
    return columns.map(lambda b: b.transpose(1, 0, 2).reshape(out, experts * r), (out, experts * r))


def in_order_of(
    config: Mapping[str, JsonValue], order: str | None, updates: Mapping[Target, object]
) -> Mapping[str, JsonValue]:
    """Return the config with the field that tells readers the layout of stacks: `lora_B_layout` or `peft_version`."""
    if order is None or not any(target.stacked for target in updates):
        return config
    if order == PEFT_0_18:
        return {**{k: v for k, v in config.items() if k != "lora_B_layout"}, "peft_version": OLD_VERSION}
    return {**config, "lora_B_layout": order}


def _parameter(file: File, factors: PeftFactors, path: str, swaps: bool | None) -> DecodedUpdate:
    rank = file.settings.rank(path)
    experts = max(factors.A.shape[0] // rank, 1)
    check_rank(factors, rank, experts)
    keys = {name: factors.keys[name] for name in ("A", "B")}
    shape = file.base_shape(path)
    if experts == 1 and (shape is None or len(shape) == 2):
        return DecodedUpdate(path, adapt(file.settings, path, {"A": factors.A, "B": factors.B}), keys)
    order = _order(file, factors, experts, rank)
    if file.compat == PEFT_0_18 or _swaps(file, factors, path, shape, swaps):
        A, B = stack_swapped(factors.A, factors.B, experts, order)
        return DecodedUpdate(path, adapt(file.settings, path, {"A": A, "B": B}), keys, "e out *in")
    tensors = {
        "A": factors.A.reshape(experts, rank, factors.A.shape[1]), "B": stack(factors.B, experts, order)
    }  # fmt: skip
    turned = shape is not None and shape[1:] == (factors.A.shape[1], factors.B.shape[0])
    if turned and shape is not None and shape[1] == shape[2]:
        # A square matrix fits both layouts, so look up the layout in the table of the base's model family.
        turned = bool(stored_in_out(path, None if file.base is None else file.base.config))
    return DecodedUpdate(path, adapt(file.settings, path, tensors), keys, "e in out *k" if turned else "e out *in")


def _order(file: File, factors: PeftFactors, experts: int, rank: int) -> str:
    """Return the order of lora_B's columns: `rank_major` or `grouped_by_expert`.

    Raises:
        UsageError: Unsloth wrote the file, and the config does not state the order.
    """
    settings = file.settings
    if file.compat in ORDERS:
        return GROUPED if file.compat == GROUPED else RANK_MAJOR
    if settings.lora_B_layout is not None:
        return settings.lora_B_layout
    if settings.unsloth and experts > 1 and rank > 1:
        raise UsageError(
            f"Unsloth wrote this adapter without lora_B_layout, so the column order of lora_B {list(factors.B.shape)} "
            "is unknown: rank_major (PEFT, and Unsloth since September 2026) or grouped_by_expert (older Unsloth)",
            where=factors.keys["B"].text,
            cure="Pass --experts-order grouped_by_expert or --experts-order rank_major (experts_order=)",
        )
    return RANK_MAJOR


def _swaps(file: File, factors: PeftFactors, path: str, shape: Shape | None, related: bool | None) -> bool:
    """Whether the columns of lora_A are outputs and the rows of lora_B are inputs, as in PEFT before 0.19.

    Args:
        file: the adapter's file.
        factors: lora_A and lora_B of one parameter.
        path: the parameter's path.
        shape: the parameter's shape in the base, if known.
        related: the result, if the shapes of gate_up_proj and down_proj already determine it; otherwise None.

    Raises:
        UsageError: PEFT before 0.19 wrote the file, and the result depends on the base, but no base is given.
    """
    if related is not None:
        return related
    sides, old = (factors.A.shape[1], factors.B.shape[0]), file.settings.before(SWAPPED_BEFORE)
    if shape is None:
        if old and file.compat is None:
            raise UsageError(
                "PEFT before 0.19 wrote this file: the columns of lora_A are inputs if the model stores experts as "
                "[expert, in, out] (gpt-oss), but outputs if it stores [expert, out, in] (nearly all other models)",
                where=factors.keys["A"].text,
                cure="Pass --base (base=). Without the base, pass --experts-order (experts_order=): "
                "rank_major if the columns of lora_A are inputs, peft_0.18 if they are outputs",
            )
        return False
    in_out = stored_in_out(path, None if file.base is None else file.base.config)
    if shape[1:] == sides[::-1] != sides:
        return False
    return not in_out and (old or (in_out is False and sides[0] != sides[1]))


def _check_matrices(factors: PeftFactors) -> None:
    for field in ("A", "B"):
        if len(factors.tensors[field].shape) != 2:
            why = f"factor {field} of a parameter must be a matrix, but has shape {list(factors.tensors[field].shape)}"
            raise ShapeMismatch(why, where=factors.keys[field].text, cure=SAVE_WITH_PEFT)


def _names(file: File, path: str) -> list[str]:
    """List the module's parameters to which an entry of `target_parameters` may refer."""
    path = unwrapped(path)
    known = [name.rpartition(".") for name in file.settings.target_parameters or ()]
    names = [name for module, _, name in known if not module or path == module or path.endswith(f".{module}")]
    return list(dict.fromkeys(names))


def _named(file: File, path: str) -> list[str]:
    """List the module's parameters that `target_parameters` lists with the module's name, such as `gate.weight`."""
    path = unwrapped(path)
    known = [name.rpartition(".") for name in file.settings.target_parameters or ()]
    return list(dict.fromkeys(n for module, _, n in known if module and f".{path}".endswith(f".{module}")))


def _assign(file: File, path: str, group: Sequence[PeftFactors]) -> tuple[str, ...]:
    if all(each.stem in file.parameters for each in group):
        return tuple(file.parameters[each.stem].rpartition(".")[2] for each in group)
    names = _names(file, path)
    if len(names) > MAX_NAMES or len(group) > len(names):
        why = f"the module has {len(group)} pairs of factors, but target_parameters names {len(names)} parameters"
        raise Malformed(why, where=group[0].key.text, cure=USE_ITS_CONFIG)
    options = [option for option in permutations(names, len(group)) if _fits(file, path, group, option)]
    # With "all-linear", PEFT lists `gate.weight` and `down_proj` in `target_parameters`. The entry `down_proj`
    # contains no module name, so a pair of factors at the router `gate` may belong to either `weight` or `down_proj`.
    # Without a base, prefer the entry that names the router: `gate.weight`.
    sure = [option for option in options if set(option) == set(_named(file, path))]
    if file.base is None and len(sure) == 1:
        options = sure
    if len(options) == 1:
        return options[0]
    if not options:
        why = f"none of the parameters {', '.join(names)} has a shape that fits these factors"
        raise Malformed(
            why,
            where=group[0].key.text,
            cure=USE_ITS_CONFIG_AND_BASE,
        )
    where, which = group[0].key.text, " or ".join(sorted({option[0] for option in options}))
    if file.base is None:
        raise UsageError(f"the file does not show if this pair adapts {which}", where=where, cure=PASS_BASE)
    why = f"the base does not show whether this pair adapts {which}, because several choices fit the shapes"
    raise Unsupported(why, where=where, cure="Merge the adapter with PEFT")


def _fits(file: File, path: str, group: Sequence[PeftFactors], names: Sequence[str]) -> bool:
    sizes = {name: _size(file, each, f"{path}.{name}") for each, name in zip(group, names, strict=True)}
    if None in sizes.values():
        return False
    shapes = {name: file.base_shape(f"{path}.{name}") for name in _names(file, path)}
    if any(shapes.values()):
        # The base contains this module. So a name without a shape in the base is not one of the module's parameters.
        return all(_fits_base(shapes[name], size) for name, size in sizes.items() if size)
    return len({size[0] for size in sizes.values() if size}) == 1 and _fits_gate(sizes)


def _size(file: File, factors: PeftFactors, path: str) -> tuple[int, int, int] | None:
    """Return (experts, out, in) if the pair's shapes fit the parameter's rank in the config; otherwise None."""
    (rows, in_), (out, columns) = factors.A.shape, factors.B.shape
    experts, rest = divmod(rows, file.settings.rank(path))
    return None if rest or rows != columns else (experts, out, in_)


def _fits_base(shape: Shape | None, size: tuple[int, int, int]) -> bool:
    experts, out, in_ = size
    return shape in ((experts, out, in_), (experts, in_, out)) or (experts == 1 and shape == (out, in_))


def _fits_gate(sizes: dict[str, tuple[int, int, int] | None]) -> bool:
    """Whether the shapes of gate_up_proj and down_proj fit each other, with or without swapped inputs and outputs.

    True if one of the two parameters is not adapted.
    """
    gate_up, down = (sizes.get(name) for name in IN_ORDER)
    return not gate_up or not down or _related(sizes) is not None


def _related(sizes: Mapping[str, tuple[int, int, int] | None]) -> str | None:
    """Return `straight` or `swapped` if the shapes show whether inputs and outputs are swapped; otherwise None.

    The number of gate_up_proj's outputs is twice the number of down_proj's inputs. The number of gate_up_proj's inputs
    equals the number of down_proj's outputs. No shapes are both straight and swapped, because `in_` would have to
    equal `down_out` and also `2 * down_out`.
    """
    gate_up, down = (sizes.get(name) for name in IN_ORDER)
    if not gate_up or not down:
        return None
    (_, out, in_), (_, down_out, down_in) = gate_up, down
    if (out, in_) == (2 * down_in, down_out):
        return "straight"
    return "swapped" if (in_, out) == (2 * down_out, down_in) else None


def has_known_order(names: Sequence[str]) -> bool:
    """Whether the order in which a module defines these parameters is known."""
    return len(names) == 1 or set(names) <= set(IN_ORDER)


def depths(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield (name, depth) for each adapted parameter of a module, innermost first.

    PEFT adds one wrapper for each parameter. The depth is the number of wrappers around the parameter's wrapper.
    """
    ordered = sorted(names, key=lambda name: (IN_ORDER.index(name) if name in IN_ORDER else -1, name))
    return ((name, len(ordered) - 1 - position) for position, name in enumerate(ordered))


def as_written(config: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the config for a file whose lora_B comes from `unstack`, with the columns in `rank_major` order.

    PEFT since 0.19 reads only this order, and ignores `lora_B_layout`. If the columns had another order, PEFT would
    silently use the wrong experts.
    """
    config = dict(config)
    if "lora_B_layout" in config or written_by_unsloth(config):
        config["lora_B_layout"] = RANK_MAJOR
    if parse_version(config.get("peft_version")) < SWAPPED_BEFORE:
        config["peft_version"] = None
    return config
