"""The names in a base, as they are stored, and their templates."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from .architectures import shape_of

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Words that torch.compile, FSDP, activation checkpointing and Fabric insert into paths; models never use them."""

PERHAPS = frozenset({"module", "default"})
"""Words of DistributedDataParallel and of adapters' names that a model may also use."""

Left = list[tuple[str, str]]
"""(target, its name after the rules so far) for targets that are not mapped yet."""


@dataclass(frozen=True, eq=False)
class Names:
    """The names in a base.

    Attributes:
        paths: the dotted paths of modules with a weight or a bias, and of parameters.
        outer: the paths of all modules, for the targets in `anywhere`.
        anywhere: the targets that may be any module.
        families: results of `by_family` for this base by family, cached for the next call.
        experts: the number of experts in a layer, from the base's config; 0 if it does not state it.
    """

    paths: Collection[str]
    outer: Collection[str] = ()
    anywhere: Collection[str] = ()
    families: dict[str, object] = field(default_factory=dict)
    experts: int = 0

    def has(self, path: str, target: str) -> bool:
        """Whether the base has a path that this target may have."""
        return path in (self.outer if target in self.anywhere else self.paths)

    def lacks_weight(self, path: str) -> bool:
        """Whether a base has a module's bias, but not its weight."""
        return f"{path}.bias" in self.paths and f"{path}.weight" not in self.paths

    @cached_property
    def templates(self) -> dict[str, str]:
        """Map each template to one name that fits the template: `layers.#.mlp` to `layers.0.mlp`."""
        names = [name for name in (*self.paths, *self.outer) if "." in name]
        # Substitute in one string with all names: one substitution for each of the 90,000 names of a large model takes
        # three times as long.
        templates = _NUMBERS.sub(".#", "\n".join(names)).split("\n")
        if len(templates) != len(names):  # Fall back to single names: a name has a line break, or there are no names.
            templates = [template_of(name) for name in names]
        examples = dict(zip(templates, names, strict=True))
        examples.update((shape_of(name), name) for name in (*self.paths, *self.outer) if "." not in name)
        return examples

    @cached_property
    def endings(self) -> dict[str, list[str]]:
        """Map each end of a template to the templates with this end."""
        ends: dict[str, list[str]] = {}
        for template in self.templates:
            words = template.split(".")
            for cut in range(len(words)):
                ends.setdefault(shape_of(".".join(words[cut:])), []).append(template)
        return ends

    @cached_property
    def without_wrappers(self) -> tuple[Names, dict[str, str]] | None:
        """Return the names without wrappers' words, and a map from short to full names; None if no name has one.

        State dicts that were saved inside FSDP or torch.compile have such words. A PEFT model's has `base_layer`.
        """
        off = WRAPPERS | {"base_layer"}
        # Search each word in one string: searching in each of the 90,000 names of a large mixture of experts takes 40
        # times as long.
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
"""Matches numbers in names, except a number as the first word, which names a part of a pipeline."""


def template_of(name: str) -> str:
    """Replace numbers in a name with `#`, as in `Names.templates`."""
    return _NUMBERS.sub(".#", name) if "." in name else shape_of(name)


def swap(name: str, off: str, on: str) -> str:
    """Replace one prefix of a name with another; a name without the prefix is unchanged."""
    return on + name[len(off) :] if name.startswith(off) else name
