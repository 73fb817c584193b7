"""Find suspicious files: check their names, first bytes, pickles, configs and chat templates.

The scan reads the opcodes of pickles, but never loads a pickle. It reports the functions that a pickle would import.
Pickles are found in plain files, archives, compressed files and NumPy arrays of objects. In configs, the scan looks for
keys that make a loader import code. In chat templates, it looks for web addresses, and for expressions that access
anything but the template's input variables.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickletools
import re
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

from ..errors import AdapterkitError, shown
from ..io.gguf_file import read_gguf
from ..io.inputs import read_input
from ..io.torch_pickle import KNOWN
from .findings import Finding

if TYPE_CHECKING:
    from jinja2 import nodes

MOST = 20
"""The maximum number of findings to report for each of these: the imports in one stream of pickles, the repeated keys
of one JSON file, the addresses in one chat template. A pickle may contain thousands of imports."""

LARGEST = 32 << 20
"""The largest number of bytes to scan for pickles in one file or in one archive entry."""

_LARGEST_SUM = 256 << 20
_DEEPEST = 4
_MOST_ENTRIES = 10_000

CODE = frozenset({
    ".py", ".pyc", ".pyd", ".pyw", ".pyx", ".pyz", ".so", ".dll", ".dylib", ".exe", ".com", ".scr", ".msi", ".sh",
    ".bash", ".bat", ".cmd", ".ps1", ".vbs", ".js", ".mjs", ".cjs", ".node", ".wasm", ".ipynb", ".cu", ".cuh", ".cpp",
    ".cxx", ".cc", ".ptx", ".jar", ".class", ".whl", ".egg", ".lua", ".rb",
})  # fmt: skip
"""Suffixes of code files, which a program may run."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".dat", ".data", ".npy", ".npz")
"""Suffixes of files that programs unpickle. A file with such a suffix is scanned even if it does not begin like a
pickle, because pickles of protocols 0 and 1 cannot be recognised by their first bytes."""

_STORAGE = re.compile(r"(?:.*/)?data/\d+")
"""Matches archive entries in which torch stores the bytes of a tensor. No program unpickles these entries."""

_GLOBAL = re.compile(r"[^\W\d][\w.]* [^\W\d][\w.<>]*")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")
"""First bytes of gzip, bzip2 and xz."""

_ZLIB = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_LZMA = b"\x5d\x00\x00"
"""First bytes of zlib and of lzma without a container, which joblib also reads. Other files may begin with these bytes
by chance, so only files whose suffixes are in `_PICKLED` or `_PACKED` are decompressed."""

_PACKED = (".z", ".zlib", ".lzma", ".lz4")

_ZFILE, _ZFILE_HEADER = b"ZF0x", 21
"""First bytes, and size in bytes, of the header with which joblib before 0.9.3 began zlib data. joblib still reads it.
"""

_LZ4 = b"\x04\x22\x4d\x18"
"""First bytes of lz4, which joblib reads. Python has no module for it."""

_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}

_NUMBERS = re.compile(
    rb"\{'descr': '[<>|][?bBhHiIlLqQuefdgcmMSUV]\d*(?:\[\w+\])?', 'fortran_order': (?:True|False), "
    rb"'shape': \([\d, ]*\), \}\s*"
)
"""Matches the header that NumPy writes for an array without Python objects. Other headers can state the dtype `object`
in many ways, such as `'O8'`, `'\\x4f'` or `'|' 'O'`, so the data after them is scanned."""


