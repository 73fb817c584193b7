"""Index the names in a base: paths, templates with `#` for numbers, and endings of templates."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from .architectures import shape_of

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Words that torch.compile, FSDP, activation checkpointing and Fabric insert into paths; models never use them."""

PERHAPS = frozenset({"module", "default"})
"""Words that DistributedDataParallel and adapters insert into paths, but which models also use."""

Left = list[tuple[str, str]]
"""(target, name) of each target that is not mapped yet; the name is the target's name after the rules so far."""


@dataclass(frozen=True, eq=False)
class Names:
    """The names in a base.

    Attributes:
        paths: the dotted paths of modules with a weight or a bias, and of parameters.
        outer: the paths of all modules, with or without own tensors, to which the targets in `anywhere` can be mapped.
        anywhere: the targets that may be any module, with or without own tensors.
        families: a cache of `FamilyNames` objects, by family.
        experts: the number of experts in a layer, from the base's config; 0 if unknown.
    """

    paths: Collection[str]
    outer: Collection[str] = ()
    anywhere: Collection[str] = ()
    families: dict[str, object] = field(default_factory=dict)
    experts: int = 0

    def has(self, path: str, target: str) -> bool:
        """Whether the base has the path, and the target may have this path."""
        return path in (self.outer if target in self.anywhere else self.paths)

    def lacks_weight(self, path: str) -> bool:
        """Whether the base has the bias of module `path`, but not its weight."""
        return f"{path}.bias" in self.paths and f"{path}.weight" not in self.paths

    @cached_property
    def templates(self) -> dict[str, str]:
        """Return a map from each template to one name that fits it, such as `layers.#.mlp` to `layers.0.mlp`."""
        names = [name for name in (*self.paths, *self.outer) if "." in name]
        # Join all names into one string for the substitution: a call for each of the 90,000 names of a large model
        # takes three times as long.
        templates = _NUMBERS.sub(".#", "\n".join(names)).split("\n")
        if len(templates) != len(names):  # There are no names, or a name has a line break: substitute in each name.
            templates = [template_of(name) for name in names]
        examples = dict(zip(templates, names, strict=True))
        examples.update((shape_of(name), name) for name in (*self.paths, *self.outer) if "." not in name)
        return examples

    @cached_property
    def endings(self) -> dict[str, list[str]]:
        """Return a map from each ending of a template to all templates with this ending."""
        ends: dict[str, list[str]] = {}
        for template in self.templates:
            words = template.split(".")
            for cut in range(len(words)):
                ends.setdefault(shape_of(".".join(words[cut:])), []).append(template)
        return ends

    @cached_property
    def without_wrappers(self) -> tuple[Names, dict[str, str]] | None:
        """Return the names without the words of wrappers, and a map from short to full names.

        None if no name has such a word.

        FSDP and torch.compile add such words to the names in a state dict, and PEFT adds `base_layer`.
        """
        off = WRAPPERS | {"base_layer"}
        # Join all names into one string for the search: searching each of the 90,000 names of a large mixture of
        # experts takes 40 times as long.
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
"""Matches numbers in names. A number as the first word does not match, because it names a part of a pipeline."""


def template_of(name: str) -> str:
    """Replace numbers in a name with `#`, as in `Names.templates`."""
    return _NUMBERS.sub(".#", name) if "." in name else shape_of(name)


def swap(name: str, off: str, on: str) -> str:
    """Replace the prefix `off` of a name with `on`; return a name without the prefix unchanged."""
    return on + name[len(off) :] if name.startswith(off) else name
