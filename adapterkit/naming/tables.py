"""Translate names in both directions with tables of template pairs.

A template is a dotted name in which `{n}` stands for a number, as in `model.layers.{n}.self_attn.q_proj`, and `{e}` for
the number of an expert. A table is one to one, so that a name translated there and back is unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from ..errors import TargetNotFound, nearest

PREFIXES = ("base_model.model.", "language_model.model.", "model.language_model.", "language_model.")
"""Prefixes that multimodal bases put before the names of their language model."""


class NameTable:
    """A one-to-one table between our names and a tool's names.

    Args:
        pairs: a map from our templates to the tool's templates; both have the same placeholders.
    """

    def __init__(self, pairs: Mapping[str, str]) -> None:
        self.pairs = dict(pairs)
        assert len({*self.pairs.values()}) == len(self.pairs), "two of our names have the same name in the tool"

    def there(self, own: str) -> str | None:
        """Return the tool's name for our name; None if the table does not have our name."""
        return _translate(own, self._there)

    def back(self, foreign: str) -> str | None:
        """Return our name for a tool's name; None if the table does not have the tool's name."""
        return _translate(foreign, self._back)

    @cached_property
    def _there(self) -> dict[str, str]:
        return {_shape(own): foreign for own, foreign in self.pairs.items()}

    @cached_property
    def _back(self) -> dict[str, str]:
        return {_shape(foreign): own for own, foreign in self.pairs.items()}


class TableNames:
    """A `NameTable` applied to one base, whose names may have a prefix that the table lacks.

    Args:
        table: the table of the base's family.
        modules: the base's names, if known. If given, `back` returns only names in the base, with a prefix such as
            `language_model.` if the base has it.
    """

    def __init__(self, table: NameTable, modules: Iterable[str] | None = None) -> None:
        self.table = table
        self.walked: dict[str, list[str]] | None = None
        if modules is not None:
            self.walked = {}
            for own in dict.fromkeys(modules):
                foreign = self.there(own)
                if foreign is not None:
                    self.walked.setdefault(foreign, []).append(own)

    def there(self, own: str) -> str | None:
        """Return the tool's name for our name, which may have a prefix; None if the table does not have the name."""
        return next(filter(None, (self.table.there(name) for name in without_prefix(own))), None)

    def back(self, foreign: str) -> str:
        """Return our name for a tool's name.

        Raises:
            TargetNotFound: the table does not have the name, or not exactly one module of the base has it.
        """
        if self.walked is None:
            own = self.table.back(foreign)
            if own is None:
                cure = nearest(foreign, self.table.pairs.values()) or "Give the base with --base (base=)"
                raise TargetNotFound("the family's table does not have this name", where=foreign, cure=cure)
            return own
        found = self.walked.get(foreign, [])
        if len(found) != 1:
            why = f"exactly one module must have this name, but the base has {', '.join(found) or 'none'}"
            cure = nearest(foreign, self.walked) or "Is this the base that the adapter was trained on?"
            raise TargetNotFound(why, where=foreign, cure=cure)
        return found[0]


def without_prefix(name: str) -> Iterable[str]:
    """Yield the name, and the name without each prefix in `PREFIXES` with which it begins."""
    yield name
    for prefix in PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            yield from without_prefix(rest)
            if not rest.startswith("model."):
                yield from without_prefix(f"model.{rest}")


def modules_of(names: Iterable[str]) -> Iterable[str]:
    """Yield the names of stored tensors, and those of their modules."""
    for name in names:
        yield name
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias"):
            yield module


_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,8})(?![^.])")
_HOLE = re.compile(r"\{[a-z]\}")


def _shape(template: str) -> str:
    return _HOLE.sub("#", template)


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    found = table.get(_NUMBER.sub("#", name))
    if found is None:
        return None
    numbers = iter(_NUMBER.findall(name))
    return _HOLE.sub(lambda _: next(numbers), found)
