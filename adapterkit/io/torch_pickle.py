"""A pickle interpreter for the few opcodes that `torch.save` writes for a state dict; it only builds inert values.

`pickle.Unpickler` is not used: its opcodes can hang or kill a process even if every global is refused. A memo index of
2**31 allocates gigabytes, a dict key of sixty nested pairs takes 2**60 hashes, and a key of a million nested tuples
overflows the C stack. This interpreter is linear in the pickle in time and memory, and refuses any opcode or global
that no state dict needs. Formats: torch/_utils.py (`_rebuild_*`), pickletools (opcodes).
"""

from __future__ import annotations

from pickletools import opcodes
from typing import TYPE_CHECKING, Any

from ..errors import AdapterkitError, Malformed
from .torch_values import ALONE, CALLS, KNOWN, STORAGE_TYPES, Global, Storage, counts, damaged, kind_of, refused, short

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Sequence

_LENGTH = 1 << 22
"""Most opcodes in a pickle; a tensor takes 30."""


class Machine:
    """Runs pickles, and collects the storages that they name."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.storages: dict[str, Storage] = {}

    def load(self, stream: io.BytesIO) -> object:
        """Return the value of the pickle that starts here; leaves the stream after its STOP."""
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
            raise refused(f"a pickle of more than {_LENGTH} opcodes")
        except AdapterkitError as error:
            error.at(where=f"{self.place} byte {position}")
            raise
        except (IndexError, KeyError, TypeError, ValueError) as error:
            why = f"the pickle is invalid: {short(str(error))}"
            raise damaged(why, f"{self.place} byte {position}") from error

    def step(self, stream: io.BytesIO) -> str:
        """Run one opcode and return its name. An argument is decoded only after its opcode is known to be harmless."""
        code = stream.read(1)
        if code not in _OPCODES:
            raise ValueError(f"no opcode is {code!r}" if code else "it ends without a STOP")
        name, reader = _OPCODES[code]
        if name not in _STEPS:
            raise refused(f"the pickle uses opcode {name}, which no state dict needs")
        _STEPS[name](self, reader(stream) if reader else None)
        return name

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self, _: object) -> None:
        if len(self.marks) >= 64:
            raise refused("values nested more than 64 deep")
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pops(self, count: int) -> tuple[Any, ...]:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise IndexError("a value too few")
        del self.stack[-count:]
        return items

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise damaged(f"a value of type {kind_of(self.stack[-1])} where the pickle needs a {kind.__name__}")
        return self.stack[-1]

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def extend(self, items: Sequence[Any]) -> None:
        self.top(list).extend(items)

    def update(self, items: Sequence[Any]) -> None:
        # Integers beyond 64 bits can be chosen to collide by the million, and tuples can take forever to hash.
        if not all(type(key) is str or (type(key) is int and abs(key) < 1 << 60) for key in items[::2]):
            raise Malformed("a dict key that is neither text nor a small integer", cure=ALONE)
        self.top(dict).update(zip(items[::2], items[1::2], strict=True))

    def resolve(self, name: str) -> None:
        if name not in KNOWN:
            raise refused(f"the pickle asks for {short(name.replace(' ', '.', 1))}, which no state dict needs")
        self.push(Global(name))

    def resolve_stack(self, _: object) -> None:
        module, name = self.pops(2)
        if type(module) is not str or type(name) is not str:
            raise damaged("a global whose name is not text")
        self.resolve(f"{module} {name}")

    def reduce(self, _: object) -> None:
        called, args = self.pops(2)
        if type(called) is not Global or called.name not in CALLS or type(args) is not tuple:
            raise damaged("a call of something that cannot be called")
        self.push(CALLS[called.name](*args))

    def build(self, _: object) -> None:
        (state,) = self.pops(1)
        self.top(dict)
        if type(state) is not dict or not state.keys() <= {"_metadata"}:
            raise refused("attributes on a dict, other than a module's `_metadata`")

    def persistent(self, _: object) -> None:
        (pid,) = self.pops(1)
        match pid if type(pid) is tuple else ():
            # The legacy container adds the storage's view metadata, which has been None since torch 0.4.
            case ("storage", Global(name=kind), str(key), str(), numel, *view) if (
                kind in STORAGE_TYPES and counts((numel,)) and view in ([], [None])
            ):
                storage = Storage(key, STORAGE_TYPES[kind], numel)
            case _:
                raise damaged("a persistent id that does not name a storage")
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise damaged("one storage with two sizes", storage.where)
        self.push(storage)


def _global_name(stream: io.BytesIO) -> str:
    """Read the argument of GLOBAL, `module name`. pickletools would interpret backslashes in it, and warn."""
    module, name = stream.readline(), stream.readline()
    if not name.endswith(b"\n"):
        raise ValueError("a name without an end")
    return f"{module[:-1].decode()} {name[:-1].decode()}"


_OPCODES: dict[bytes, tuple[str, Callable[[io.BytesIO], Any] | None]] = {
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