_Stream = IO[bytes] | io.BufferedIOBase


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins with `head` looks like a pickle that begins with its protocol.

    Pickles of protocol 2 or later always begin with the protocol.

    The first eight bytes of a safetensors file are the length of its header. They may look like the start of a pickle.
    The function recognises such a file by the next byte, which is the `{` of the header, and returns False.
    """
    if len(head) < 3 or head[0] != 0x80 or head[1] > 5 or head[2] not in _OPCODES:
        return False
    return head[8:9] != b"{" or any(head[4:8])


def _header_size(head: bytes) -> int:
    """Return the number of bytes before the data in a .npy file."""
    wide = 2 if head[6:7] == b"\x01" else 4
    return min(8 + wide + int.from_bytes(head[8 : 8 + wide], "little"), LARGEST)


def _unpacked(head: bytes, stream: _Stream) -> _Stream:
    if head[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=stream)
    if head.startswith(_ZFILE):
        # joblib also skips one space after the header.
        stream.seek(_ZFILE_HEADER + (head[_ZFILE_HEADER : _ZFILE_HEADER + 1] == b" "))
    if head.startswith((*_ZLIB, _ZFILE)):
        return io.BytesIO(_inflated(stream))
    if head.startswith(_LZ4):
        raise ValueError("lz4 cannot be decompressed")
    return bz2.BZ2File(stream) if head[:3] == b"BZh" else lzma.LZMAFile(cast("IO[bytes]", stream))


def _inflated(stream: _Stream) -> bytes:
    """Decompress zlib data, up to more bytes than `part` reads, so that `part` notices when bytes are missing.

    Compressed data may be longer than its content, because it may contain any number of empty blocks. Bytes after the
    first stream are ignored, because no loader unpickles them: for further streams, joblib never ends.
    """
    most, data, unpacker = 2 * LARGEST + 1024, bytearray(), zlib.decompressobj()
    while len(data) < most and not unpacker.eof and (piece := unpacker.unconsumed_tail or stream.read(1 << 20)):
        data += unpacker.decompress(piece, most - len(data))
    return bytes(data)


def _has_objects(data: bytes) -> bool:
    """Whether a .npy file may contain Python objects, which NumPy stores as a pickle after the header."""
    wide = 2 if data[6:7] == b"\x01" else 4
    return _NUMBERS.fullmatch(data[8 + wide : _header_size(data)]) is None


def _unchecked(stream: _Stream, entry: zipfile.ZipInfo) -> _Stream:
    """Open an entry of a zip archive like torch, which ignores the entry's flags, its checksum and its local name."""
    stream.seek(entry.header_offset)
    header = stream.read(30)
    stream.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
    data = stream.read(min(entry.compress_size, LARGEST + 1))
    if entry.compress_type == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, LARGEST + 1)
    return io.BytesIO(data)


def is_tar(head: bytes) -> bool:
    """Whether these are the first bytes of a tar archive."""
    return head[257:262] == b"ustar"


def in_pickles(name: str, file: Path, unread: list[str]) -> Iterator[Finding]:
    """Yield a finding for each global that a file's pickles import. Globals that a state dict needs are ignored.

    Args:
        name: the file's name in findings.
        file: the file.
        unread: a list, to which a line is added for each part that could not be scanned.
    """
    with file.open("rb") as stream:
        yield from _Reader(name, unread).part("", file.name, stream)


_UNREADABLE = (
    zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, RuntimeError,
    NotImplementedError, ValueError,
)  # fmt: skip
"""Errors of Python's modules for archives."""


