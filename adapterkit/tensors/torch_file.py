"""State dicts in torch's `.bin`, `.pt` and `.pth` files, read without torch and without running anything in them.

Both containers of `torch.save`: the zip archive (torch >= 1.6) and the row of pickles before it. Neither `pickle` nor
torch is used. Pickle opcodes can hang or kill a process even when every global is refused: a memo index of 2**31 is an
allocation of gigabytes, a dict key of sixty nested pairs takes 2**60 hashes, one of a million nested tuples overflows
the C stack. So the few opcodes that `torch.save` writes for a state dict are carried out here, on inert values, in
time and memory linear in the pickle; any other opcode or global is an error.
Formats: torch/serialization.py (`_save`, `_legacy_save`), torch/_utils.py (`_rebuild_*`), pickletools (opcodes).
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import prod
from operator import mul
from pickletools import code2op
from typing import TYPE_CHECKING, Any

from ..errors import AdapterkitError, Corrupt, Malformed, Path, Unsupported, storage_error
from .dtypes import BY_TORCH, DTYPES, DType
from .lazy import Lazy, Shape, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LIMIT = 32 << 20
"""Bytes that a pickle, or the directory of an archive, may take: some 100,000 tensors."""
_OPCODES = 1 << 22
_DIMENSIONS = 32
_EXPANDED = 256 << 20
"""Bytes that all tensors with overlapping elements may take together once they are written out."""
_MAGIC = 0x1950A86A20F9469CFC6C
_CONVERT = "Convert the file to safetensors with the tool that wrote it, if you trust it"
_DAMAGED = "The file is damaged, cut short or not what it claims to be; fetch it again or convert it to safetensors"
_ALONE = "Save the state dict alone: a dict of names to tensors, with no other entries"
_WRAPPERS = ("state_dict", "model")


def is_torch_file(path: Path) -> bool:
    """Whether `path` is a file with the marks of `torch.save`; looks at its first bytes and an archive's directory.

    Raises:
        StorageError: the file cannot be read.
    """
    if not os.path.isfile(path):
        return False
    try:
        with _open(path) as file:
            head = file.read(64)
            return _is_legacy(head) or (head[:2] == b"PK" and bool(_roots(_entries(file))))
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError:
        return False


def read_torch_file(path: Path) -> dict[str, Lazy]:
    """The tensors of a state dict that `torch.save` wrote, by name, in the file's order; no tensor data is read yet.

    A lone `state_dict` or `model` entry around the state dict is taken off, and a module's `_metadata` is dropped: it
    holds versions of code, not weights. Names that share a storage all come back. A tensor that is contiguous has a
    `span`; any other view is gathered by its `fetch`. Files stay closed between fetches.

    Raises:
        Malformed: the file breaks the rules of its container, a view leaves its storage, or an entry is not a tensor.
        Unsupported: the pickle asks for a global or an opcode that no state dict needs, or data is compressed or
            big-endian.
        StorageError: the file cannot be read. A `fetch` raises it too, and `Corrupt` where the file has shrunk.
    """
    try:
        with _open(path) as file:
            head = file.read(64)
            container = _read_zip if head[:2] == b"PK" else _read_legacy if _is_legacy(head) else None
            if container is None:
                raise _damaged("not a file that torch.save writes", "first bytes")
            value, places = container(file, os.fstat(file.fileno()).st_size)
            return _lazies(os.fspath(path), _state_dict(value), places)
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError as error:
        error.at(path)
        raise


class _Capped(io.BufferedReader):
    """A file that refuses to read absurd amounts at once: `zipfile` asks for as much as an archive claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LIMIT:
            raise _damaged(f"a directory or pickle of {size} bytes; at most {_LIMIT} are read", cure=_CONVERT)
        return super().read(size)

    def at(self, offset: int, size: int) -> bytes:
        self.seek(offset)
        data = self.read(size)
        if len(data) != size:
            raise Malformed("the file ends too early", f"byte {offset + len(data)}")
        return data


def _open(path: Path) -> _Capped:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise _damaged("not a regular file", cure="Give the path of the file itself")
    return _Capped(io.FileIO(path))


