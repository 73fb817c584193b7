"""Mutations of containers that keep the rest of the file whole, so that a change reaches the code behind the parser."""

from __future__ import annotations

import ast
import bz2
import contextlib
import gzip
import io
import json
import math
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import trees
from trees import Pairs

_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "I8": 1,
    "I16": 2,
}

Tensors = dict[str, tuple[str, list[int], bytes]]
"""Name -> dtype in safetensors' words, shape, bytes."""


def changed_tensors(tensors: Tensors, rng: Random) -> Tensors:
    """Change one tensor so that it still fits its container: its name, shape, dtype or values; or copy or remove it."""
    copy = dict(tensors)
    if not copy:
        return {"x": ("F32", [1], bytes(4))}
    name = rng.choice(sorted(copy))
    dtype, shape, data = copy[name]
    how = rng.randrange(8)
    if how == 0:
        del copy[name]
    elif how == 1:
        copy = {(trees.text(name, rng, list(copy)) if key == name else key): value for key, value in copy.items()}
    elif how == 2:
        copy[trees.text(name, rng, list(copy))] = copy[name]
    elif how == 3:
        copy[name] = copy[rng.choice(sorted(copy))]
    elif how in (4, 5):
        copy[name] = (dtype, *_reshaped(dtype, shape, data, rng))
    elif how == 6:
        other = rng.choice(sorted(_SIZES))
        copy[name] = (other, shape, _filled(data, math.prod(shape) * _SIZES[other]))
    else:
        width = _SIZES.get(dtype, 1)
        pattern = rng.choice((b"\xff", b"\0", b"\x7f\x80", b"\x80\x7f", b"\x7f", b"\x00\x00\x80\x7f", b"\x01")) * width
        copy[name] = (dtype, shape, _filled(pattern, len(data)))
    return copy


def _reshaped(dtype: str, shape: list[int], data: bytes, rng: Random) -> tuple[list[int], bytes]:
    options = [
        shape[::-1], [*shape, 1], [1, *shape], [math.prod(shape)], shape[1:], shape[:-1], [], [0, *shape[1:]],
        [*shape[:-1], 0], [size + 1 for size in shape], [2 * size for size in shape],
        [max(1, size - 1) for size in shape], [2, *shape], [1] * 40, [1] * 70, [*shape, 2, 2], [1 for _ in shape],
        [3, 5, 7],
    ]  # fmt: skip
    new = rng.choice(options)
    return new, _filled(data, math.prod(new) * _SIZES.get(dtype, 1))