@dataclass
class _Reader:
    """Scan one file, and the archives in the file. `left` is the number of bytes that may still be read for pickles."""

    name: str
    unread: list[str]
    left: int = field(default=_LARGEST_SUM)

    def part(self, place: str, called: str, stream: _Stream, depth: int = 0) -> Iterator[Finding]:
        """Yield the findings in a file or in an archive entry."""
        head = stream.read(512)
        suffix = PurePosixPath(called).suffix.lower()
        compressed = head.startswith(_COMPRESSED)
        compressed |= suffix in (*_PICKLED, *_PACKED) and head.startswith((*_ZLIB, _LZMA, _ZFILE, _LZ4))
        archive = head[:2] == b"PK" or is_tar(head)
        if not (archive or compressed or is_pickle(head) or head[:6] == b"\x93NUMPY" or suffix in _PICKLED):
            return
        if depth > _DEEPEST:
            self.skip(place, f"it was not scanned, because it is nested in more than {_DEEPEST} archives")
            return
        if self.left <= 0:
            self.skip(place, f"it was not scanned, because the limit of {_LARGEST_SUM:,} bytes per file was reached")
            return
        if (compressed or is_tar(head)) and head[0] in _OPCODES:
            # A pickle can begin with the same bytes as an archive, and an unpickler would run it. So scan the bytes
            # as a pickle first, and then as an archive.
            tail = stream.read(LARGEST)
            yield from self.calls(place, head + tail, len(tail) == LARGEST)
            if depth:
                stream = io.BytesIO(head + tail)
                stream.seek(len(head))
        whole, data, cut = stream, head, False
        if depth == 0 and (archive or compressed):
            stream.seek(0)
        else:
            most = LARGEST
            if head[:6] == b"\x93NUMPY":
                head += stream.read(_header_size(head) - len(head)) if _header_size(head) > len(head) else b""
                most = LARGEST if _has_objects(head) else 0
            data = head + stream.read(most)
            self.left -= len(data)
            cut = bool(stream.read(1))
            whole = io.BytesIO(data)
        try:
            if head[:2] == b"PK":
                yield from self.zip(place, whole, depth)
            elif is_tar(head):
                yield from self.tar(place, whole, depth)
            elif compressed:
                inner = called if suffix in _PICKLED else PurePosixPath(called).stem
                with _unpacked(head, whole) as unpacked:
                    yield from self.part(place, inner, unpacked, depth + 1)
            elif head[:6] == b"\x93NUMPY":
                yield from self.array(place, data, cut)
            else:
                yield from self.calls(place, data, cut)
        except _UNREADABLE as error:
            self.skip(place, f"this archive cannot be read: {error}")

    def skip(self, place: str, why: str) -> None:
        """Add a line to `unread` with the reason why a file or an archive entry was not completely scanned."""
        self.unread.append(f"{self.name}{f' ({place})' if place else ''}: {why}")

    def zip(self, place: str, stream: _Stream, depth: int) -> Iterator[Finding]:
        """Yield the findings in the entries of a zip archive."""
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            if len(entries) > _MOST_ENTRIES:
                self.skip(place, f"only its first {_MOST_ENTRIES:,} of {len(entries):,} entries were scanned")
            for entry in entries[:_MOST_ENTRIES]:
                where = f"{place}/{entry.filename}" if place else entry.filename
                yield from self.entry(where, entry.filename)
                if not entry.is_dir() and not _STORAGE.fullmatch(entry.filename):
                    try:
                        with archive.open(entry) as inside:
                            yield from self.part(where, entry.filename, inside, depth + 1)
                    except _UNREADABLE as error:
                        self.skip(where, f"this entry is damaged, and was scanned without checks: {error}")
                        try:
                            content = _unchecked(stream, entry)
                        except _UNREADABLE as damage:
                            self.skip(where, f"this entry cannot be read: {damage}")
                            continue
                        yield from self.part(where, entry.filename, content, depth + 1)

    def tar(self, place: str, stream: _Stream, depth: int) -> Iterator[Finding]:
        """Yield the findings in the entries of a tar archive."""
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for number, entry in enumerate(archive):
                if number >= _MOST_ENTRIES:
                    self.skip(place, f"only its first {_MOST_ENTRIES:,} entries were scanned")
                    return
                where = f"{place}/{entry.name}" if place else entry.name
                yield from self.entry(where, entry.name)
                if entry.issym() or entry.islnk():
                    yield from self.link(where, entry.linkname)
                inside = archive.extractfile(entry) if entry.isreg() else None
                if inside is not None:
                    # torch.load unpickles the entries with these names, which have no suffix.
                    called = "storages.pkl" if entry.name in ("pickle", "storages", "tensors") else entry.name
                    yield from self.part(where, called, inside, depth + 1)

    def link(self, where: str, target: str) -> Iterator[Finding]:
        """Yield a finding if a link in an archive may point out of the folder into which the archive is unpacked."""
        if target.startswith("/") or ".." in PurePosixPath(target).parts:
            yield Finding("link", self.name, where, f"it points to {shown(target)}")

    def entry(self, where: str, named: str) -> Iterator[Finding]:
        """Yield findings about the name of an archive entry."""
        if named.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", named):
            yield Finding(
                "hidden-file", self.name, where, "its path leads out of the folder into which the archive is unpacked"
            )
        if PurePosixPath(where).suffix.lower() in CODE:
            yield Finding("code-file", self.name, where, "the archive contains a code file")

    def array(self, place: str, data: bytes, cut: bool) -> Iterator[Finding]:
        """Yield the findings in a .npy file. NumPy stores an array of Python objects as a pickle after the header."""
        if _has_objects(data):
            yield from self.calls(place, data[_header_size(data) :], cut)

    def calls(self, place: str, data: bytes, cut: bool) -> Iterator[Finding]:
        """Yield a finding for each global that the pickles in `data` import. `data` is one or more pickles in a row."""
        stream, count, start = io.BytesIO(data), 0, 0
        while (start := stream.tell()) < len(data) and count < MOST:
            marked = is_pickle(data[start : start + 16])
            try:
                for asked, position in _globals(stream):
                    # Data that does not begin like a pickle may be something else. From such data, report only globals
                    # with plausible names, because random bytes rarely contain a plausible name.
                    if asked in KNOWN or not (marked or _GLOBAL.fullmatch(asked)):
                        continue
                    count += 1
                    where = f"{place} byte {position}".strip()
                    # "os system" becomes "os.system". A phrase such as "a registered extension" stays as it is.
                    named = asked.replace(" ", ".") if asked.count(" ") == 1 else asked
                    yield Finding("pickle-call", self.name, where, f"it imports {shown(named)}")
                    if count >= MOST:
                        return
            except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
                # Report the error only if the data begins like a pickle. Otherwise the error is normal, because torch
                # before 1.6 writes tensor data after the pickles.
                if marked:
                    why = f"a pickle of more than {LARGEST:,} bytes" if cut else f"it cannot be parsed: {error}"
                    yield Finding("pickle-call", self.name, f"{place} byte {start}".strip(), shown(why))
                elif cut and stream.tell() >= len(data):
                    self.skip(place, f"only its first {LARGEST:,} bytes were scanned")
                return
        if cut and stream.tell() >= len(data):
            # More pickles may follow the last one.
            self.skip(place, f"only its first {LARGEST:,} bytes were scanned")


