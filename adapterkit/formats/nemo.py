"""Read and write NeMo 1's LoRA: a `.nemo` archive, which is a tar file of `model_config.yaml` and `model_weights.ckpt`.

Both of NeMo's variants can be read and written: `nemo` (one pair for query, key and value) and `canonical` (separate
pairs). The config in the archive has alpha and the numbers of attention heads. If the tensors are split over several
processes, as after parallel training, merge the tensors with NeMo first.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..core.adapter import Adapter, Foreign, Step
from ..errors import WRITE_AGAIN, AdapterkitError, Malformed, Unsupported, first_line, shown, storage_error
from ..io.direct import copy_by_kernel
from ..io.inputs import open_input
from ..io.lazy import DTYPES, Lazy
from ..io.staging import staged
from ..io.torch_file import read_torch_file
from ..naming.heads import Heads, heads_of
from ..naming.tool_names import NEMO
from ._containers import LIMIT, dump_yaml, load_yaml, save
from ._format import Format
from ._kit import Leftovers, in_order, is_finite, leftovers, of_one_alpha, rank_of, whole_number
from .megatron import decode, encode, heads_again, why_not

if TYPE_CHECKING:
    from typing import IO

    from ..io.checkpoint import Checkpoint

FORMAT = "nemo"
CONFIG, TENSORS = "model_config.yaml", "model_weights.ckpt"
PREFIX = "model.decoder.layers."
LARGEST = 8 << 30
"""The size limit, in bytes, of the tensor file in an archive."""
EXPANDED = 64
"""The size limit of the tensor file, as a multiple of the archive's size. It stops decompression bombs."""
MEMBERS = 64
PIECE = 2 << 20
"""The limit, in bytes, for one read from the archive. A member's header usually has only a few hundred bytes."""
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError)


class NemoHints(Leftovers, total=False):
    """The data that the reader keeps for the writer.

    `prefix` is the prefix of the keys. `fused` is true if query, key and value share one pair. `heads` is (number of
    query heads, number of key-value heads, size of a head). `text` is the YAML text of `config`.
    """

    prefix: str
    fused: bool
    heads: tuple[int, int, int]
    alpha: float
    config: dict[str, Any]
    text: str


class Nemo(Format):
    """NeMo 1's LoRA archives."""

    url = "https://github.com/NVIDIA/NeMo/blob/r1.23.0/scripts/nlp_language_modeling/merge_lora_weights/merge.py"
    description = "NeMo 1: a .nemo archive with model_config.yaml and model_weights.ckpt"
    models = "language"
    file = "adapter.nemo"
    methods = frozenset({"lora"})

    def sniff(self, path: Path) -> bool:
        try:
            if not path.is_file():
                return False
            with _archive(path) as (archive, _):
                return any(_name(member) == CONFIG for member in islice(archive, MEMBERS))
        except (OSError, AdapterkitError, *_DAMAGE):
            return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        try:
            text, tensors = _load(path)
            config = load_yaml(text, CONFIG)
            alpha = _check(config)
            heads = _heads(config)
            updates, data = decode(tensors, NEMO, alpha, heads, base)
        except AdapterkitError as error:
            raise error.at(path=path) from None
        if data["fused"]:
            sizes = heads()
            data["heads"] = [sizes.query, sizes.kv, sizes.dim]
        data |= {"alpha": alpha, "config": config, "text": text.decode()}
        return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = leftovers(adapter, FORMAT, NemoHints)
        alpha, pairs, lines = of_one_alpha(
            adapter, why_not(NEMO), format_name="NeMo", on_loss=on_loss, first=hints.get("alpha"), one_rank=True
        )
        heads = heads_again(hints.get("heads"), base, "lora_kqv_adapter")
        tensors, fused = encode(pairs, NEMO, hints.get("prefix", PREFIX), heads, hints.get("fused"))
        rank = rank_of(next(iter(pairs.values())))
        config = _config(hints, base, alpha, rank, fused, [*tensors])
        _save(path, dump_yaml(config, hints.get("text", "")), in_order(tensors, hints))
        return lines


def _name(member: tarfile.TarInfo) -> str:
    return member.name.removeprefix("./")


