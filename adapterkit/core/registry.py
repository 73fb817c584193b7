"""Registries: find the methods, formats and other extensible parts of adapterkit by name.

Each module of a registry's package defines one entry, and the module's name is the entry's name. Listing the names
imports no module, and looking up an entry imports only the module of this entry. If a registry sets `several`, a module
may define several entries, and listing the names imports all modules.

Other packages add entries as Python entry points in the registry's group. An entry point must have the name of the
module that defines the entry. Such an entry cannot replace a built-in entry.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from ..errors import Unsupported, nearest, shown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from types import ModuleType

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from name to entry. An entry is a class that derives from `root`; by default, a module has only one.

    Args:
        noun: the word for an entry in error messages, such as "method".
        package: the package whose modules define the built-in entries, except modules with a leading underscore.
        group: the group of Python entry points in which other packages add entries.
        root: the class that all entries derive from.
        several: whether a module may define several entries. If so, each entry class sets `name`.
    """

    def __init__(self, noun: str, package: str, group: str, root: type, several: bool = False) -> None:
        self.noun, self.package, self.group, self.root, self.several = noun, package, group, root, several
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        """Return the entry with this name; import its module if necessary.

        Raises:
            Unsupported: the registry has no entry with this name, or several packages add this name.
            TypeError: a built-in module does not define exactly one entry, or an entry point is wrong. An entry point
                must have the name of its module, and must refer to a class that derives from `root`.
        """
        if not isinstance(name, str):
            raise Unsupported(f"{shown(name)} is not the name of a {self.noun}", cure=f"Known: {', '.join(self)}")
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._builtin, *self._third_party}))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._third_party

    @cached_property
    def _builtin(self) -> frozenset[str]:
        path = import_module(self.package).__path__
        modules = frozenset(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))
        if not self.several:
            return modules
        for name in sorted(modules):
            self._add_all(name, import_module(f"{self.package}.{name}"))
        return frozenset(self._loaded)

    @cached_property
    def _third_party(self) -> Mapping[str, list[EntryPoint]]:
        """The entry points of other packages by name, including those that have the name of a built-in entry."""
        announced = _announcements(tuple(sys.path))
        if announced is not None and f"[{self.group}]".encode() not in announced:
            return {}
        from importlib.metadata import entry_points

        points: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            several = points.setdefault(point.name, [])
            # Skip duplicates: a package that is in two folders of `sys.path` is listed twice.
            if point.value not in [each.value for each in several]:
                several.append(point)
        return points

    def packages(self) -> dict[str, str]:
        """Map each name that other packages add to a list of these packages as text: `acme-adapters 1.0, other 2.1`."""
        return {name: ", ".join(map(_package, points)) for name, points in sorted(self._third_party.items())}

    def refused(self) -> dict[str, str]:
        """For each name in `packages()` that cannot be used, return a sentence with the reason.

        The reason is that the name is built in, or that several packages add it.
        """
        return {
            name: f"{packages} adds the {self.noun} {name!r}, which is built in and cannot be replaced"
            if name in self._builtin
            else f"several packages add the {self.noun} {name!r}: {packages}"
            for name, packages in self.packages().items()
            if name in self._builtin or len(self._third_party[name]) > 1
        }

    def _load(self, name: str) -> T:
        if name in self._builtin:
            return self._loaded[name] if self.several else self._entry(import_module(f"{self.package}.{name}"))
        if len(points := self._third_party.get(name, [])) == 1:
            return self._foreign(name, points[0].load())
        if points:
            cure = f"Uninstall all but one of these packages: {self.packages()[name]}"
            raise Unsupported(self.refused()[name], cure=cure)
        cure = nearest(name, self) or f"Known: {', '.join(self)}"
        raise Unsupported(f"unknown {self.noun} {name!r}", cure=cure)

    def _foreign(self, name: str, entry: object) -> T:
        """Check that another package's entry derives from `root`, and that its module has the name of the entry point.

        The two names must be equal: files store the module's name, for example as an update's method, and readers look
        up the entry point of this name.
        """
        fits = inspect.isclass(entry) and issubclass(entry, self.root)
        if not fits or entry.__module__.rpartition(".")[2] != name:
            why = f"{self.group}: {name} must be a {self.root.__name__} in a module named {name}, not {entry}"
            raise TypeError(why)
        return cast(T, entry)

    def _entry(self, module: ModuleType) -> T:
        classes = self._classes(module)
        if len(classes) != 1:
            raise TypeError(f"{module.__name__} must define exactly one {self.root.__name__}, but has {len(classes)}")
        return cast(T, classes[0])

    def _add_all(self, name: str, module: ModuleType) -> None:
        """Add the entries of a module: its only class, or each class that sets `name`."""
        classes = self._classes(module)
        named = {name: classes[0]} if len(classes) == 1 else {vars(c)["name"]: c for c in classes if "name" in vars(c)}
        if not named or self._loaded.keys() & named.keys():
            raise TypeError(f"{module.__name__} must define a {self.root.__name__} that sets `name`")
        self._loaded.update(cast("dict[str, T]", named))

    def _classes(self, module: ModuleType) -> list[type]:
        return [
            value for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, self.root) and value.__module__ == module.__name__
        ]  # fmt: skip


def _package(point: EntryPoint) -> str:
    """Return the name and version of an entry point's package; the entry point's value if the package is unknown."""
    return point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"


@lru_cache
def _announcements(places: tuple[str, ...]) -> bytes | None:
    """Return the contents of the `entry_points.txt` files of all installed packages, joined.

    Return None if there may be further packages, because an entry of `sys.path` is an archive or cannot be listed, or
    because an import hook finds packages elsewhere.

    `importlib.metadata` is not used here, because it parses the metadata of every package. This takes as long as a
    short adapterkit command.
    """
    if any(hasattr(finder, "find_distributions") and finder is not PathFinder for finder in sys.meta_path):
        return None
    try:
        return b"\n".join(_announced_in(place or ".") for place in places if os.path.exists(place or "."))
    except OSError:
        # An entry of `sys.path` cannot be listed, or is an archive. Only the import system can search an archive.
        return None


def _announced_in(place: str) -> bytes:
    with os.scandir(place) as entries:
        packages = [entry.path for entry in entries if entry.name.endswith((".dist-info", ".egg-info"))]
    return b"\n".join(filter(None, map(_entry_points_of, packages)))


def _entry_points_of(package: str) -> bytes:
    try:
        with open(f"{package}{os.sep}entry_points.txt", "rb", buffering=0) as file:
            return file.readall()
    except (FileNotFoundError, NotADirectoryError):  # The package has no entry points, or is an old .egg-info file.
        return b""