def _operations(stream: io.BytesIO) -> Iterator[tuple[pickletools.OpcodeInfo, int | str | None, int]]:
    """Yield each opcode of a pickle with its argument and its position.

    `pickletools.genops` refuses numbers such as `0x1`, and text with bytes outside ASCII, but unpicklers accept both.
    So take the arguments that are lines of text as they are.

    Raises:
        ValueError: the bytes are not a pickle.
    """
    while code := stream.read(1):
        opcode, position = _OPCODES.get(code[0]), stream.tell() - 1
        argument: int | str | None = None
        if opcode is None:
            raise ValueError(f"at position {position}, opcode {code!r} unknown")
        if opcode.arg is not None and opcode.arg.n == pickletools.UP_TO_NEWLINE:
            lines = [stream.readline() for _ in range(2 if opcode.name in ("GLOBAL", "INST") else 1)]
            if not lines[-1].endswith(b"\n"):
                raise ValueError("no newline found when trying to read a line")
            text = " ".join(line[:-1].decode("utf-8", "replace") for line in lines)
            argument = int(text) if opcode.name in ("GET", "PUT") else text[1:-1] if opcode.name == "STRING" else text
        elif opcode.arg is not None:
            argument = opcode.arg.reader(stream)
        yield opcode, argument, position
        if opcode.name == "STOP":
            return
    raise ValueError("the pickle has no end")