def _is_legacy(head: bytes) -> bool:
    return head[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in head[:32]


def _damaged(why: str, where: str | None = None) -> Malformed:
    return Malformed(why, where)


def _refused(why: str, where: str | None = None) -> Unsupported:
    return Unsupported(why, where=where, cure=_CONVERT)


def _short(text: str) -> str:
    """Text out of a file, fit for one line of a message."""
    return ascii(text if len(text) <= 120 else text[:117] + "...")


# Containers: the unpickled value, and the offset in the file of each storage's bytes.

_Contents = tuple[object, dict[str, int]]


def _read_zip(file: _Capped, size: int) -> _Contents:
    entries = _entries(file)
    roots = _roots(entries)
    if len(roots) != 1:
        raise _damaged(f"{len(roots)} entries named */data.pkl in the archive, not one", cure=_DAMAGED)
    root = roots[0]
    _check_byteorder(file, entries.get(f"{root}/byteorder"), size)
    info = entries[f"{root}/data.pkl"]
    machine = _Machine(info.filename)
    value = machine.load(io.BytesIO(file.at(_data_offset(file, info, size), info.file_size)))
    return value, {
        key: _storage_offset(file, entries.get(f"{root}/data/{key}"), storage, size)
        for key, storage in machine.storages.items()
    }


def _entries(file: _Capped) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, IndexError, struct.error) as error:
        raise Malformed(f"a broken zip archive: {error}", "directory") from error
    for name in (info.orig_filename for info in infos):
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise _damaged(f"an entry named {_short(name)} leaves the archive", "directory")
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise _damaged("two entries of one name", "directory")
    return entries


def _roots(entries: dict[str, zipfile.ZipInfo]) -> list[str]:
    return [name[: -len("/data.pkl")] for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]


def _check_byteorder(file: _Capped, info: zipfile.ZipInfo | None, size: int) -> None:
    if info is None:
        return
    order = file.at(_data_offset(file, info, size), min(info.file_size, 16))
    if order != b"little":
        raise _refused(f"byte order {_short(order.decode('latin-1'))}", "byteorder")


