"""Define a format: its name, what it can express, and three functions: sniff, read and write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar, cast

from ..errors import Unrepresentable

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint

T = TypeVar("T")

ON_LOSS = ("refuse", "fold", "promote", "drop")

LEFT_OUT, CHANGED = "left out ", "changed "
"""The first words of the lines that report a loss; see `Format.write`."""

TENSORS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".nemo", ".onnx_adapter"}
"""Suffixes of adapters' tensor files; in a folder, they distinguish the tensor file from cards and other files."""


FORMULA = "formula"
"""The `compat` value that applies the paper's formula, even if the tool that trained the adapter computed another."""


UNKNOWN = "unknown_fields"
"""The argument of the lineage's `read` step that lists the unknown fields that the reader kept."""


@dataclass(frozen=True, slots=True)
class Departure:
    """A difference between a tool's forward and the paper's formula; `compat` selects one of them.

    Attributes:
        trained: the formula that the tool's forward computed in training; readers apply it by default.
        formula: the paper's formula; `compat="formula"` selects it.
        at_layer: for a difference that depends on the adapted layer, a function that returns the update as the tool
            computes it at this layer. Without the base, readers apply the paper's formula, and the engines call this
            function later; see `_trained`.
    """

    trained: str
    formula: str
    at_layer: Callable[[Update, LayerFacts], Update] | None = None


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """The facts about a layer that determine the function that a tool trained at this layer.

    Attributes:
        shape: the shape of the layer's weight, `[out, in, *k]`.
        padding: a phrase for messages about how the layer pads its input. Empty if the layer pads an undilated kernel
            with zeros, or if the padding is unknown, as in a file of weights.
    """

    shape: tuple[int, ...]
    padding: str = ""


def derived(compute: Callable[[], T]) -> T:
    """Return a class attribute that is computed at first use, so that detecting a format stays fast."""
    return cast(T, _Derived(compute))


class _Derived(Generic[T]):
    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute

    def __get__(self, instance: object, owner: type) -> T:
        return self._value

    @cached_property
    def _value(self) -> T:
        return self._compute()


class Format:
    """A file format of adapters. Each subclass has its own module, with the name of the format.

    Detection imports every format's module. So import heavy modules inside the functions that read and write.

    Class attributes:
        url: a page that describes the format.
        description: a one-line description for tables.
        methods: the names of the methods that the format can express.
        departures: the tool's departures from the paper's formula, by name. The format's entry in spec/formats lists
            the same departures, each with the test that runs the tool's forward.
        compat: the values of `compat` that the format accepts: `"formula"`, and names for facts that a file does not
            state. Without `compat`, an adapter means what the tool's forward computes.
        options: optional arguments of `formats.read` that this format's `read` accepts: `alpha`, `rank`, `strict`,
            `family`.
        experts_orders: names of the layouts of stacked experts that this format's files do not distinguish; `compat`
            also accepts these names.
        models: `image` if the format's names are only for image, video and audio models, `language` if they are only
            for other models; empty if the format accepts any name.
        differences: whether the format can store any change of a weight, and so express any method.
        identities: whether the writer may write a change of a weight as a LoRA of full rank, because the format's tool
            does. All other writers refuse such a LoRA, because the file would be as large as the base.
        profiles: names of consumers that support only a part of the format; `fit` adapts an adapter to one of them.
        dtypes: the format's element types, if it does not support all; tensors with other types may be rounded to one
            of these.
        file: the name of the file that is read or written in a folder; empty if the format chooses the name itself.
        owns: names, or patterns of names, of the files that belong to an adapter of this format, in the adapter's
            folder or next to its tensor file. A new adapter in the folder replaces all of these files, even those that
            it does not write again; all other files in the folder stay.
    """

    url: ClassVar[str] = ""
    description: ClassVar[str] = ""
    methods: ClassVar[frozenset[str]] = frozenset()
    departures: ClassVar[Mapping[str, Departure]] = {}
    compat: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[frozenset[str]] = frozenset()
    experts_orders: ClassVar[frozenset[str]] = frozenset()
    models: ClassVar[str] = ""
    differences: ClassVar[bool] = False
    identities: ClassVar[bool] = False
    profiles: ClassVar[frozenset[str]] = frozenset()
    dtypes: ClassVar[frozenset[str]] = frozenset()
    file: ClassVar[str] = ""
    owns: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def departures_of(cls, methods: Collection[str]) -> Mapping[str, Departure]:
        """Return the departures that may concern updates with these methods; by default, all departures."""
        return cls.departures

    def sniff(self, path: Path) -> bool:
        """Whether the headers at `path` are this format's. Accepts all such files, reads no data, raises no error."""
        raise Unrepresentable(f"{type(self).__name__} cannot be detected")

    def sniff_loosely(self, path: Path) -> bool:
        """Whether `path` can be read as this format although its headers also fit other formats.

        Detection calls this method only if no format's `sniff` recognises the path.
        """
        return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        """Read an adapter, lazily.

        Args:
            path: a file or a folder.
            compat: one of `self.compat`: `"formula"` for the paper's formula, or the name of a variant that the file
                cannot show. None: compute what the training tool's forward pass computes.
            base: the base, if the file alone does not determine names or layouts.

        Raises:
            Malformed: the input has unknown parts, or breaks the format's rules.
            Unsupported: the input needs a feature that this version does not have.
        """
        raise Unrepresentable(f"{type(self).__name__} cannot be read")

    def outline(self, path: Path) -> Adapter:
        """Read the targets, shapes and ranks of an adapter; loading a value that depends on the base raises an error.

        `inspect` and `list loaders` call this method if `read` requires a base. Formats that never require a base
        inherit this method.

        Raises:
            UsageError: without the base, nothing is known about the adapter.
        """
        return self.read(path)

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        """Write an adapter, atomically, and return one line for each update or field that was omitted or rewritten.

        `formats.save` reads the output back, and checks that it has the same targets and computes the same function.
        Two kinds of lines report a loss. `left out TARGET: why` reports an update that is not in the file. `changed
        TARGET:METHOD.FIELD why` reports a field whose value changed without changing the function.

        Args:
            adapter: the adapter to write.
            path: a file or a folder, depending on the format.
            on_loss: how to treat updates that the format cannot express: `refuse`, `fold`, `promote` or `drop`.
            base: the base, if rewriting needs its weights.

        Raises:
            Unrepresentable: the format cannot express the adapter, and `on_loss` does not allow rewriting it.
        """
        raise Unrepresentable(f"{type(self).__name__} cannot be written")

    def fit(
        self, adapter: Adapter, profile: str, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> tuple[Adapter, list[str]]:
        """Rewrite an adapter so that one consumer computes the same function; return one line for each change.

        Args:
            adapter: the adapter that will be written.
            profile: the consumer, one of `profiles`.
            base: the base, which determines the modules in which the consumer looks for experts.
            on_loss: `drop` omits updates that the consumer cannot run.

        Raises:
            Unrepresentable: the consumer cannot run the adapter.
        """
        raise Unrepresentable(f"{type(self).__name__} has no profile {profile!r}")