def _globals(stream: io.BytesIO) -> Iterator[tuple[str, int]]:
    """Yield (name, byte position) for each global that a pickle imports.

    The name consists of the module, a space, and the global's name in the module: `os system`. If the pickle does not
    contain the name, the function yields a phrase such as `a registered extension` instead.
    """
    memo: dict[int, str | None] = {}
    pushed: list[str | None] = [None, None]
    for opcode, argument, at in _operations(stream):
        kind = opcode.name
        number = argument if isinstance(argument, int) else 0
        if kind in ("GLOBAL", "INST"):
            yield str(argument), at
            pushed.append(None)
        elif kind == "STACK_GLOBAL":
            module, name = pushed[-2:]
            yield ("a name that is computed" if module is None or name is None else f"{module} {name}"), at
            pushed.append(None)
        elif kind in ("EXT1", "EXT2", "EXT4"):
            yield "a registered extension", at
            pushed.append(None)
        elif kind == "MEMOIZE":
            memo[len(memo)] = pushed[-1]
        elif kind in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[number] = pushed[-1]
        elif kind in ("GET", "BINGET", "LONG_BINGET"):
            pushed.append(memo.get(number))
        elif kind not in ("PROTO", "FRAME"):
            # An opcode whose argument is a string pushes the string. The values that other opcodes push are unknown.
            pushed.append(argument if isinstance(argument, str) and opcode.stack_after else None)
        del pushed[:-2]