def _data_offset(file: _Capped, info: zipfile.ZipInfo, size: int) -> int:
    """Where the bytes of an entry start; the local header alone knows how long it is itself."""
    where = _short(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Unsupported(
            "a compressed or encrypted entry; torch stores tensors as they are", where=where, cure=_CONVERT
        )
    if not 0 <= info.header_offset < size:
        raise _damaged("a header outside the file", where)
    signature, name, extra = struct.unpack("<4s22xHH", file.at(info.header_offset, 30))
    offset = int(info.header_offset + 30 + name + extra)
    if signature != b"PK\3\4" or info.compress_size != info.file_size or offset + info.file_size > size:
        raise _damaged("headers that disagree, or data beyond the end of the file", where)
    return offset


def _storage_offset(file: _Capped, info: zipfile.ZipInfo | None, storage: _Storage, size: int) -> int:
    if info is None:
        raise _damaged("no entry holds this storage", storage.where)
    if info.file_size // storage.dtype.itemsize != storage.numel:
        why = f"{storage.numel} elements claimed, {info.file_size} bytes there"
        raise _damaged(why, storage.where)
    return _data_offset(file, info, size)


def _read_legacy(file: _Capped, size: int) -> _Contents:
    stream = io.BytesIO(file.at(0, min(size, _LIMIT)))
    machine = _Machine("pickles")
    magic, version, system, value, keys = (machine.load(stream) for _ in range(5))
    if magic != _MAGIC or version != 1001 or type(system) is not dict:
        raise _damaged("not the header that torch.save writes", "pickles")
    if system.get("little_endian") is not True:
        raise _refused("byte order 'big'", "little_endian")
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise _damaged("the list of storages is not one of distinct keys", "pickles")
    if set(keys) != set(machine.storages):
        raise _damaged("the storages listed are not those used", "pickles")
    return value, _walk(file, [machine.storages[key] for key in keys], stream.tell(), size)


def _walk(file: _Capped, storages: list[_Storage], offset: int, size: int) -> dict[str, int]:
    """Offsets of storages that follow each other, an int64 count of elements before each."""
    places = {}
    for storage in storages:
        count = int.from_bytes(file.at(offset, 8), "little")
        places[storage.key] = offset + 8
        offset += 8 + storage.nbytes
        if count != storage.numel or offset > size:
            why = f"{storage.numel} elements claimed, {count} counted, {size} bytes in the file"
            raise _damaged(why, storage.where)
    if offset != size:
        raise _damaged(f"{size - offset} bytes after the last storage", f"byte {offset}")
    return places


# The pickle machine and the inert values it works on.


@dataclass(frozen=True, slots=True)
class _Global:
    """The name of something in torch, `module name`; a name is all it is."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: DType
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def where(self) -> str:
        return f"storage {_short(self.key)}"


@dataclass(frozen=True, slots=True)
class _View:
    """A strided tensor: element [i, j, ...] is number `offset + i * stride[0] + j * stride[1] + ...` of its storage."""

    storage: _Storage
    dtype: DType
    offset: int
    shape: Shape
    stride: Shape

    @property
    def extent(self) -> int:
        """Elements from the first to the last, both counted."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if all(self.shape) else 0

    @property
    def contiguous(self) -> bool:
        dense = [*accumulate(self.shape[:0:-1], mul, initial=1)][::-1]
        return not all(self.shape) or all(
            n == 1 or s == d for n, s, d in zip(self.shape, self.stride, dense[: len(self.shape)], strict=True)
        )


_KINDS = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat".split()
_STORAGE_TYPES = {
    f"{module} {kind}Storage": DTYPES[name]
    for module in ("torch", "torch.cuda")
    for kind, name in zip(_KINDS, "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL C64".split(), strict=True)
} | {"torch.storage UntypedStorage": DTYPES["U8"], "torch UntypedStorage": DTYPES["U8"]}
_DTYPES = {f"torch {name}": dtype for name, dtype in BY_TORCH.items()}


def _counts(value: object) -> bool:
    return (
        type(value) is tuple and len(value) <= _DIMENSIONS and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    )


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any = None, hooks: Any = None, metadata: Any = None
) -> _View:
    """`_rebuild_tensor` and `_rebuild_tensor_v2`."""
    if hooks or metadata:
        raise _refused("a tensor with hooks, or a conjugate or negative view")
    if type(storage) is not _Storage or not (_counts((offset,)) and _counts(shape) and _counts(stride)):
        raise _damaged(f"a tensor without storage, or with sizes that are not up to {_DIMENSIONS} counts")
    return _inside(_View(storage, storage.dtype, offset, shape, stride))


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> _View:
    if type(dtype) is not _Global or dtype.name not in _DTYPES or type(storage) is not _Storage:
        raise _damaged("a tensor without storage or dtype")
    bare = _Storage(storage.key, DTYPES["U8"], storage.nbytes)
    element = _DTYPES[dtype.name]
    return _inside(replace(_tensor(bare, offset, shape, stride, grad, hooks, metadata), dtype=element))


def _inside(view: _View) -> _View:
    shape, stride, itemsize = list(view.shape), list(view.stride), view.dtype.itemsize
    if len(shape) != len(stride) or prod(n or 1 for n in shape) * itemsize >= 1 << 63:
        raise _damaged(f"no tensor has shape {shape}, strides {stride}", view.storage.where)
    if view.extent and (view.offset + view.extent) * itemsize > view.storage.nbytes:
        why = f"a view of shape {shape}, strides {stride}, offset {view.offset} leaves {view.storage.nbytes} bytes"
        raise _damaged(why, view.storage.where)
    return view


def _parameter(data: Any, _grad: Any, hooks: Any) -> _View:
    if hooks or type(data) is not _View:
        raise _damaged("a parameter that is not a tensor, or has hooks")
    return data


def _ordered() -> dict[str, Any]:
    return {}