def _filled(data: bytes, length: int) -> bytes:
    length = min(length, 1 << 20)
    return (data * (length // max(1, len(data)) + 1))[:length] if data else bytes(length)


# safetensors ---------------------------------------------------------------------------------------


def safetensors(data: bytes, rng: Random) -> bytes:
    """A safetensors file with one change: of its bytes, its header, the records in its metadata, or its tensors."""
    how = rng.random()
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = trees.load(data[8 : 8 + length].decode())
        body = data[8 + length :]
        if how < 0.12 or not isinstance(header, Pairs):
            return trees.raw(data, rng, 0, 8 + length + 8)
        if how < 0.4:
            return _safetensors(trees.mutate(header, rng), body)
        fields = dict(header)
        metadata = fields.pop("__metadata__", None)
        if how < 0.65 and isinstance(metadata, Pairs) and metadata:
            return _safetensors(Pairs([("__metadata__", _metadata(metadata, rng)), *fields.items()]), body)
        tensors = {name: _tensor(dict(entry), body) for name, entry in fields.items()}
        return pack(changed_tensors(tensors, rng), metadata)
    except (ValueError, struct.error, TypeError, KeyError, RecursionError, AttributeError):
        return trees.raw(data, rng)


def _tensor(entry: dict[str, Any], body: bytes) -> tuple[str, list[int], bytes]:
    start, stop = entry["data_offsets"]
    return entry["dtype"], list(entry["shape"]), body[start:stop]


def _metadata(metadata: Pairs, rng: Random) -> Pairs:
    """Values that hold JSON are changed inside: the native format's record and the configs of many tools lie there."""
    at = rng.randrange(len(metadata))
    key, value = metadata[at]
    copy = Pairs(metadata)
    try:
        inner = trees.load(value)
        if rng.random() < 0.9 and isinstance(inner, list):
            copy[at] = (key, trees.dump(trees.mutate(inner, rng)))
            return copy
    except (ValueError, TypeError):
        pass
    return (
        trees.mutate(copy, rng)
        if rng.random() < 0.5
        else Pairs([*copy[:at], (key, trees.text(str(value), rng)), *copy[at + 1 :]])
    )


def _safetensors(header: Any, body: bytes) -> bytes:
    text = trees.dump(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def pack(tensors: Tensors, metadata: Any = None) -> bytes:
    """A safetensors file."""
    header, body = Pairs([("__metadata__", metadata)] if metadata is not None else []), b""
    for name, (dtype, shape, data) in tensors.items():
        offsets = [len(body), len(body) + len(data)]
        header.append((name, Pairs([("dtype", dtype), ("shape", shape), ("data_offsets", offsets)])))
        body += data
    return _safetensors(header, body)


# zip: torch files and npz --------------------------------------------------------------------------


def archive(data: bytes, rng: Random) -> bytes:
    """A zip archive (torch, npz) with one change: of its bytes, its list of members, or one member by its kind."""
    if rng.random() < 0.12:
        return trees.raw(data, rng, *((max(0, len(data) - 400), None) if rng.random() < 0.5 else (0, None)))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = [(info.filename, file.read(info)) for info in file.infolist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError, RuntimeError, struct.error):
        return trees.raw(data, rng)
    names = [name for name, _ in members]
    pickles = [i for i, name in enumerate(names) if name.endswith(".pkl")]
    at = rng.choice(pickles) if pickles and rng.random() < 0.75 else rng.randrange(len(members))
    name, content = members[at]
    how = rng.random()
    if how < 0.75:
        members[at] = (name, _member(name, content, rng))
    elif how < 0.82:
        del members[at]
    elif how < 0.9:
        members[at] = (trees.text(name, rng, names), content)
    else:
        members.append(
            (
                rng.choice(
                    (name, "../x", "/etc/x", "archive/data/0", "archive/.data/serialization_id", "code/__torch__.py")
                ),
                content,
            )
        )
    return _zip(members, zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED)


def _member(name: str, content: bytes, rng: Random) -> bytes:
    if name.endswith(".pkl"):
        return pickled(content, rng)
    return npy(content, rng) if name.endswith(".npy") else trees.raw(content, rng)


def _zip(members: list[tuple[str, bytes]], compression: int) -> bytes:
    import warnings

    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compression) as file:
        warnings.simplefilter("ignore")
        for name, content in members:
            file.writestr(
                zipfile.ZipInfo((name.replace("\0", "") or "x").encode("utf-8", "replace").decode()),
                content,
                compression,
            )
    return out.getvalue()


# pickle --------------------------------------------------------------------------------------------

_GLOBALS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n", b"ctorch\nBFloat16Storage\n", b"ctorch\nfloat16\n", b"cnumpy\nload\n",
    b"c__main__\nX\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n",
    b"ctorch.storage\nUntypedStorage\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"cargparse\nNamespace\n",
)  # fmt: skip
_SNIPPETS = (
    b"N", b"K\x00", b"K\xff", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"(", b"t", b"}", b"]",
    b")", b"R", b"b", b"Q", b"0", b"1", b"2", b"s", b"u", b"e", b"a", b"\x88", b"\x89", b"G\x7f\xf0" + bytes(6),
    b"\x93", b"\x81", b"h\x00", b"q\x00", b"j\xff\xff\xff\xff", b"\x8c\x02os", b"X\x06\x00\x00\x00system",
    b"\x82\x01", b"P0\n", b"i", b"\x95" + b"\xff" * 8, b"B\xff\xff\xff\x7f", b"\x8f", b"\x90", b"\x91", b"\x97",
)  # fmt: skip


def pickled(data: bytes, rng: Random) -> bytes:
    """A pickle with one opcode changed, removed, doubled, moved or inserted; what is after a stop opcode stays."""
    pieces, rest = _opcodes(data)
    if len(pieces) < 3 or rng.random() < 0.08:
        return trees.raw(data, rng)
    at, how = rng.randrange(len(pieces)), rng.randrange(8)
    if how == 0:
        del pieces[at]
    elif how == 1:
        pieces.insert(at, pieces[rng.randrange(len(pieces))])
    elif how == 2:
        pieces.insert(at, rng.choice(_SNIPPETS))
    elif how == 3:
        places = [i for i, piece in enumerate(pieces) if piece[:1] == b"c"] or [at]
        pieces[rng.choice(places)] = rng.choice(_GLOBALS)
    elif how == 4:
        other = rng.randrange(len(pieces))
        pieces[at], pieces[other] = pieces[other], pieces[at]
    else:
        places = [i for i, piece in enumerate(pieces) if piece[:1] in b"KMJXBG\x8a\x8c"] or [at]
        at = rng.choice(places)
        pieces[at] = _argument(pieces[at], pieces, rng)
    return b"".join(pieces) + rest


def _opcodes(data: bytes) -> tuple[list[bytes], bytes]:
    cuts: list[int] = []
    # Where an earlier change broke the stream, the opcodes up to there are still known.
    with contextlib.suppress(Exception):
        cuts.extend(position for _, _, position in pickletools.genops(data) if position is not None)
    return ([data[a:b] for a, b in pairwise(cuts)], data[cuts[-1] :]) if cuts else ([], data)


def _argument(piece: bytes, pieces: list[bytes], rng: Random) -> bytes:
    """The same kind of value: a number or a text, other than it was."""
    if piece[:1] in b"X\x8c":
        names = [other for other in pieces if other[:1] in b"X\x8c"]
        if rng.random() < 0.3:
            return rng.choice(names)
        old = piece[5:].decode("utf-8", "replace") if piece[:1] == b"X" else piece[2:].decode("utf-8", "replace")
        raw = trees.text(old, rng).encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(raw)) + raw
    number = rng.choice((0, 1, 2, 3, 5, 8, 255, 65535, 2**31 - 1, -1, -(2**31), 2**63 - 1, 2**64, 10**30, 10**400))
    if -(2**31) <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw)) + raw