def appended_archive(file: Path) -> bool:
    """Whether a zip archive with entries is appended to a file. The file itself must not begin with a zip archive."""
    with suppress(OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                return bool(archive.infolist())
    return False


_AUTO = ("auto_map", "custom_pipelines", "trust_remote_code", "model_class_path", "processor_class_path")
_TRUSTED_PARENTS = (
    "__main__.",
    "torch.",
    "transformers.",
    "diffusers.",
    "peft.",
    "adapters.",
    "sentence_transformers.",
)
_ADDRESS = re.compile(r"(?:https?|wss?|ftp)://[^\s'\"<>){}]+")
_COMPUTING = ("join", "format", "replace", "reverse")
"""Jinja filters and string methods with which a template can build a name at run time."""

_BY_ATTRIBUTE = ("map", "selectattr", "rejectattr", "groupby", "sort", "sum", "min", "max", "unique")
"""Jinja filters that read an attribute whose name is an argument of the filter."""

LARGEST_TEXT = 32 << 20


def in_config(name: str, file: Path, unread: list[str]) -> Iterator[Finding]:
    """Yield the findings in a JSON file, or in a `.jinja` file with a chat template.

    Args:
        name: the file's name in findings.
        file: the file.
        unread: a list, to which a line is added if the file cannot be scanned.
    """
    if file.stat().st_size > LARGEST_TEXT:
        unread.append(f"{name}: it was not scanned, because it is larger than {LARGEST_TEXT >> 20} MiB")
        return
    text = read_input(file).decode("utf-8-sig", "replace")
    if file.suffix.lower() == ".jinja":
        yield from _template(name, "", text)
        return
    twice: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        mapping = dict(items)
        if len(mapping) < len(items):
            count = Counter(key for key, _ in items)
            twice.extend(key for key in mapping if count[key] > 1)
        return mapping

    try:
        document = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        unread.append(f"{name}: it is not valid JSON: {error}")
        return
    for key in twice[:MOST]:
        yield Finding(
            "other-content", name, shown(key), "the key occurs more than once, so programs may read different values"
        )
    if file.name == "modules.json" and isinstance(document, list):
        yield from _modules(name, document)
    yield from _config(name, "", document, 0)


def in_gguf(name: str, file: Path) -> Iterator[Finding]:
    """Yield the findings in the chat templates of a GGUF file."""
    for key, value in read_gguf(file, tensors=False).values.items():
        if key.startswith("tokenizer.chat_template") and isinstance(value.value, str):
            yield from _template(name, key, value.value)


def _modules(name: str, document: list[Any]) -> Iterator[Finding]:
    """Yield a finding for each class in `modules.json` that is not from a trusted package.

    sentence-transformers imports the classes that this file names.
    """
    for position, entry in enumerate(document):
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if isinstance(kind, str) and not kind.startswith(_TRUSTED_PARENTS):
            yield Finding("code-in-config", name, f"[{position}].type", f"type: {shown(kind)}")


def _config(name: str, where: str, value: object, depth: int) -> Iterator[Finding]:
    if depth > 20:
        return
    if isinstance(value, Mapping):
        for key, entry in value.items():
            place = f"{where}.{key}" if where else str(key)
            if key in _AUTO and entry not in (None, False, {}, []):
                yield Finding("code-in-config", name, place, f"{key}: {shown(entry)}")
            elif key == "auto_mapping" and isinstance(entry, Mapping):
                parent = entry.get("parent_library")
                if isinstance(parent, str) and not f"{parent}.".startswith(_TRUSTED_PARENTS):
                    # `peft.auto` imports the module that this key names.
                    yield Finding("code-in-config", name, place, f"parent_library: {shown(parent)}")
            elif key == "megatron_core" and isinstance(entry, str) and not f"{entry}.".startswith("megatron."):
                # `peft.tuners.lora.tp_layer` imports the module that this key names.
                yield Finding("code-in-config", name, place, f"{key}: {shown(entry)}")
            elif key == "chat_template":
                yield from _templates(name, place, entry, depth)
            elif key == "template" and isinstance(entry, str):
                yield from _template(name, place, entry)
            else:
                yield from _config(name, place, entry, depth + 1)
    elif isinstance(value, list):
        for position, entry in enumerate(value[:1000]):
            yield from _config(name, f"{where}[{position}]", entry, depth + 1)


def _templates(name: str, where: str, value: object, depth: int) -> Iterator[Finding]:
    """Yield the findings in one template, or in a mapping or list of templates."""
    if isinstance(value, str):
        yield from _template(name, where, value)
    elif isinstance(value, Mapping) and depth <= 20:
        for key, entry in value.items():
            yield from _templates(name, f"{where}.{key}", entry, depth + 1)
    elif isinstance(value, list) and depth <= 20:
        for position, entry in enumerate(value):
            template = entry.get("template") if isinstance(entry, Mapping) else entry
            yield from _templates(name, f"{where}[{position}]", template, depth + 1)


def _template(name: str, where: str, text: str) -> Iterator[Finding]:
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(text)
    except (TemplateSyntaxError, RecursionError):
        # Remove the tags of `generation` blocks and parse again. transformers adds these tags to Jinja's syntax.
        try:
            tree = environment.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text))
        except (TemplateSyntaxError, RecursionError) as error:
            yield Finding("template", name, where, f"it cannot be parsed: {shown(str(error))}")
            return
    for node in tree.find_all(nodes.Getattr):
        if node.attr.startswith("_") or node.attr in ("mro", "gi_frame", "cr_frame", "f_globals"):
            yield Finding("template", name, where, f"it reads the attribute {node.attr}")
    for item in tree.find_all(nodes.Getitem):
        key = item.arg.value if isinstance(item.arg, nodes.Const) else None
        if isinstance(key, str) and key.startswith("__"):
            yield Finding("template", name, where, f"it reads the entry {key}")
        elif _is_computed(item.arg):
            yield Finding("template", name, where, "it reads an entry with a computed name")
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str) and "__" in constant.value:
            yield Finding("template", name, where, f"it contains the text {shown(constant.value)}")
    for reached in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        yield Finding("template", name, where, f"it loads another template ({type(reached).__name__.lower()})")
    for filtered in tree.find_all(nodes.Filter):
        if filtered.name == "attr":
            yield Finding("template", name, where, "it uses the filter `attr`")
        elif filtered.name in _BY_ATTRIBUTE and any(
            _is_computed(each) for each in (*filtered.args, *(pair.value for pair in filtered.kwargs))
        ):
            yield Finding("template", name, where, "it reads an attribute with a computed name")
    for reference in tree.find_all(nodes.Name):
        if reference.name in ("lipsum", "cycler", "joiner", "self", "config", "request"):
            yield Finding("template", name, where, f"it uses the object {reference.name}")
    for address in _ADDRESS.findall(text)[:MOST]:
        yield Finding("template-address", name, where, shown(address))


