"""What a format is: a name, what it can express, and three functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from ..errors import Unrepresentable

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint

T = TypeVar("T")

ON_LOSS = ("refuse", "fold", "promote", "drop")

LEFT_OUT, CHANGED = "left out ", "changed "
"""How lines begin that report a loss; see `Format.write`."""

TENSORS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".nemo", ".onnx_adapter"}
"""Endings of files of tensors: hubs keep an adapter of one file in a folder, beside a card. A base's are not meant."""


FORMULA = "formula"
"""The value of `compat` that reads a file by the paper's formula, where the tool that trained it computed another."""


UNKNOWN = "unknown_fields"
"""In the lineage's step `read`: names of the fields that the reader kept without knowing them."""


@dataclass(frozen=True, slots=True)
class Departure:
    """One place where a tool's forward departs from the paper's formula, and so one place with two readings.

    Attributes:
        trained: what the tool's forward computed in training; the default reading.
        formula: what `compat="formula"` reads.
        at_layer: for a departure that only the adapted layer tells: returns an update as the tool computes it there,
            or unchanged. Readers without the base read the formula, and the engines ask again; see `_trained`.
    """

    trained: str
    formula: str
    at_layer: Callable[[Update, LayerFacts], Update] | None = None


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What decides which function a tool trained at a layer.

    Attributes:
        shape: of its weight, `[out, in, *k]`.
        padding: how it pads its input, for messages; empty for zeros around an undilated kernel, and where nothing
            tells, as in a file of weights.
    """

    shape: tuple[int, ...]
    padding: str = ""


def derived(compute: Callable[[], T]) -> T:
    """A class attribute that is worked out when it is first asked for: to detect a format takes only `sniff`."""
    return cast(T, _Derived(compute))


class _Derived(Generic[T]):
    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute

    def __get__(self, instance: Any, owner: type) -> T:
        return self._value

    @cached_property
    def _value(self) -> T:
        return self._compute()


class Format:
    """A dialect on disk. Subclass it in a module of its own; the module's name is the format's name.

    Of a file in whatever format all these modules are imported, to sniff. What only reading and writing take, they
    import there, where it is more than a little.

    Class attributes:
        url: where the dialect is described.
        description: one line for tables.
        methods: names of the methods it can express.
        departures: where the tool's forward departs from the paper's formula, by name. The format's entry in
            spec/formats lists the same, each with the test that runs the tool's forward.
        compat: the readings that can be asked for beside the default one, which is what the tool's forward computed:
            `"formula"`, and names for what a file does not say about itself.
        options: further arguments of `formats.read` that `read` takes by name: `alpha`, `rank`, `strict`, `family`.
        experts_orders: layouts of stacked experts that its files do not tell apart; `compat` takes these names, too.
        differences: whether it holds a difference of any weight, so that laws may be written as that.
        identities: whether a difference of weights may become a LoRA of full rank, as the tool itself converts it. In
            all other formats that is refused: the file would be as large as the base.
        profiles: names of consumers that take only a part of the dialect, for which can be written.
        dtypes: element types that it holds, if it does not hold all: tensors of others may be rounded to one of these.
        file: what its one file is called where only a folder is named; empty where the dialect sees to that itself.
        owns: names, or patterns of names, of the files that an adapter of this format can have in its folder, and of
            those that it has beside its file of tensors. When an adapter in a folder is replaced these go, even if
            the new one does not have them; all other files in the folder stay.
    """

    url: ClassVar[str] = ""
    description: ClassVar[str] = ""
    methods: ClassVar[frozenset[str]] = frozenset()
    departures: ClassVar[Mapping[str, Departure]] = {}
    compat: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[frozenset[str]] = frozenset()
    experts_orders: ClassVar[frozenset[str]] = frozenset()
    differences: ClassVar[bool] = False
    identities: ClassVar[bool] = False
    profiles: ClassVar[frozenset[str]] = frozenset()
    dtypes: ClassVar[frozenset[str]] = frozenset()
    file: ClassVar[str] = ""
    owns: ClassVar[frozenset[str]] = frozenset()

    def sniff(self, path: Path) -> bool:
        """Whether the headers at `path` are this dialect's: no false negatives, no data read, no error raised."""
        raise Unrepresentable(f"{type(self).__name__} cannot be detected")

    def sniff_loosely(self, path: Path) -> bool:
        """Whether `path` can be read as this format although its headers are not the format's alone.

        Asked only where no format's `sniff` recognises the path.
        """
        return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        """Reads an adapter, lazily.

        Args:
            path: file or folder.
            compat: another reading than what the tool's forward computed: `"formula"` for the paper's, or one of
                `self.compat` that says what the file does not.
            base: the base, where the dialect alone does not tell names or layouts.

        Raises:
            Malformed: something in the input is unaccounted for or breaks the dialect's rules.
            Unsupported: it needs what this version does not know.
        """
        raise Unrepresentable(f"{type(self).__name__} cannot be read")

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        """Write an adapter, atomically, and return one line for each thing that was left out or rewritten.

        `formats.write` reads back what was written: it must be the same targets with the same function. Two kinds of
        lines report a loss: `left out TARGET: why` an update that is not in the file, `changed TARGET:METHOD.FIELD why`
        a field of no consequence for the function that has another value there.

        Args:
            adapter: what to write.
            path: file or folder, as the dialect has it.
            on_loss: what to do with what the dialect cannot say: `refuse`, `fold`, `promote` or `drop`.
            base: the base, where rewriting needs its weights.

        Raises:
            Unrepresentable: the dialect cannot say it and `on_loss` does not allow otherwise.
        """
        raise Unrepresentable(f"{type(self).__name__} cannot be written")

    def fit(
        self, adapter: Adapter, profile: str, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> tuple[Adapter, list[str]]:
        """The same function, said so that a consumer of a part of the dialect computes it; one line for each change.

        Args:
            adapter: what is to be written.
            profile: the consumer, one of `profiles`.
            base: the base, which tells where the consumer looks for experts.
            on_loss: `drop` leaves out what the consumer cannot run.

        Raises:
            Unrepresentable: the consumer cannot run it.
        """
        raise Unrepresentable(f"{type(self).__name__} has no profile {profile!r}")