# numpy ---------------------------------------------------------------------------------------------

_DTYPES = (
    "<f4",
    ">f4",
    "<f8",
    "<f2",
    "<i8",
    "|O",
    "<U4",
    "|S3",
    "|V8",
    "<c8",
    "|b1",
    "<M8[s]",
    "f4",
    "x",
    "<f16",
    "<f400",
    [["a", "<f4"]],
)


def npy(data: bytes, rng: Random) -> bytes:
    """A .npy array with one change of its header or its bytes."""
    if data[:6] != b"\x93NUMPY" or rng.random() < 0.2:
        return trees.raw(data, rng, 0, 160)
    wide = data[6] > 1
    start = 12 if wide else 10
    (length,) = struct.unpack_from("<I" if wide else "<H", data, 8)
    text, body = data[start : start + length].decode("latin-1"), data[start + length :]
    try:
        header = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return trees.raw(data, rng, 0, 160)
    how = rng.randrange(7) if isinstance(header, dict) else 6
    if how == 0:
        header["descr"] = rng.choice(_DTYPES)
    elif how == 1:
        header["fortran_order"] = rng.choice((True, 1, None, "yes"))
    elif how in (2, 3):
        sizes = list(header.get("shape") or ())
        header["shape"] = rng.choice(
            (
                (),
                (0,),
                (-1,),
                (1,) * 70,
                (2**63,),
                (2**32, 2**32),
                tuple(sizes[::-1]),
                (*sizes, 1),
                3,
                None,
                (1.5,),
                ("1",),
            )
        )
    elif how == 4:
        header.pop(rng.choice(sorted(header)), None)
    elif how == 5:
        header["x"] = 1
    text = repr(header) if how < 6 else _text_of_header(text, rng)
    raw = text.encode("latin-1", "replace") + b"\n"
    return data[:6] + b"\x02\x00" + struct.pack("<I", len(raw)) + raw + body


def _text_of_header(text: str, rng: Random) -> str:
    return rng.choice((
        text.replace("(", "(0x" + "f" * 4000 + ",", 1), text.replace("(", "(" * 200, 1), "{'a':" * 50,
        text.replace("'", '"', 1), text + "x", "__import__('os').system('id')", text.replace(",", ",,", 1),
        "1" * 5000, trees.text(text, rng),
    ))  # fmt: skip


# tar -----------------------------------------------------------------------------------------------


def tar(data: bytes, rng: Random) -> bytes:
    """A tar archive (NeMo) with one change: of its bytes, its members, or one member by its kind."""
    if rng.random() < 0.15:
        return trees.raw(data, rng, 0, 2048)
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as file:
            members = [(info, (stream := file.extractfile(info)) and stream.read()) for info in file.getmembers()]
    except (tarfile.TarError, OSError, EOFError, ValueError, AttributeError, KeyError):
        return trees.raw(data, rng)
    if not members:
        return trees.raw(data, rng)
    at = rng.randrange(len(members))
    info, content = members[at]
    how = rng.random()
    if how < 0.6 and content:
        members[at] = (info, mutator(info.name, content)(content, rng))
    elif how < 0.7:
        del members[at]
    elif how < 0.8:
        info.name = rng.choice(("../x", "/etc/x", "a/../../x", "./" + info.name, "x" * 300, "", "é")) or "."
    elif how < 0.92:
        info.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE))
        info.linkname = rng.choice(("/etc/passwd", "../x", members[0][0].name))
    else:
        info.pax_headers = {
            rng.choice(("size", "path", "linkpath", "mtime", "GNU.sparse.size", "hdrcharset", "é")): rng.choice(
                trees.TEXTS[:24]
            ).replace("\ud800", "x")
        }
    return _compressed(_tar(members), rng)