def _load(path: Path) -> tuple[bytes, dict[str, Lazy]]:
    """Load the config and the tensors. The tensors are read into memory, because the extracted file is deleted."""
    config: bytes | None = None
    tensors: dict[str, Lazy] | None = None
    try:
        with _archive(path) as (archive, plain), tempfile.TemporaryDirectory() as folder:
            for count, member in enumerate(archive):
                name = _name(member)
                if count >= MEMBERS or not (member.isfile() or member.isdir()):
                    raise Malformed(
                        f"the archive has more than {MEMBERS} members, or this member is neither a file nor a folder",
                        where=name,
                        cure=WRITE_AGAIN,
                    )
                if name == CONFIG and member.size <= LIMIT:
                    config = _content(archive, member).read(LIMIT)
                elif name == TENSORS and member.size <= min(LARGEST, EXPANDED * path.stat().st_size):
                    file = Path(folder, TENSORS)
                    with open(file, "wb") as copy:
                        _copy(archive, member, plain, copy)
                    tensors = {key: _detached(tensor) for key, tensor in read_torch_file(file).items()}
                elif "rank_" in name:
                    why = "the tensors are split over ranks"
                    raise Unsupported(why, where=name, cure="Merge the ranks with NeMo first")
    except _DAMAGE as error:
        raise Malformed(
            f"the file is not an archive, or is damaged ({first_line(error)})", path=path, cure=WRITE_AGAIN
        ) from None
    except OSError as error:
        raise storage_error(error, path) from error
    if config is None or tensors is None:
        raise Malformed(
            f"{CONFIG} or {TENSORS} is missing from the archive, or is too large", path=path, cure=WRITE_AGAIN
        )
    return config, tensors


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    if content is None:
        raise Malformed("this member is not a file", where=_name(member), cure=WRITE_AGAIN)
    return content


class _Bounded(io.RawIOBase):
    """The decompressed contents of an archive, with a limit for one read and a limit for the total size.

    The limit for one read bounds memory: `tarfile` reads a whole header in one call, and the file states the header's
    size, which may be arbitrarily large. The limit for the total size bounds time: even the bytes of a skipped member
    must be decompressed.
    """

    def __init__(self, source: IO[bytes], limit: int) -> None:
        self.source, self.limit = source, limit

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self.source.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset > self.limit:
            raise Malformed(f"the decompressed archive is larger than {self.limit:,} bytes", cure=WRITE_AGAIN)
        return int(self.source.seek(offset))

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= PIECE or self.tell() > self.limit:
            raise Malformed(
                f"the archive requires a read of {size:,} bytes at byte {self.tell():,}; adapterkit reads at most "
                f"{PIECE:,} bytes at once, and only the first {self.limit:,} decompressed bytes",
                cure=WRITE_AGAIN,
            )
        return bytes(self.source.read(size))

    def close(self) -> None:
        self.source.close()
        super().close()


@contextmanager
def _archive(path: Path) -> Iterator[tuple[tarfile.TarFile, BinaryIO | None]]:
    """Open a tar archive, which may be compressed in any way that `tarfile` supports.

    Yields:
        (archive, file): the archive, and its open file; `file` is None if the archive is compressed.
    """
    with open_input(path) as file:
        head = file.read(6)
        file.seek(0)
        kind: Any = next((kind for mark, kind in _COMPRESSED.items() if head.startswith(mark)), None)
        limit = EXPANDED * os.fstat(file.fileno()).st_size + LIMIT
        source = file if kind is None else kind(file)
        with _Bounded(source, limit) as bounded, tarfile.open(fileobj=bounded, mode="r:") as archive:
            yield archive, file if kind is None else None


def _copy(archive: tarfile.TarFile, member: tarfile.TarInfo, plain: BinaryIO | None, copy: BinaryIO) -> None:
    """Copy the contents of a member to the open file `copy`.

    If the archive is uncompressed, `plain` is its open file, and the kernel copies the data, three times as fast as a
    loop in Python. A sparse member needs the loop, because its data is not contiguous in the archive.
    """
    done = 0
    if plain is not None and member.sparse is None:
        done = copy_by_kernel(plain, copy, member.offset_data, 0, member.size, lambda _: None)
    content = _content(archive, member)
    content.seek(done)
    copy.seek(done)
    while done < member.size and (block := content.read(min(member.size - done, 1 << 20))):
        copy.write(block)
        done += len(block)


