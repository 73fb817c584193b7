"""Deduce how a base without a known family stores square weights: as [out, in], or as [in, out].

PEFT trains adapters of linear layers and of transformers' Conv1D, which stores [in, out]. A PEFT config has only one
`fan_in_fan_out` for all modules: its value is that of the module that PEFT adapted last. So if an adapter has modules
of both kinds, the layout that it states is wrong for one of them. Shapes prove the layout of all weights that are not
square. For square weights, this module looks at other weights of the same model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ...errors import ShapeMismatch
from ..moves import is_conv1d_name
from ..ties import is_embedding

if TYPE_CHECKING:
    from ...core.adapter import Target
    from .fitting import Shapes
    from .sites import Site

_LAYER = re.compile(r"(?:^|\.)\d+(?:\.|$)")
_ATTENTION = "in_proj_weight"


def names_embedding(path: str) -> bool:
    """Whether a module has the name of an embedding: of tokens, or of positions, types and the like.

    An adapter's layout of an embedding is never in doubt, because tools store the factors of embeddings apart.
    """
    last = path.rpartition(".")[2]
    return "emb" in last or last == "wpe" or is_embedding(f"{path}.weight")


def ambiguous_square(target: Target) -> ShapeMismatch:
    """Return the error for a square weight whose layout is unknown."""
    return ShapeMismatch(
        "the weight is square and may be stored as [out, in] or [in, out], and the adapter's layout is wrong for "
        "other weights",
        where=str(target),
        cure=f"State the layout with --rename 'out_in:{target.path}' (a linear layer) or "
        f"--rename 'in_out:{target.path}' (transformers' Conv1D) (rename=). Or add the model_type of a known family to "
        "the base's config",
    )


@dataclass(frozen=True)
class LayoutEvidence:
    """Evidence for the layouts of square weights, from one adapter's sites and a base's shapes.

    Attributes:
        sites: pairs of a site and the layouts that fit its weight's shape.
        shapes: the shapes of the base's stored tensors, by name.
    """

    sites: Sequence[tuple[Site, list[str]]]
    shapes: Shapes = field(repr=False)

    @cached_property
    def proven(self) -> set[tuple[str, str]]:
        """Pairs of the layout that the adapter states and the only layout that fits."""
        return {(site.target.layout, fits[0]) for site, fits in self.sites if len(fits) == 1}

    def of_square(self, site: Site) -> bool | None:
        """Whether the square weight of `site` is stored as [in, out]; None if nothing contradicts the adapter.

        Raises:
            ShapeMismatch: the adapter's layout is in doubt, and other weights do not show the layout.
        """
        path, declared = site.target.path, site.target.layout == "in out *k"
        if is_conv1d_name(path):
            shown = self._shown(path)
            if shown is None and not declared and False in self._kinds:
                raise ambiguous_square(site.target)
            return shown
        if not declared or not self._uniform or len(self._last_names) < 2:
            return None
        shown = self._shown(path)
        # [out, in] is plausible only if another module explains why the adapter states [in, out].
        if shown is None or not (shown or True in self._kinds):
            raise ambiguous_square(site.target)
        return shown

    def of_matrix(self, path: str) -> bool | None:
        """Whether the matrix of the module `path` is stored as [in, out]; None if the base's biases do not show it."""
        shape, bias = (self.shapes.get(f"{path}.{end}") for end in ("weight", "bias"))
        if shape is None or len(shape) != 2:
            return None
        if shape[0] != shape[1] and bias is not None and len(bias) == 1 and bias[0] in shape:
            return bias[0] == shape[1]
        return self._shown(path)

    @cached_property
    def _linear(self) -> dict[str, str]:
        """The layouts that the adapter states for matrices, except embeddings, by the module's path."""
        return {
            site.target.path: site.target.layout
            for site, _ in self.sites
            if site.weight is not None
            and len(self.shapes[site.weight]) == 2
            and not site.weight.endswith(_ATTENTION)
            and not names_embedding(site.target.path)
        }

    @cached_property
    def _kinds(self) -> set[bool]:
        """The results of `is_conv1d_name` for the modules in `_linear`."""
        return set(map(is_conv1d_name, self._linear))

    @cached_property
    def _last_names(self) -> set[str]:
        """The last parts of the paths in `_linear`."""
        return {path.rpartition(".")[2] for path in self._linear}

    @cached_property
    def _uniform(self) -> bool:
        """Whether the adapter states one layout for all modules, as PEFT does."""
        return len(set(self._linear.values())) < 2

    def _shown(self, path: str) -> bool | None:
        """Whether the other weights of the same stack of layers are stored as [in, out]; None if they do not agree.

        Modules whose names are those of a Conv1D are compared only with each other, and so are all other modules.
        """
        stack, named = _stack_of(path), is_conv1d_name(path)
        if stack is not None:
            seen = self._stacks.get((stack, named), set())
        else:
            head = path.partition(".")[0]
            seen = set[bool]().union(
                *(each for (of, kind), each in self._stacks.items() if kind == named and of.partition(".")[0] == head)
            )
        return next(iter(seen)) if len(seen) == 1 else None

    @cached_property
    def _stacks(self) -> dict[tuple[str, bool], set[bool]]:
        """The proven layouts in each stack of layers, by the path of the stack and the kind of the modules' names."""
        seen: dict[tuple[str, bool], set[bool]] = {}

        def add(path: str, in_out: bool) -> None:
            stack = _stack_of(path)
            if stack is not None:
                seen.setdefault((stack, is_conv1d_name(path)), set()).add(in_out)

        for name, shape in self.shapes.items():
            path = name.removesuffix(".weight")
            # A bias has one value for each output.
            bias = self.shapes.get(f"{path}.bias") if path != name and len(shape) == 2 else None
            if bias is not None and len(bias) == 1 and shape[0] != shape[1] and bias[0] in shape:
                add(path, bias[0] == shape[1])
        for site, fits in self.sites:
            path = site.target.path
            if len(fits) == 1 and path in self._linear:
                add(path, fits[0] == "in out *k")
        return seen


def _stack_of(path: str) -> str | None:
    """Return the part of a path before the first number; None if the path has no number."""
    number = _LAYER.search(path)
    return None if number is None else path[: number.start()]
