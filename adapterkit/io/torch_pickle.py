"""A pickle interpreter for the few opcodes that `torch.save` writes for a state dict. It runs no code from the file.

This module also defines the types of the values that a pickle may contain, and the functions that create these values.

Format: torch/_utils.py (`_rebuild_*`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from operator import mul
from pickletools import opcodes
from typing import TYPE_CHECKING, Any

from ..errors import AdapterkitError, Malformed, Unsupported
from .lazy import BY_TORCH, DTYPES, DType

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Mapping, Sequence

    from .lazy import Shape
    from .strict_json import JsonValue


_DIMENSIONS = 32
"""The largest number of axes of an array in numpy 1."""
_CONVERT = "Convert the file to safetensors with the tool that wrote it, if you trust it"
_DAMAGED = "The file is damaged, cut short or of another type; fetch it again or convert it to safetensors"
ALONE = "Save only the state dict: a dict from names to tensors, with no other entries"


def damaged(why: str, where: str | None = None) -> Malformed:
    """Return a `Malformed` error: the file is not as `torch.save` writes it."""
    return Malformed(why, where=where, cure=_DAMAGED)


def refused(why: str, where: str | None = None) -> Unsupported:
    """Return an `Unsupported` error: the file uses a pickle feature that no state dict needs."""
    return Unsupported(why, where=where, cure=_CONVERT)


def short(text: str) -> str:
    """Shorten and escape a text from a file, so that the text fits on one line of a message."""
    return ascii(text if len(text) <= 120 else text[:117] + "...")


def kind_of(value: object) -> str:
    """Return the name of a value's type, for a message."""
    return {View: "tensor", Storage: "storage", Global: "global"}.get(type(value), type(value).__name__)


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a global in a pickle, in the form `module name`. The global itself is never imported."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A torch storage: a contiguous block of elements in the file, with the key that the container gives it."""

    key: str
    dtype: DType
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def where(self) -> str:
        return f"storage {short(self.key)}"


@dataclass(frozen=True, slots=True)
class View:
    """A strided tensor. Element `[i, j, ...]` is element `offset + i*stride[0] + j*stride[1] + ...` of `storage`."""

    storage: Storage
    dtype: DType
    offset: int
    shape: Shape
    stride: Shape

    @property
    def extent(self) -> int:
        """How many storage elements the tensor spans, from its first to its last element; 0 for an empty tensor."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if all(self.shape) else 0

    @property
    def contiguous(self) -> bool:
        dense = [*accumulate(self.shape[:0:-1], mul, initial=1)][::-1]
        return not all(self.shape) or all(
            n == 1 or s == d for n, s, d in zip(self.shape, self.stride, dense[: len(self.shape)], strict=True)
        )


_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat")
_NAMES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "C64")
STORAGE_TYPES = {
    f"{module} {kind}Storage": DTYPES[name]
    for module in ("torch", "torch.cuda")
    for kind, name in zip(_KINDS, _NAMES, strict=True)
} | {"torch.storage UntypedStorage": DTYPES["U8"], "torch UntypedStorage": DTYPES["U8"]}
_DTYPES = {f"torch {name}": dtype for name, dtype in BY_TORCH.items()}


def counts(value: object) -> bool:
    """Whether a value is a tuple of at most `_DIMENSIONS` integers, each from 0 to 2^63 - 1."""
    return (
        type(value) is tuple and len(value) <= _DIMENSIONS and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    )


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any = None, hooks: object = None, metadata: object = None
) -> View:
    """Return a `View` of the tensor that torch's `_rebuild_tensor` and `_rebuild_tensor_v2` would return."""
    if hooks or metadata:
        raise refused("the tensor has hooks, or is a conjugate or negative view")
    if type(storage) is not Storage or not (counts((offset,)) and counts(shape) and counts(stride)):
        raise damaged(
            "a tensor has no storage, or its offset is not a non-negative integer, or its shape or strides are not "
            f"tuples of at most {_DIMENSIONS} non-negative integers"
        )
    return _inside(View(storage, storage.dtype, offset, shape, stride))


def _tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> View:
    if type(dtype) is not Global or dtype.name not in _DTYPES or type(storage) is not Storage:
        raise damaged("a tensor has no storage or no dtype")
    bare = Storage(storage.key, DTYPES["U8"], storage.nbytes)
    element = _DTYPES[dtype.name]
    return _inside(replace(_tensor(bare, offset, shape, stride, grad, hooks, metadata), dtype=element))


