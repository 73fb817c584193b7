"""Families with low-rank factors similar to LoRA's: AdaLoRA, DEFT, GraLoRA, PEANuT and OSF.

AdaLoRA: `lora_A` [r, in * k], `lora_B` [out, r], `lora_E` [r, 1]. Training lowers the rank r of some
modules, so r differs between modules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....errors import SAVE_WITH_PEFT, USE_ITS_CONFIG, Malformed, ShapeMismatch
from ....io.arrange import item
from ....io.lazy import Lazy, as_lazy
from ....methods.adalora import AdaLoRA
from ....methods.deft import DEFT
from ....methods.gralora import GraLoRA
from ....methods.osf import OSF
from ....methods.peanut import PEANuT
from ..file import DecodedUpdate, File, Key, make
from ..patterns import exact_alpha, exactly, finds
from . import Family, MethodFields, Parts, Rank, check_parts, check_rank, minority
from ._weights import check_size, layout, not_embedded, not_linear, side, unlike

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue

FIELDS = {"lora_A": "A", "lora_B": "B", "lora_E": "E"}
"""A map from the endings of keys to fields of the update."""

EPSILON = 1e-5
"""PEFT computes AdaLoRA's scaling as `lora_alpha / (rank + EPSILON)`."""


class AdaLoRAFields(MethodFields, frozen=True, kw_only=True):
    """The rank before training, alpha, and which of the `init_r` rows of `lora_A` each module keeps."""

    init_r: Rank = 12
    lora_alpha: float = 8
    rank_pattern: dict[str, list[bool]] | None = None


class AdaloraFamily(Family):
    """The family of the peft_type ADALORA."""

    name = "adalora"
    peft_type = "ADALORA"
    method = AdaLoRA
    parts = tuple(FIELDS)
    method_fields: ClassVar[type[MethodFields]] = AdaLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "init_r": "scaling = lora_alpha / (init_r + 0.00001), also for modules with a reduced rank",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "beta1": "training only",
        "beta2": "training only",
        "deltaT": "training only",
        "orth_reg_weight": "training only",
        "target_r": "training only",
        "tfinal": "training only",
        "tinit": "training only",
        "total_step": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "total_step": 1,
    }
    empty = True
    folds = ("E",)

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        check_parts(keys, FIELDS)
        some, config = keys["lora_A"], file.settings.method_fields
        # PEFT prunes a module's rank in training, and saves in `rank_pattern` which of the `init_r` entries are left.
        kept = (config.rank_pattern or {}).get(f"{some.path}.lora_E")
        if kept is not None and len(kept) != config.init_r:
            why = f"this list has {len(kept)} entries, but init_r is {config.init_r}"
            raise Malformed(why, where=f"rank_pattern: {some.path}.lora_E", cure=SAVE_WITH_PEFT)
        left = config.init_r if kept is None else sum(kept)
        check_rank(some, file.tensors[some], left)
        check_rank(keys["lora_B"], file.tensors[keys["lora_B"]], left, axis=1)
        check_rank(keys["lora_E"], file.tensors[keys["lora_E"]], left)
        tensors = {FIELDS[part]: file.tensors[key] for part, key in keys.items()}
        tensors["E"] = tensors["E"].reshape(left) if tensors["E"].shape == (left, 1) else tensors["E"]
        # In training, PEFT uses init_r as alpha if lora_alpha is 0 or below, and so does this code. When PEFT loads a
        # pruned module, it divides alpha by the remaining rank instead of init_r. That is a bug, because it changes the
        # trained function. This code therefore always divides by init_r.
        alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
        update = make("adalora", tensors, scaling=alpha / (config.init_r + EPSILON))
        layout = "in out *k" if file.settings.fan_in_fan_out else "out *in"
        return DecodedUpdate(some.path, update, {FIELDS[part]: key for part, key in keys.items()}, layout)

    @classmethod
    def encode(cls, update: AdaLoRA) -> dict[str, tuple[str, Lazy]]:
        leaves = {field: as_lazy(leaf) for field, leaf in update.tensors.items()}
        leaves["E"] = leaves["E"].reshape(*leaves["E"].shape, 1)
        return {field: (part, leaves[field]) for part, field in FIELDS.items()}

    @classmethod
    def why_not(cls, target: Target, update: AdaLoRA) -> str:
        return not_embedded(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        members = cls.of_it(updates)
        ranks = {path: int(update.E.shape[0]) for path, update in members.items()}
        scaling = next((update.scaling for update in members.values()), 1.0)
        init_r = max([1, *ranks.values()])
        init_r, alpha = next(_exact(scaling, init_r), (init_r, 8))
        dropped = {f"{path}.lora_E": [i < r for i in range(init_r)] for path, r in ranks.items() if r != init_r}
        return {
            "init_r": init_r,
            "lora_alpha": alpha,
            "rank_pattern": dropped or None,
            "target_r": max(1, min(ranks.values(), default=1)),
            "fan_in_fan_out": cls.turned(updates),
        }

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        members = cls.of_it(updates)
        r = max([1, *(int(update.E.shape[0]) for update in members.values())])
        return [path for path, update in members.items() if next(_exact(update.scaling, r), None) is None]

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        scalings = {t: u.scaling for t, group in updates.items() for u in group if isinstance(u, AdaLoRA)}
        for target in minority(scalings):
            yield target, "its scaling differs from that of most adalora updates, but the config has only one scaling"


def _exact(scaling: float, rank: int) -> Iterator[tuple[int, float]]:
    """Yield pairs (init_r, lora_alpha) that give exactly this scaling, with init_r from `rank` to `rank + 8`."""
    for init_r in range(rank, rank + 9):
        guess = scaling * (init_r + EPSILON)
        if not math.isfinite(guess) or guess <= 0:
            continue
        whole = round(guess) if guess < 1 << 53 else guess
        near = (whole, guess, math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf))
        yield from ((init_r, alpha) for alpha in near if alpha > 0 and alpha / (init_r + EPSILON) == scaling)


