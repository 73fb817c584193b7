"""The base class `Format`: a format states what it can express, and defines `sniff`, `read` and `write`."""

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
"""Prefixes of the lines in which `Format.write` reports an omitted update or a changed field."""

TENSORS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".nemo", ".onnx_adapter", ".h5"}
"""Suffixes of adapters' tensor files. All other files in a folder are model cards, configs and the like."""


FORMULA = "formula"
"""The `compat` value that applies the paper's formula, even if the training tool computed another formula."""


UNKNOWN = "unknown_fields"
"""The key in the lineage's `read` step under which a reader lists the fields that the format does not define."""


@dataclass(frozen=True, slots=True)
class Departure:
    """A difference between a tool's forward and the paper's formula; `compat` selects one of the two.

    Attributes:
        trained: a description of the formula that the tool's forward computes. Readers use this formula by default,
            unless `at_layer` is set.
        formula: a description of the paper's formula. Readers use this formula if `compat` is `"formula"`.
        at_layer: a function that rewrites an update so that it computes the tool's formula at a given layer. None if
            the tool's formula is the same at all layers. If `at_layer` is set, readers use the paper's formula, because
            they do not know the layer. Merges and injections know the layer and call `at_layer`; see `_trained`.
    """

    trained: str
    formula: str
    at_layer: Callable[[Update, LayerFacts], Update] | None = None


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """The properties of a layer on which a training tool's forward depends.

    Attributes:
        shape: the shape of the layer's weight, `[out, in, *k]`.
        padding: a phrase that describes how the layer pads its input, for use in messages. It is empty if the layer
            pads with zeros and has no dilation. It is also empty if the padding is unknown; for example, a weights file
            does not store the padding.
    """

    shape: tuple[int, ...]
    padding: str = ""


def derived(compute: Callable[[], T]) -> T:
    """Define a class attribute whose value is computed at its first use, so that detecting a format stays fast."""
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
    """A file format of adapters. Each subclass has its own module, whose name is the format's name.

    Detection imports every format's module. So import heavy modules inside `read` and `write`.

    Class attributes:
        url: a page that describes the format.
        description: a one-line description for tables.
        methods: the names of the methods that the format can express.
        departures: the cases, by name, in which the tool's forward differs from the paper's formula. The format's entry
            in spec/formats lists the same cases, each with the test that runs the tool's forward.
        compat: the values that the format's `read` accepts as its argument `compat`. `"formula"` selects the paper's
            formula. Every other value selects one interpretation of an ambiguous file. Without `compat`, an adapter
            computes the same function as the tool's forward.
        options: the names of the optional arguments that the format's `read` accepts, out of `alpha`, `rank`, `strict`
            and `family`.
        experts_orders: names of layouts of stacked experts. A file of the format does not show which layout it has, so
            the format's `read` also accepts these names as `compat`.
        models: `image` if the format accepts module names only of image, video and audio models; `language` if it
            accepts module names only of other models; empty if it accepts any module name.
        differences: whether the format can store any change of a weight as a full matrix, and so can express any
            method that changes weights.
        identities: whether the writer may write a full weight change as a LoRA of full rank, because the format's tool
            does so. All other writers refuse to write such a LoRA, because the file would be as large as the base.
        profiles: names of programs that support the format only partly; `fit` rewrites an adapter for one of these
            programs.
        dtypes: the element types that the format supports; empty if it supports all. Tensors with other types may be
            rounded to one of these types.
        file: the name of the tensor file in a folder; empty if the format's code chooses the name.
        owns: the names, or name patterns, of the files that belong to an adapter in this format. The files are in the
            adapter's folder or next to its tensor file. When a new adapter is written to the folder, all these files
            are replaced or removed. All other files in the folder stay.
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
        """Return the departures that can affect updates with these methods. The base class returns all departures."""
        return cls.departures

    def sniff(self, path: Path) -> bool:
        """Whether the headers of the file or folder at `path` belong to this format.

        An implementation must accept every file in the format. It must not read tensor data or raise errors.
        """
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
            compat: a value in `self.compat` or `self.experts_orders`. `"formula"` selects the paper's formula; every
                other value selects one interpretation of an ambiguous file. With None, the adapter computes the same
                function as the training tool's forward.
            base: the base, if the file alone does not determine module names or weight layouts.

        Raises:
            Malformed: the input has unknown parts, or violates the format's rules.
            Unsupported: the input needs a feature that this version does not have.
        """
        raise Unrepresentable(f"{type(self).__name__} cannot be read")

    def outline(self, path: Path) -> Adapter:
        """Read the targets, shapes and ranks of an adapter without its base.

        The returned adapter raises an error when the caller loads a value that depends on the base.
        `inspect` and `list loaders` call this method if `read` requires a base. Formats whose `read` never requires a
        base inherit this method.

        Raises:
            UsageError: the targets and shapes are unknown without the base.
        """
        return self.read(path)

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        """Write an adapter, atomically, and return one line for each update or field that was omitted or rewritten.

        `formats.save` reads the output back, and checks that the output has the same targets and computes the same
        function. Two kinds of lines report a loss: `left out TARGET: why` reports an update that is not in the file.
        `changed TARGET:METHOD.FIELD why` reports a field whose value changed, although the update computes the same
        function.

        Args:
            adapter: the adapter to write.
            path: a file or a folder, depending on the format.
            on_loss: how to treat updates that the format cannot express: `refuse`, `fold`, `promote` or `drop`.
            base: the base, if rewriting an update needs the base's weights.

        Raises:
            Unrepresentable: the format cannot express the adapter, and `on_loss` does not allow rewriting it.
        """
        raise Unrepresentable(f"{type(self).__name__} cannot be written")

    def fit(
        self, adapter: Adapter, profile: str, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> tuple[Adapter, list[str]]:
        """Rewrite an adapter for one program, without changing what the adapter computes; return one line per change.

        Args:
            adapter: the adapter that will be written.
            profile: the program that will load the adapter, one of `profiles`.
            base: the base; it shows which modules the program treats as experts.
            on_loss: if this is `drop`, updates that the program cannot run are omitted.

        Raises:
            Unrepresentable: the program cannot run the adapter.
        """
        raise Unrepresentable(f"{type(self).__name__} has no profile {profile!r}")