def _inside(view: View) -> View:
    shape, stride, itemsize = list(view.shape), list(view.stride), view.dtype.itemsize
    # Refuse sizes that overflow numpy's 64-bit integers. `n or 1` counts an axis of length 0 as 1, so that the other
    # axes of an empty tensor are limited, too.
    if len(shape) != len(stride) or prod(n or 1 for n in shape) * itemsize >= 1 << 63:
        raise damaged(f"no tensor can have the shape {shape} and the strides {stride}", view.storage.where)
    if view.extent and (view.offset + view.extent) * itemsize > view.storage.nbytes:
        why = (
            f"a tensor with shape {shape}, strides {stride} and offset {view.offset} extends beyond its storage of "
            f"{view.storage.nbytes} bytes"
        )
        raise damaged(why, view.storage.where)
    return view


def _parameter(data: object, _grad: object, hooks: object) -> View:
    if hooks or type(data) is not View:
        raise damaged("a parameter is not a tensor, or has hooks")
    return data


def _ordered() -> dict[str, JsonValue]:
    return {}


def _set(items: object = ()) -> object:
    """Return a list in place of a set, so that values are never hashed.

    Files from DeepSpeed, for example, contain a set of module names.
    """
    if type(items) is list:
        return list(items)
    if items != ():
        raise damaged("the pickle makes a set from a value that is not a list")
    return []


@dataclass(frozen=True, slots=True)
class Opaque:
    """A placeholder for a value that is never used, such as the state of numpy's random number generator."""


def _opaque(*_: object) -> Opaque:
    return Opaque()


CALLS: dict[str, Callable[..., object]] = {
    "__builtin__ set": _set,
    "_codecs encode": _opaque,
    "builtins set": _set,
    "collections OrderedDict": _ordered,
    "numpy dtype": _opaque,
    "numpy._core.multiarray _reconstruct": _opaque,
    "numpy.core.multiarray _reconstruct": _opaque,
    "torch Size": lambda shape: shape,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
}
"""A map from a global's name to the function that the opcode REDUCE calls instead of the global.

All these functions are defined in this module. None of them calls its arguments.
"""
KNOWN = {*CALLS, *STORAGE_TYPES, *_DTYPES, "numpy ndarray"}


# A pickle interpreter for the few opcodes that `torch.save` writes for a state dict. It runs no code from the file.
#
# `pickle.Unpickler` is not used, because its opcodes can hang or kill a process even if every global is refused. A memo
# index of 2**31 allocates gigabytes. A dict key of sixty nested pairs takes 2**60 hashes. A key of a million nested
# tuples overflows the C stack. This interpreter needs time and memory in proportion to the pickle's length. It refuses
# any opcode or global that no state dict needs. Formats: torch/_utils.py (`_rebuild_*`), pickletools (opcodes).


_LENGTH = 1 << 22
"""The largest number of opcodes in a pickle. A tensor takes 30 opcodes."""