_CALLS: dict[str, Callable[..., object]] = {
    "collections OrderedDict": _ordered,
    "torch Size": lambda shape: shape,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
}
"""What REDUCE may call; every one is ours and takes what it is given apart without running any of it."""
_KNOWN = {*_CALLS, *_STORAGE_TYPES, *_DTYPES}


class _Machine:
    """Carries out pickles; remembers the storages that they name."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.storages: dict[str, _Storage] = {}

    def load(self, stream: io.BytesIO) -> object:
        """The value of the pickle that starts here; leaves the stream behind its STOP."""
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        position = stream.tell()
        try:
            for _ in range(_OPCODES):
                position = stream.tell()
                if self.step(stream) == "STOP":
                    (value,) = self.stack
                    return value
            raise _refused(f"a pickle of more than {_OPCODES} opcodes")
        except AdapterkitError as error:
            error.at(where=f"{self.place} byte {position}")
            raise
        except (IndexError, KeyError, TypeError, ValueError) as error:
            why = f"the pickle makes no sense: {_short(str(error))}"
            raise _damaged(why, f"{self.place} byte {position}") from error

    def step(self, stream: io.BytesIO) -> str:
        """Carries out one opcode and names it. An argument is decoded only once its opcode is known to be harmless."""
        opcode = code2op[stream.read(1).decode("latin-1")]
        if opcode.name not in _STEPS:
            raise _refused(f"the pickle uses opcode {opcode.name}, which no state dict needs")
        _STEPS[opcode.name](self, opcode.arg.reader(stream) if opcode.arg else None)
        return opcode.name

    def mark(self, _: object) -> None:
        if len(self.marks) >= 64:
            raise _refused("values nested more than 64 deep")
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pops(self, count: int) -> tuple[Any, ...]:
        return tuple([self.stack.pop() for _ in range(count)][::-1])

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise _damaged(f"a {_kind(self.stack[-1])} where the pickle needs a {kind.__name__}")
        return self.stack[-1]

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def extend(self, items: Sequence[Any]) -> None:
        self.top(list).extend(items)

    def update(self, items: Sequence[Any]) -> None:
        # Integers past 64 bits can be made to collide by the million, tuples to hash for ever.
        if not all(type(key) is str or (type(key) is int and abs(key) < 1 << 60) for key in items[::2]):
            raise Malformed("a dict key that is neither text nor a small integer", cure=_ALONE)
        self.top(dict).update(zip(items[::2], items[1::2], strict=True))

    def resolve(self, name: str) -> None:
        if name not in _KNOWN:
            raise _refused(f"the pickle asks for {_short(name.replace(' ', '.', 1))}, which no state dict needs")
        self.stack.append(_Global(name))

    def resolve_stack(self, _: object) -> None:
        module, name = self.pops(2)
        if type(module) is not str or type(name) is not str:
            raise _damaged("a global whose name is not text")
        self.resolve(f"{module} {name}")

    def reduce(self, _: object) -> None:
        called, args = self.pops(2)
        if type(called) is not _Global or called.name not in _CALLS or type(args) is not tuple:
            raise _damaged("a call of something that cannot be called")
        self.stack.append(_CALLS[called.name](*args))

    def build(self, _: object) -> None:
        (state,) = self.pops(1)
        self.top(dict)
        if type(state) is not dict or not state.keys() <= {"_metadata"}:
            raise _refused("attributes on a dict, other than a module's `_metadata`")

    def persistent(self, _: object) -> None:
        (pid,) = self.pops(1)
        match pid if type(pid) is tuple else ():
            # The legacy container adds a view of the storage, which has been None since torch 0.4.
            case ("storage", _Global(name=kind), str(key), str(), numel, *view) if (
                kind in _STORAGE_TYPES and _counts((numel,)) and view in ([], [None])
            ):
                storage = _Storage(key, _STORAGE_TYPES[kind], numel)
            case _:
                raise _damaged("a persistent id that does not name a storage")
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise _damaged("one storage with two sizes", storage.where)
        self.stack.append(storage)


def _pushes(make: Callable[[], object]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make())


_PLAIN = ("BINFLOAT", "BININT", "BININT1", "BININT2", "BINUNICODE", "INT", "LONG", "LONG1", "SHORT_BINUNICODE")
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_PLAIN, lambda m, arg: m.stack.append(arg)),
    **dict.fromkeys(("FRAME", "PROTO", "STOP"), lambda _m, _: None),
    "APPEND": lambda m, _: m.extend(m.pops(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "BINGET": _Machine.get,
    "BINPERSID": _Machine.persistent,
    "BINPUT": _Machine.put,
    "BUILD": _Machine.build,
    "EMPTY_DICT": _pushes(dict),
    "EMPTY_LIST": _pushes(list),
    "EMPTY_TUPLE": _pushes(tuple),
    "GLOBAL": _Machine.resolve,
    "LONG_BINGET": _Machine.get,
    "LONG_BINPUT": _Machine.put,
    "MARK": _Machine.mark,
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "NEWFALSE": _pushes(lambda: False),
    "NEWTRUE": _pushes(lambda: True),
    "NONE": _pushes(lambda: None),
    "REDUCE": _Machine.reduce,
    "SETITEM": lambda m, _: m.update(m.pops(2)),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
    "STACK_GLOBAL": _Machine.resolve_stack,
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.stack.append(m.pops(1)),
    "TUPLE2": lambda m, _: m.stack.append(m.pops(2)),
    "TUPLE3": lambda m, _: m.stack.append(m.pops(3)),
}


# From views to lazy tensors.


def _state_dict(value: object) -> dict[str, _View]:
    if type(value) is dict and len(value) == 1:
        value = next((value[name] for name in _WRAPPERS if type(value.get(name)) is dict), value)
    if type(value) is not dict:
        raise Malformed(f"the file holds a {_kind(value)}, not a dict of tensors", where="top level", cure=_ALONE)
    for name, view in value.items():
        if type(name) is not str or not name.isprintable():
            raise Malformed("a name that is not printable text", where=f"entry {_short(str(name))}", cure=_ALONE)
        if type(view) is not _View:
            raise Malformed(f"a {_kind(view)}, not a tensor", where=f"entry {_short(name)}", cure=_ALONE)
    return value


def _kind(value: object) -> str:
    return {_View: "tensor", _Storage: "storage", _Global: "global"}.get(type(value), type(value).__name__)


def _lazies(path: str, views: dict[str, _View], places: dict[str, int]) -> dict[str, Lazy]:
    lazies = {name: _lazy(path, view, places[view.storage.key]) for name, view in views.items()}
    expanded = {name: lazies[name].nbytes for name, view in views.items() if prod(view.shape) > view.extent}
    if sum(expanded.values()) > _EXPANDED:
        largest = max(expanded, key=lambda name: expanded[name])
        why = f"tensors whose elements overlap would take {sum(expanded.values())} bytes, more than {_EXPANDED}"
        raise Malformed(
            why, where=f"entry {_short(largest)}", cure="Save them with `.clone()`, or before expanding them"
        )
    return lazies


def _lazy(path: str, view: _View, place: int) -> Lazy:
    itemsize = view.dtype.itemsize
    first = place + (view.offset * itemsize if view.extent else 0)
    span = Span(path, first, view.extent * itemsize)
    if view.contiguous:
        return Lazy(view.shape, view.dtype, partial(_fetch, span), span)
    return Lazy(view.shape, view.dtype, partial(_gather, span, view))


def _fetch(span: Span) -> bytes:
    try:
        with open(span.path, "rb") as file:
            file.seek(span.offset)
            data = file.read(span.nbytes)
    except OSError as error:
        raise storage_error(error, span.path) from error
    if len(data) != span.nbytes:
        why = f"{len(data)} bytes where {span.nbytes} were when the file was opened"
        raise Corrupt(why, path=span.path, where=f"byte {span.offset}", cure="Fetch the file again, then read it anew")
    return data


def _gather(span: Span, view: _View) -> bytes:
    import numpy as np

    data = np.frombuffer(_fetch(span), dtype=view.dtype.numpy)
    steps = tuple(step * view.dtype.itemsize for step in view.stride)
    return np.lib.stride_tricks.as_strided(data, view.shape, steps, writeable=False).tobytes()