def _is_computed(node: nodes.Expr) -> bool:
    """Whether a Jinja expression builds a string at run time, for example by concatenation or with a format string."""
    from jinja2 import nodes

    def is_text(part: nodes.Node) -> bool:
        return isinstance(part, nodes.Const) and isinstance(part.value, str)

    match node:
        case nodes.Concat():
            return True
        case nodes.Add() | nodes.Mod() | nodes.Mul():
            return is_text(node.left) or is_text(node.right) or _is_computed(node.left) or _is_computed(node.right)
        case nodes.Filter():
            return node.name in _COMPUTING
        case nodes.Call():
            return isinstance(node.node, nodes.Getattr) and node.node.attr in _COMPUTING
    return False


PLAIN_HIDDEN = frozenset({".gitattributes", ".gitignore", ".cache", ".huggingface", ".adapterkit"})
"""Names of harmless hidden files and folders that hubs, git and adapterkit write."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
_PROGRAMS = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")
_SLASHES = frozenset("\u2044\u2215\u29f8\uff0f")
_BIDI = frozenset("\u200b\u200c\u200d\u2060\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def in_folder(root: Path, files: list[Path], unread: list[str]) -> Iterator[Finding]:
    """Yield the findings in `files`.

    If `root` is a folder, `files` are its files. If `root` is a file, `files` contains only `root`.
    """
    folder = root if root.is_dir() else root.parent
    for file in files:
        name = file.relative_to(folder).as_posix()
        if file.is_symlink() and not _inside(file, folder):
            yield Finding("link", name, "", f"it points to {_target(file)}")
            continue
        yield from _name(name)
        try:
            if not stat.S_ISREG(file.stat().st_mode):
                if not file.is_dir():
                    yield Finding("other-content", name, "", "it is a pipe, a socket or a device")
                continue
            head = _head(file)
            yield from _content(name, head)
            yield from in_pickles(name, file, unread)
            if head[:2] != b"PK" and not is_tar(head) and appended_archive(file):
                yield Finding("other-content", name, "last bytes", "a zip archive is appended to the file")
            if file.suffix.lower() in (".json", ".jinja"):
                yield from in_config(name, file, unread)
            elif head[:4] == b"GGUF":
                yield from in_gguf(name, file)
        except (AdapterkitError, OSError, zipfile.BadZipFile) as error:
            unread.append(f"{name}: {error}")
    yield from _twice(folder, files)


def _target(link: Path) -> str:
    try:
        return shown(os.readlink(link))
    except OSError:  # The link was removed, or its folder cannot be read.
        return "an unknown place"


def _inside(file: Path, folder: Path) -> bool:
    """Whether the target of the link `file` is in `folder`.

    If `folder` is a snapshot in huggingface_hub's cache, the target may also be in the folder `blobs` of the cached
    repository, because the files of a snapshot are links to files in `blobs`.
    """
    try:
        target, top = file.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # The link is a loop.
        return False
    try:
        file.stat()
    except FileNotFoundError:  # The link points nowhere.
        pass
    except OSError:  # The link is a loop; since Python 3.13, resolve() accepts loops.
        return False
    return target.is_relative_to(top) or (
        top.parent.name == "snapshots" and target.is_relative_to(top.parent.parent / "blobs")
    )


def _name(name: str) -> Iterator[Finding]:
    parts = Path(name).parts
    for part in parts:
        if part.startswith(".") and part not in PLAIN_HIDDEN and not part.startswith(".adapterkit"):
            yield Finding("hidden-file", name, "", f"the name {part!r} is hidden")
        strange = confusable(part)
        if strange:
            yield Finding("lookalike-name", name, "", strange)
    suffixes = Path(name).suffixes
    if suffixes and suffixes[-1].lower() in CODE:
        yield Finding("code-file", name, "", f"a {suffixes[-1]} file")
    weights = [suffix for suffix in suffixes[:-1] if suffix.lower() in WEIGHTS]
    if weights and suffixes[-1].lower() not in (*WEIGHTS, ".json", ".lora"):
        yield Finding("hidden-file", name, "", f"it looks like a {weights[-1]} file, but is a {suffixes[-1]} file")
    if re.search(r"\s{3,}|\s$", name):
        yield Finding("hidden-file", name, "", "white space hides the end of the name")


def confusable(text: str) -> str:
    """Return a description of the characters that can make people misread a text; "" if there are none."""
    invisible = sorted({f"U+{ord(c):04X}" for c in text if c in _BIDI or unicodedata.category(c) in ("Cf", "Cc")})
    if invisible:
        return f"invisible characters {', '.join(invisible)} in {shown(text)}"
    scripts = {_script(c) for c in text if c.isalpha()}
    if "LATIN" in scripts and scripts & {"CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE", "FULLWIDTH", "MATHEMATICAL"}:
        others = sorted({f"{c} (U+{ord(c):04X})" for c in text if c.isalpha() and _script(c) != "LATIN"})
        return f"{', '.join(others[:5])} among Latin letters in {shown(text)}"
    alike = sorted({f"{c} (U+{ord(c):04X})" for c in text if _as_ascii(c)})
    return f"{', '.join(alike[:5])} instead of plain characters in {shown(text)}" if alike else ""


def _as_ascii(char: str) -> bool:
    """Whether a non-ASCII character (a letter, space, punctuation mark or symbol) looks like an ASCII character."""
    if char.isascii() or unicodedata.category(char)[0] not in "LPZS" or unicodedata.category(char) == "So":
        return False
    return char in _SLASHES or unicodedata.normalize("NFKC", char).isascii()


def _script(char: str) -> str:
    return unicodedata.name(char, "UNKNOWN").partition(" ")[0]


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(512)


def _content(name: str, head: bytes) -> Iterator[Finding]:
    suffix = Path(name).suffix.lower()
    kind = (
        "a program" if head[:4] in _PROGRAMS or head[:2] == b"MZ"
        else "a script" if head[:2] == b"#!"
        else "a pickle" if is_pickle(head)
        else "a zip archive" if head[:2] == b"PK"
        else "a GGUF file" if head[:4] == b"GGUF"
        else ""
    )  # fmt: skip
    allowed = {
        "a pickle": (".bin", ".pt", ".pth", ".ckpt", ".pkl"), "a GGUF file": (".gguf",),
        "a zip archive": (".bin", ".pt", ".pth", ".ckpt", ".npz", ".zip", ".keras"),
    }  # fmt: skip
    if kind in ("a program", "a script"):
        yield Finding("code-file", name, "first bytes", f"it is {kind}")
    elif kind and suffix in (*WEIGHTS, ".json", ".md", ".txt", ".jinja", ".model") and suffix not in allowed[kind]:
        yield Finding("other-content", name, "first bytes", f"it is {kind}")


def _twice(folder: Path, files: list[Path]) -> Iterator[Finding]:
    """Yield a finding for each pair of weight files with the same stem but different content.

    Two tools that read the same folder may each load a different file of the pair.
    """
    from ..io import safetensors
    from ..io.torch_file import read_torch_file

    by_name = {file.relative_to(folder).as_posix(): file for file in files}
    for name, file in by_name.items():
        if not name.endswith(".safetensors"):
            continue
        for suffix in (".bin", ".pt"):
            other = by_name.get(name.removesuffix(".safetensors") + suffix)
            if other is None:
                continue
            try:
                ours, theirs = safetensors.read(file), read_torch_file(other)
                if ours.keys() != theirs.keys():
                    why = "the two files have different tensors"
                elif any(bytes(ours[k].fetch()) != bytes(theirs[k].fetch()) for k in ours):
                    why = "the two files have different values"
                else:
                    continue
            except AdapterkitError as error:
                why = f"one of the two files cannot be read: {error.why}"
            yield Finding("second-weights", name, other.name, why)
