"""The names of a base, as they are stored, and their templates."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from .architectures import shape_of

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Words that torch.compile, FSDP, activation checkpointing and Fabric insert into paths; no model has them itself."""

PERHAPS = frozenset({"module", "default"})
"""Words of DistributedDataParallel and of adapters' names that a model may also have itself."""

Left = list[tuple[str, str]]
"""(target, its name so far) of targets that have no place yet."""


@dataclass(frozen=True, eq=False)
class Names:
    """The names of a base.

    Attributes:
        paths: dotted paths of its modules with a weight or a bias, and of its parameters.
        outer: paths of all modules, for the targets in `anywhere`.
        anywhere: targets that may be any module.
        families: family -> what `by_family` worked out for this base, kept for the next call.
        experts: how many experts a layer has by the base's config; 0 where it does not say.
    """

    paths: Collection[str]
    outer: Collection[str] = ()
    anywhere: Collection[str] = ()
    families: dict[str, object] = field(default_factory=dict)
    experts: int = 0

    def has(self, path: str, target: str) -> bool:
        """Whether a target may be at a path."""
        return path in (self.outer if target in self.anywhere else self.paths)

    def lacks_weight(self, path: str) -> bool:
        """Whether a base has the bias of a module and no weight beside it."""
        return f"{path}.bias" in self.paths and f"{path}.weight" not in self.paths

    @cached_property
    def templates(self) -> dict[str, str]:
        """Return template -> one name that has it: `layers.#.mlp` -> `layers.0.mlp`."""
        names = [name for name in (*self.paths, *self.outer) if "." in name]
        # All names as one string: a substitution for each of the 90,000 names of a large model takes three times as
        # long.
        templates = _NUMBERS.sub(".#", "\n".join(names)).split("\n")
        if len(templates) != len(names):  # A name with a line break in it, or no names.
            templates = [template_of(name) for name in names]
        examples = dict(zip(templates, names, strict=True))
        examples.update((shape_of(name), name) for name in (*self.paths, *self.outer) if "." not in name)
        return examples

    @cached_property
    def endings(self) -> dict[str, list[str]]:
        """Return end of a template -> the templates that have it."""
        ends: dict[str, list[str]] = {}
        for template in self.templates:
            words = template.split(".")
            for cut in range(len(words)):
                ends.setdefault(shape_of(".".join(words[cut:])), []).append(template)
        return ends

    @cached_property
    def without_wrappers(self) -> tuple[Names, dict[str, str]] | None:
        """Return the names without wrappers' words, and short name -> full name; None if no name has such a word.

        A state dict that was saved inside FSDP or torch.compile has such words, and one of PEFT's models `base_layer`.
        """
        off = WRAPPERS | {"base_layer"}
        # One search per word in one string: a search per name takes 40 times as long for the 90,000 names of a large
        # mixture of experts.
        text = "\n".join(self.paths)
        if not any(word in text for word in off):
            return None
        wrapped = [path for path in self.paths if any(word in path for word in off)]
        words = {path: [word for word in path.split(".") if word not in off] for path in wrapped}
        real = {".".join(left): path for path, left in words.items() if len(left) <= path.count(".")}
        real = {name: path for name, path in real.items() if name and name not in self.paths}
        if not real:
            return None
        taken = set(real.values())
        paths = {path for path in self.paths if path not in taken} | real.keys()
        return Names(paths, self.outer, self.anywhere, experts=self.experts), real


_NUMBERS = re.compile(r"\.(?:0|[1-9][0-9]{0,8})(?=[.\n]|\Z)")
"""Numbers in names, except a first word that is a number: that one names a part of a pipeline."""


def template_of(name: str) -> str:
    """Replace numbers in a name by `#`, as in `Names.templates`."""
    return _NUMBERS.sub(".#", name) if "." in name else shape_of(name)


def swap(name: str, off: str, on: str) -> str:
    """Replace one prefix of a name by another; a name without the prefix stays as it is."""
    return on + name[len(off) :] if name.startswith(off) else name