# DEFT: `deft_P` [out, r] and, if `para` is false, `deft_R` [r, in]. The rank r is at most the number of outputs.


PARTS = {"deft_P": "P", "deft_R": "R"}


class DEFTFields(MethodFields, frozen=True, kw_only=True):
    """The rank, the scaling, whether the modules have no R (`para`), and whether P is made orthonormal."""

    r: int = 8
    alpha: float | None = None
    para: bool = False
    decomposition_method: Literal["relu", "qr"] = "relu"


class DeftFamily(Family):
    """The family of the peft_type DEFT."""

    name = "deft"
    peft_type = "DEFT"
    method = DEFT
    parts = tuple(PARTS)
    method_fields: ClassVar[type[MethodFields]] = DEFTFields
    read: ClassVar[Mapping[str, str]] = {
        "alpha": "scaling = alpha / r, with the module's own r; without alpha, scaling = 1",
        "decomposition_method": "qr: P is made orthonormal; relu: P is used unchanged",
        "para": "if true, the modules have no R",
    }
    harmless: ClassVar[Mapping[str, str]] = {"deft_dropout": "training only", "init_scale": "initial values"}
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "deft_dropout": 0.0, "init_scale": 1.0, "init_weights": True}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        config = file.settings.method_fields
        check_parts(keys, ("deft_P",) if config.para else tuple(PARTS))
        key = keys["deft_P"]
        P = file.tensors[key]
        rank = min(config.r, P.shape[0]) if P.shape else config.r
        check_rank(key, P, rank, axis=1)
        fields = {PARTS[part]: key for part, key in keys.items()}
        tensors = {field: file.tensors[key] for field, key in fields.items()}
        unrotated = make("deft", tensors, scaling=config.alpha / rank if config.alpha else 1.0)
        update = unrotated.replace(orthogonal=config.decomposition_method == "qr")
        return DecodedUpdate(key.path, update, fields, "in out *k" if file.settings.fan_in_fan_out else "out *in")

    @classmethod
    def encode(cls, update: DEFT) -> dict[str, tuple[str, Lazy]]:
        return {field: (f"deft_{field}", as_lazy(leaf)) for field, leaf in update.tensors.items()}

    @classmethod
    def why_not(cls, target: Target, update: DEFT) -> str:

        return not_embedded(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        members = cls.of_it(updates)
        some = max(members.values(), key=lambda update: int(update.P.shape[1]))
        scaled = next((u for u in members.values() if u.scaling != 1), None)
        turned = any(target.layout == "in out *k" and target.path in members for target in updates)
        return {
            "r": int(some.P.shape[1]),
            "alpha": None if scaled is None else exact_alpha((int(scaled.P.shape[1]), float(scaled.scaling)), False),
            "para": some.R is None,
            "decomposition_method": "qr" if some.orthogonal else "relu",
            "fan_in_fan_out": turned,
        }


# GraLoRA: `gralora_A` [g, in / g, r], `gralora_B` [g, r, out / g]. If `hybrid_r` is not 0, the file also has
# `gralora_A_general` and `gralora_B_general`.


BLOCKS = {"gralora_A": "A", "gralora_B": "B"}
HYBRID = BLOCKS | {"gralora_A_general.weight": "A_whole", "gralora_B_general.weight": "B_whole"}
"""Maps from the endings of keys to fields of the update. HYBRID is for configs in which `hybrid_r` is not 0."""


class GraLoRAFields(MethodFields, frozen=True, kw_only=True):
    """The ranks, the number of blocks, and alpha."""

    alpha: float = 64
    gralora_k: int = 2
    hybrid_r: int = 0


class GraLoRAFamily(Family):
    """The family of the peft_type GRALORA."""

    name = "gralora"
    peft_type = "GRALORA"
    method = GraLoRA
    parts = tuple(HYBRID)
    folds = ("B",)
    method_fields: ClassVar[type[MethodFields]] = GraLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "alpha": "scaling = alpha / (r + hybrid_r)",
        "gralora_k": "number of blocks along each axis",
        "hybrid_r": "rank of an additional LoRA of the whole weight; 0 for none",
    }
    harmless: ClassVar[Mapping[str, str]] = {"gralora_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "gralora_dropout": 0.0, "init_weights": True}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        config, r = file.settings.method_fields, file.settings.r
        fields = HYBRID if config.hybrid_r else BLOCKS
        check_parts(keys, fields)
        key = keys["gralora_A"]
        check_size(key, side(file.tensors[key], 0, 3), config.gralora_k, "gralora_k")
        check_size(key, side(file.tensors[key], 2, 3), r, "r")
        if config.hybrid_r:
            whole = keys["gralora_A_general.weight"]
            check_size(whole, side(file.tensors[whole], 0, 2), config.hybrid_r, "hybrid_r")
        tensors = {fields[part]: file.tensors[key] for part, key in keys.items()}
        update = make("gralora", tensors, scaling=config.alpha / (r + config.hybrid_r))
        return DecodedUpdate(
            key.path, update, {fields[part]: key for part, key in keys.items()}, layout(file, key.path)
        )

    @classmethod
    def encode(cls, update: GraLoRA) -> Parts:
        fields = BLOCKS if update.A_whole is None else HYBRID
        return {field: (part, as_lazy(update.tensors[field])) for part, field in fields.items()}

    @classmethod
    def why_not(cls, target: Target, update: GraLoRA) -> str:
        return not_linear(target, update.method)

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        plain = {path: update for path, update in cls.of_it(updates).items() if update.A_whole is None}
        if any(exact_alpha((int(u.A.shape[2]), float(u.scaling)), False) is None for u in plain.values()):
            return list(plain)
        return unlike({path: float(update.scaling) for path, update in plain.items()})

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        forms = Counter(_form(update) for update in cls.of_it(updates).values())
        g, r, hybrid, scaling = forms.most_common(1)[0][0]
        turned = any(target.layout == "in out *k" for target in updates)
        fields = {"gralora_k": g, "r": r, "hybrid_r": hybrid, "fan_in_fan_out": turned}
        return fields | {"alpha": exact_alpha((r + hybrid, scaling), False) or scaling * (r + hybrid)}


def _form(update: GraLoRA) -> tuple[int, int, int, float]:
    hybrid = 0 if update.A_whole is None else int(update.A_whole.shape[0])
    return int(update.A.shape[0]), int(update.A.shape[2]), hybrid, float(update.scaling)


# PEANuT: `peanut_A.weight` [r, out], `peanut_B.weight` [out, r], and `peanut_encoders.<i>.weight` and
# `peanut_decoders.<i>.weight`, each [r, r].


class PEANuTFields(MethodFields, frozen=True, kw_only=True):
    """The rank, the depth, the scaling and the activation."""

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0


class PeanutFamily(Family):
    """The family of the peft_type PEANUT."""

    name = "peanut"
    peft_type = "PEANUT"
    method = PEANuT
    parts = ("peanut_A.weight", "peanut_B.weight", "peanut_encoders.*.weight", "peanut_decoders.*.weight")
    method_fields: ClassVar[type[MethodFields]] = PEANuTFields
    read: ClassVar[Mapping[str, str]] = {
        "act_fn": "the activation",
        "depth": "number of encoders; there are as many decoders",
        "scaling": "factor on the change",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        config = file.settings.method_fields
        if not 0 <= config.depth <= len(keys):
            some = next(iter(keys.values()))
            why = f"the config has depth = {config.depth}, which does not fit a module with {len(keys)} tensors"
            raise ShapeMismatch(why, where=some.text, cure=USE_ITS_CONFIG)
        inner = {f"{side}s.{i}": f"peanut_{side}s.{i}.weight" for side in _SIDES for i in range(config.depth)}
        parts = {"A": "peanut_A.weight", "B": "peanut_B.weight", **inner}
        check_parts(keys, parts.values())
        fields = {field: keys[part] for field, part in parts.items()}
        check_rank(fields["A"], file.tensors[fields["A"]], config.r)
        tensors = {name: file.tensors[fields[name]] for name in ("A", "B")}
        if config.depth:
            tensors |= {f"{s}s": _stacked([fields[f"{s}s.{i}"] for i in range(config.depth)], file) for s in _SIDES}
        update = make("peanut", tensors, scaling=config.scaling).replace(activation=config.act_fn)
        return DecodedUpdate(fields["A"].path, update, fields)

    @classmethod
    def encode(cls, update: PEANuT) -> dict[str, tuple[str, Lazy]]:
        encoded = {name: (f"peanut_{name}.weight", as_lazy(update.tensors[name])) for name in ("A", "B")}
        for part in _SIDES:
            stack = update.tensors.get(f"{part}s")
            for i in range(0 if stack is None else stack.shape[0]):
                encoded[f"{part}s.{i}"] = f"peanut_{part}s.{i}.weight", item(as_lazy(stack), i)  # type: ignore[arg-type]
        return encoded

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        depth = 0 if some.encoders is None else int(some.encoders.shape[0])
        return {"r": int(some.A.shape[0]), "depth": depth, "act_fn": some.activation, "scaling": some.scaling}


def _stacked(keys: list[Key], file: File) -> Lazy:
    first = file.tensors[keys[0]]
    for key in keys:
        tensor = file.tensors[key]
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            one, other = f"{list(tensor.shape)} {tensor.dtype.name}", f"{list(first.shape)} {first.dtype.name}"
            why = f"the shape and dtype must be {other}, as in {keys[0].text}, but are {one}"
            raise ShapeMismatch(why, where=key.text, cure=SAVE_WITH_PEFT)
    tensors = [file.tensors[key] for key in keys]
    return Lazy((len(keys), *first.shape), first.dtype, lambda: b"".join(bytes(t.fetch()) for t in tensors))


_SIDES = ("encoder", "decoder")


# OSF: `osf_svd_params.U_low` [out, r], `osf_svd_params.S_low` [r], `osf_svd_params.V_low` [r, in].


OSF_FIELDS = {"osf_svd_params.U_low": "U", "osf_svd_params.S_low": "S", "osf_svd_params.V_low": "V"}
"""A map from the endings of keys to fields of the update."""

Share = int | float | None


class OSFFields(MethodFields, frozen=True, kw_only=True):
    """The number or fraction of singular values that stay in the base."""

    effective_rank: Share = None
    rank_pattern: dict[str, int | float] | None = None

    def kept(self, name: str, all_: int) -> int:
        """Return how many of a module's singular values stay in the base."""
        patterns = self.rank_pattern or {}
        value = next((value for pattern, value in patterns.items() if finds(pattern, name)), self.effective_rank)
        if value is None:
            return all_ // 2
        share = isinstance(value, float) and 0 < value <= 1
        return max(min(int(all_ * value) if share else int(value), all_), 0)


class OsfFamily(Family):
    """The family of the peft_type OSF."""

    name = "osf"
    peft_type = "OSF"
    method = OSF
    parts = tuple(OSF_FIELDS)
    method_fields: ClassVar[type[MethodFields]] = OSFFields
    read: ClassVar[Mapping[str, str]] = {
        "effective_rank": "number or fraction of frozen singular values (default: half); rank_pattern takes precedence",
    }
    harmless: ClassVar[Mapping[str, str]] = {"target_svd_config": "PEFT does not use it"}
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        check_parts(keys, OSF_FIELDS)
        fields = {OSF_FIELDS[part]: key for part, key in keys.items()}
        update = make("osf", {field: file.tensors[key] for field, key in fields.items()})
        dims: Any = update.dims()
        all_, key = min(dims["out"], dims["in"]), fields["S"]
        kept = file.settings.method_fields.kept(key.path, all_)
        if kept + dims["r"] != all_ or not kept:
            why = f"the file has {dims['r']} of {all_} singular values, but the config leaves {kept} in the base"
            raise ShapeMismatch(why, where=key.text, cure=USE_ITS_CONFIG)
        return DecodedUpdate(key.path, update, fields)

    @classmethod
    def encode(cls, update: OSF) -> Parts:
        return {field: (part, as_lazy(update.tensors[field])) for part, field in OSF_FIELDS.items()}

    @classmethod
    def why_not(cls, target: Target, update: OSF) -> str:
        if update.S_own is not None:
            return "this osf stores the matrix that it subtracts, but PEFT computes this matrix from the base"
        return super().why_not(target, update) or (
            "" if _kept(update) else "this osf replaces all singular values; PEFT keeps at least one"
        )

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        kept = {path: _kept(update) for path, update in cls.of_it(updates).items()}
        common = Counter(kept.values()).most_common(1)[0][0]
        others = {exactly(path): count for path, count in kept.items() if count != common}
        return {"effective_rank": common, "rank_pattern": others or None}


def _kept(update: OSF) -> int:
    return int(min(update.U.shape[0], update.V.shape[1]) - update.S.shape[0])