class Machine:
    """Run pickles, and collect the storages to which they refer."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.storages: dict[str, Storage] = {}

    def load(self, stream: io.BytesIO) -> object:
        """Run one pickle, from the current position of the stream to the opcode STOP. Return the pickle's value."""
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        position = stream.tell()
        try:
            for _ in range(_LENGTH):
                position = stream.tell()
                if self.step(stream) == "STOP":
                    (value,) = self.stack
                    return value
            raise refused(f"the pickle has more than {_LENGTH} opcodes")
        except AdapterkitError as error:
            error.at(where=f"{self.place} byte {position}")
            raise
        except (IndexError, KeyError, TypeError, ValueError) as error:
            why = f"the pickle is invalid: {short(str(error))}"
            raise damaged(why, f"{self.place} byte {position}") from error

    def step(self, stream: io.BytesIO) -> str:
        """Run one opcode and return its name. The opcode's argument is decoded only if the opcode is allowed."""
        code = stream.read(1)
        if code not in _OPCODES:
            raise ValueError(f"{code!r} is not an opcode" if code else "it ends without a STOP")
        name, reader = _OPCODES[code]
        if name not in _STEPS:
            raise refused(f"the pickle uses opcode {name}, which no state dict needs")
        _STEPS[name](self, reader(stream) if reader else None)
        return name

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self, _: object) -> None:
        if len(self.marks) >= 64:
            raise refused("values are nested more than 64 deep")
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[object]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pops(self, count: int) -> tuple[object, ...]:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise IndexError("the stack has too few values")
        del self.stack[-count:]
        return items

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise damaged(f"the pickle uses a value of type {kind_of(self.stack[-1])} as a {kind.__name__}")
        return self.stack[-1]

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def extend(self, items: Sequence[object]) -> None:
        self.top(list).extend(items)

    def update(self, items: Sequence[object]) -> None:
        # Refuse keys other than strings and small integers. A file could contain millions of large integers with the
        # same hash, or tuples that take long to hash.
        if not all(type(key) is str or (type(key) is int and abs(key) < 1 << 60) for key in items[::2]):
            raise Malformed("a dict key is neither text nor a small integer", cure=ALONE)
        self.top(dict).update(zip(items[::2], items[1::2], strict=True))

    def resolve(self, name: str) -> None:
        if name not in KNOWN:
            raise refused(f"the pickle has the global {short(name.replace(' ', '.', 1))}, which no state dict needs")
        self.push(Global(name))

    def resolve_stack(self, _: object) -> None:
        module, name = self.pops(2)
        if type(module) is not str or type(name) is not str:
            raise damaged("the name of a global is not text")
        self.resolve(f"{module} {name}")

    def reduce(self, _: object) -> None:
        called, args = self.pops(2)
        if type(called) is not Global or called.name not in CALLS or type(args) is not tuple:
            raise damaged("the pickle calls a value that is not an allowed function, or its arguments are not a tuple")
        self.push(CALLS[called.name](*args))

    def build(self, _: object) -> None:
        (state,) = self.pops(1)
        if type(self.stack[-1]) is Opaque:
            return
        self.top(dict)
        if type(state) is not dict or not state.keys() <= {"_metadata"}:
            raise refused("a dict has attributes other than a module's `_metadata`")

    def persistent(self, _: object) -> None:
        (pid,) = self.pops(1)
        match pid if type(pid) is tuple else ():
            # Accept a sixth item, because files from torch before 1.6 have one. This item is for the metadata of a
            # view, but torch 0.4 and later always write None there.
            case ("storage", Global(name=kind), str(key), str(), numel, *view) if (
                kind in STORAGE_TYPES and counts((numel,)) and view in ([], [None])
            ):
                storage = Storage(key, STORAGE_TYPES[kind], numel)
            case _:
                raise damaged("a persistent id does not name a storage")
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise damaged("the pickle gives this storage two different sizes", storage.where)
        self.push(storage)


def _global_name(stream: io.BytesIO) -> str:
    """Read the argument of the opcode GLOBAL, and return it as `module name`.

    The reader in pickletools is not used, because it interprets backslashes, and warns about them.
    """
    module, name = stream.readline(), stream.readline()
    if not name.endswith(b"\n"):
        raise ValueError("the name of a global does not end with a newline")
    return f"{module[:-1].decode()} {name[:-1].decode()}"


_OPCODES: Mapping[bytes, tuple[str, Callable[[io.BytesIO], Any] | None]] = {
    opcode.code.encode("latin-1"): (opcode.name, opcode.arg.reader if opcode.arg else None) for opcode in opcodes
} | {b"c": ("GLOBAL", _global_name)}


def _pushes(make: Callable[[], object]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.push(make())


_PLAIN = ("BINFLOAT", "BININT", "BININT1", "BININT2", "BINUNICODE", "LONG1", "SHORT_BINUNICODE")
_STEPS: dict[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(_PLAIN, Machine.push),
    **dict.fromkeys(("FRAME", "PROTO", "STOP"), lambda _m, _: None),
    "APPEND": lambda m, _: m.extend(m.pops(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "BINGET": Machine.get,
    "BINPERSID": Machine.persistent,
    "BINPUT": Machine.put,
    "BUILD": Machine.build,
    "EMPTY_DICT": _pushes(dict),
    "EMPTY_LIST": _pushes(list),
    "EMPTY_TUPLE": _pushes(tuple),
    "GLOBAL": Machine.resolve,
    "LONG_BINGET": Machine.get,
    "LONG_BINPUT": Machine.put,
    "MARK": Machine.mark,
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "NEWFALSE": _pushes(lambda: False),
    "NEWTRUE": _pushes(lambda: True),
    "NONE": _pushes(lambda: None),
    "REDUCE": Machine.reduce,
    "SETITEM": lambda m, _: m.update(m.pops(2)),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
    "STACK_GLOBAL": Machine.resolve_stack,
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.push(m.pops(1)),
    "TUPLE2": lambda m, _: m.push(m.pops(2)),
    "TUPLE3": lambda m, _: m.push(m.pops(3)),
}