def _tar(members: list[Any]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as file:
        for info, content in members:
            body = content or b""
            info.size = len(body) if info.isreg() else 0
            file.addfile(info, io.BytesIO(body) if info.isreg() else None)
    return out.getvalue()


def _compressed(data: bytes, rng: Random) -> bytes:
    how = rng.random()
    return gzip.compress(data, 1, mtime=0) if how < 0.08 else bz2.compress(data) if how < 0.1 else data


# GGUF ----------------------------------------------------------------------------------------------

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def gguf(data: bytes, rng: Random) -> bytes:
    """A GGUF file with one field of its header changed: a count, key, type, value, name, shape or offset."""
    if rng.random() < 0.15:
        return trees.raw(data, rng, 0, 2048)
    try:
        spots = _gguf_spots(data)
    except (struct.error, KeyError, IndexError):
        return trees.raw(data, rng, 0, 2048)
    start, stop, kind = rng.choice(spots)
    if kind == "text":
        raw = trees.text(data[start + 8 : stop].decode("utf-8", "replace"), rng).encode("utf-8", "surrogatepass")
        new = struct.pack("<Q", len(raw)) + raw
    elif kind == "entry":
        new = rng.choice((b"", data[start:stop] * 2))
    else:
        width = stop - start
        old = int.from_bytes(data[start:stop], "little")
        numbers = (
            0,
            1,
            2,
            3,
            4,
            5,
            8,
            9,
            10,
            12,
            13,
            14,
            31,
            32,
            39,
            99,
            2**31,
            2**32 - 1,
            2**40,
            2**63,
            2**64 - 1,
            old + 1,
            old - 1,
            old * 2,
        )
        new = (rng.choice(numbers) & (256**width - 1)).to_bytes(width, "little")
    return data[:start] + new + data[stop:]


def _gguf_spots(data: bytes) -> list[tuple[int, int, str]]:
    """Where fields lie: (start, stop, kind), by the layout of GGUF versions 2 and 3."""
    spots = [(0, 4, "number"), (4, 8, "number"), (8, 16, "number"), (16, 24, "number")]
    tensors, pairs = struct.unpack_from("<QQ", data, 8)
    at = 24

    def take(width: int, kind: str = "number") -> int:
        nonlocal at
        start, at = at, at + width
        if at > len(data):
            raise IndexError("an earlier change made a length or a count too large")
        spots.append((start, at, kind))
        return int.from_bytes(data[start:at], "little")

    def text() -> None:
        (length,) = struct.unpack_from("<Q", data, at)
        take(8 + length, "text")

    def value(kind: int) -> None:
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = take(4), take(8)
            for _ in range(min(count, 50)):
                value(inner)
        else:
            take(struct.calcsize(_SCALARS[kind]))

    for _ in range(min(pairs, 1000)):
        start = at
        text()
        value(take(4))
        spots.append((start, at, "entry"))
    for _ in range(min(tensors, 1000)):
        start = at
        text()
        for _ in range(min(take(4), 8)):
            take(8)
        take(4)
        take(8)
        spots.append((start, at, "entry"))
    return spots


# flatbuffers and others ----------------------------------------------------------------------------


def flatbuffer(data: bytes, rng: Random) -> bytes:
    """An onnxruntime adapter with one 32-bit word changed by a little or a lot: offsets, lengths, sizes and types."""
    if rng.random() < 0.2:
        return trees.raw(data, rng)
    at = rng.randrange(0, max(4, min(len(data), 4096)) // 4) * 4
    old = int.from_bytes(data[at : at + 4], "little")
    numbers = (
        old + 1,
        old - 1,
        old + 4,
        old - 4,
        old + 8,
        old * 2,
        0,
        1,
        2,
        4,
        7,
        10,
        99,
        2**16,
        2**31,
        2**32 - 1,
        len(data),
        len(data) - 4,
        -at,
    )
    return data[:at] + (rng.choice(numbers) & 0xFFFFFFFF).to_bytes(4, "little") + data[at + 4 :]


Mutator = Callable[[bytes, Random], bytes]


def mutator(name: str, data: bytes) -> Mutator:
    """The mutator for a file, by what its first bytes and its name say."""
    if data[:4] == b"GGUF":
        return gguf
    if data[:2] == b"PK":
        return archive
    if data[:6] == b"\x93NUMPY":
        return npy
    if data[4:8] == b"TORT":
        return flatbuffer
    if data[257:262] == b"ustar" or data[:2] == b"\x1f\x8b":
        return tar
    if data[:1] == b"\x80":
        return pickled
    if name.endswith((".yaml", ".yml")):
        return trees.yaml_file
    if name.endswith(".onnx"):
        from graphs import onnx

        return onnx
    if data[8:9] == b"{":
        return safetensors
    if data[:1] in (b"{", b"["):
        return trees.json_file
    return trees.raw


def plain_json(value: Any) -> bytes:
    """JSON as tools write it."""
    return json.dumps(value, indent=2).encode()
