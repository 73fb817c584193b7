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
"""Beginnings of the lines that report a loss; see `Format.write`."""

TENSORS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".nemo", ".onnx_adapter"}
"""Endings of files of tensors. Hubs keep a one-file adapter in a folder, beside a card. Not for files of a base."""


FORMULA = "formula"
"""The value of `compat` that reads a file by the paper's formula, if the tool that trained it computed another."""


UNKNOWN = "unknown_fields"
"""In the lineage's step `read`: names of unknown fields that the reader kept."""


@dataclass(frozen=True, slots=True)
class Departure:
    """A place where a tool's forward departs from the paper's formula, so that there are two readings.

    Attributes:
        trained: the formula that the tool's forward computed in training; the default reading.
        formula: the formula that `compat="formula"` reads.
        at_layer: for a departure that depends on the adapted layer: returns an update as the tool computes it there,
            or unchanged. Readers without the base read the formula, and the engines call this later; see `_trained`.
    """

    trained: str
    formula: str
    at_layer: Callable[[Update, LayerFacts], Update] | None = None


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """The facts about a layer that decide which function a tool trained there.

    Attributes:
        shape: the shape of its weight, `[out, in, *k]`.
        padding: how the layer pads its input, for messages; empty for zeros around an undilated kernel, and if
            unknown, as in a file of weights.
    """

    shape: tuple[int, ...]
    padding: str = ""


def derived(compute: Callable[[], T]) -> T:
    """Make a class attribute that is computed when first used: detecting a format needs only `sniff`."""
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
    """A format on disk. Subclass it in a module of its own; the module's name is the format's name.

    Detecting a file imports every format module. So import heavy modules that only reading and writing need inside
    those functions.

    Class attributes:
        url: a page that describes the format.
        description: one line for tables.
        methods: names of the methods that it can express.
        departures: the tool's departures from the paper's formula, by name. The format's entry in
            spec/formats lists the same, each with the test that runs the tool's forward.
        compat: readings that a caller can select instead of the default one, the formula of the tool's forward:
            `"formula"`, and names for facts that a file does not state about itself.
        options: further arguments of `formats.read` that `read` accepts: `alpha`, `rank`, `strict`, `family`.
        experts_orders: layouts of stacked experts that its files do not tell apart; `compat` accepts these names, too.
        models: `image` if it names modules of image, video and audio models only, `language` if it names none of
            these; empty if it takes modules of any name.
        differences: whether it can hold a difference of any weight, so that any method can be written as one.
        identities: whether a difference of weights may become a LoRA of full rank, as the tool itself converts it. All
            other formats refuse that, because the file would be as large as the base.
        profiles: names of consumers that support only a part of the format; `fit` adapts an adapter to one of them.
        dtypes: its element types, if it does not support all; tensors of other types may be rounded to one of these.
        file: the name of its one file, if only a folder is given; empty if the format chooses the name itself.
        owns: names, or patterns of names, of files that belong to an adapter of this format: those in its folder, or
            beside its file of tensors. Replacing an adapter in a folder removes them, even if the new adapter does not
            have them; all other files in the folder stay.
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
        """Return the departures that may concern updates of these methods; all, unless a format knows better."""
        return cls.departures

    def sniff(self, path: Path) -> bool:
        """Whether the headers at `path` are this format's: no false negatives, no data read, no error raised."""
        raise Unrepresentable(f"{type(self).__name__} cannot be detected")

    def sniff_loosely(self, path: Path) -> bool:
        """Whether `path` can be read as this format although other formats may have the same headers.

        Called only if no format's `sniff` recognises the path.
        """
        return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        """Read an adapter, lazily.

        Args:
            path: file or folder.
            compat: a reading other than the default, the formula of the tool's forward: `"formula"` for the paper's, or
                one of `self.compat` that states a fact the file does not.
            base: the base, if the file alone does not tell names or layouts.

        Raises:
            Malformed: the input has something unknown, or breaks the format's rules.
            Unsupported: the input needs a feature that this version does not have.
        """
        raise Unrepresentable(f"{type(self).__name__} cannot be read")

    def outline(self, path: Path) -> Adapter:
        """Read what a file tells without a base: targets, shapes, ranks. Values that need the base raise when loaded.

        `inspect` and `list loaders` call it where `read` asks for a base; a format whose `read` never does has none.

        Raises:
            UsageError: nothing of the adapter is known without the base.
        """
        return self.read(path)

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        """Write an adapter, atomically, and return one line for each thing that was left out or rewritten.

        `formats.write` reads the output back: it must have the same targets and the same function. Two kinds of lines
        report a loss. `left out TARGET: why` is an update that is not in the file. `changed TARGET:METHOD.FIELD why` is
        a field with another value there that does not change the function.

        Args:
            adapter: the adapter to write.
            path: a file or a folder, depending on the format.
            on_loss: what to do with updates that the format cannot express: `refuse`, `fold`, `promote` or `drop`.
            base: the base, if rewriting needs its weights.

        Raises:
            Unrepresentable: the format cannot express it, and `on_loss` does not allow a rewriting.
        """
        raise Unrepresentable(f"{type(self).__name__} cannot be written")

    def fit(
        self, adapter: Adapter, profile: str, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> tuple[Adapter, list[str]]:
        """Rewrite an adapter so that one consumer computes the same function; return one line for each change.

        Args:
            adapter: the adapter that will be written.
            profile: the consumer, one of `profiles`.
            base: the base; it tells in which modules the consumer looks for experts.
            on_loss: `drop` leaves out updates that the consumer cannot run.

        Raises:
            Unrepresentable: the consumer cannot run it.
        """
        raise Unrepresentable(f"{type(self).__name__} has no profile {profile!r}")