def _detached(tensor: Lazy) -> Lazy:
    data = bytes(tensor.fetch())
    return Lazy(tensor.shape, DTYPES[tensor.dtype.name], lambda: data)


def _check(config: Mapping[str, object]) -> float:
    """Check that the config has no unsupported settings, and return alpha."""
    peft = config.get("peft")
    tuning = peft.get("lora_tuning") if isinstance(peft, dict) else None
    if not isinstance(tuning, dict):
        raise Malformed("the config has no peft.lora_tuning", where=CONFIG, cure="Pass a .nemo file of a LoRA")
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if config.get(name, 1) != 1:
            raise Unsupported(
                f"{name} is {shown(config[name])}, not 1", where=CONFIG, cure="Merge the ranks with NeMo first"
            )
    alpha = is_finite(tuning.get("alpha", tuning.get("adapter_dim")), f"{CONFIG}: peft.lora_tuning.alpha")
    if not alpha:
        raise Malformed("alpha is 0", where=f"{CONFIG}: peft.lora_tuning.alpha", cure="Set the alpha used in training")
    return alpha


def _heads(config: Mapping[str, object]) -> Callable[[], Heads]:
    def heads() -> Heads:
        head_fields = {
            "num_attention_heads": config.get("num_attention_heads"), "hidden_size": config.get("hidden_size"),
            "num_key_value_heads": config.get("num_query_groups"), "head_dim": config.get("kv_channels"),
        }  # fmt: skip
        return heads_of(head_fields, CONFIG)

    return heads


def _config(
    hints: NemoHints, base: Checkpoint | None, alpha: float, rank: int, fused: bool, keys: list[str]
) -> dict[str, object]:
    """Return the config to write: the config that was read, with the given alpha and rank.

    If `fused` is false, the config gets the variant `canonical`. If `fused` is true and the config states a variant,
    the variant becomes `nemo`. If no config was read, the result has only the fields that NeMo needs, with the sizes
    from the base's config.
    """
    read = dict(hints.get("config", {}))
    if not read and base is not None and base.config is not None:
        heads = heads_of(base.config, "config.json")
        read = {
            "hidden_size": base.config.get("hidden_size"), "num_layers": base.config.get("num_hidden_layers"),
            "num_attention_heads": heads.query, "num_query_groups": heads.kv, "kv_channels": heads.dim,
            "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        }  # fmt: skip
    stated = read.get("peft")
    peft: dict[str, Any] = dict(stated) if isinstance(stated, dict) and stated else {"peft_scheme": "lora"}
    fresh = {"target_modules": _target_modules(keys), "adapter_dropout": 0.0}
    stated = peft.get("lora_tuning")
    tuning: dict[str, Any] = dict(stated) if isinstance(stated, dict) and stated else fresh
    tuning |= {"adapter_dim": rank, "alpha": whole_number(alpha)}
    if "variant" in tuning or not fused:
        tuning["variant"] = "nemo" if fused else "canonical"
    return {**read, "peft": {**peft, "lora_tuning": tuning}}


def _target_modules(keys: list[str]) -> list[str]:
    words = {
        "attention_qkv": "kqv_adapter", "attention_dense": "lora_dense_attention_adapter", "mlp_fc1": "hto4h_adapter",
        "mlp_fc2": "lora_4htoh_adapter",
    }  # fmt: skip
    return [name for name, word in words.items() if any(word in key for key in keys)]


def _save(path: Path, text: bytes, tensors: Mapping[str, Lazy]) -> None:
    with staged(path) as part:
        file = part.with_name(".content") / TENSORS
        save(file, tensors)
        with open(part, "wb") as out, tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
            _add(archive, f"./{CONFIG}", io.BytesIO(text), len(text))
            with open(file, "rb") as content:
                _add(archive, f"./{TENSORS}", content, file.stat().st_size)
        file.unlink()
        file.parent.rmdir()


def _add(archive: tarfile.TarFile, name: str, content: IO[bytes], size: int) -> None:
    """Add a member with a fixed owner and time, so that equal contents produce an equal archive."""
    member = tarfile.TarInfo(name)
    member.size = size
    archive.addfile(member, content)
