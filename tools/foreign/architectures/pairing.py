"""Which stored tensor holds which part of which live parameter: found by values, so that no tool's rules are trusted.

Every parameter of a tiny model is a random number of its own, so a stored tensor that holds the same numbers is the
same weight: whole, a run of rows, an expert's slice, transposed, or joined from several parameters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of a tensor's `[out, ...]`, of expert `expert` where experts are stacked in it."""

    name: str
    expert: int | None = None
    start: int = 0
    stop: int = 0
    of: int = 0
    transposed: bool = False

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (0, self.of)


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found: dict[str, Tensor] = {}
        for file in Path(folder).glob("*.safetensors"):
            found |= load_file(file)
        return found


def live(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters by their names in the model, a tied one under its first name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def pair(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[tuple[Piece, Piece]]:
    """Pairs of equal pieces of the two sides; each piece is as large as both sides let it be.

    Raises:
        LookupError: a tensor of `ours` has no place in `theirs`; names it.
    """
    index = _Index(theirs)
    for name, tensor in ours.items():
        pieces = list(_pieces(name, tensor, index))
        if not pieces:
            raise LookupError(name)
        yield from pieces


class _Index:
    """Rows of tensors by their bytes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.whole: dict[bytes, tuple[str, bool]] = {}
        self.rows: dict[bytes, tuple[str, int | None, int, int, bool]] = {}
        for name, tensor in tensors.items():
            self.whole.setdefault(_key(tensor), (name, False))
            if tensor.ndim == 2:
                self.whole.setdefault(_key(tensor.T), (name, True))
                self._add(name, tensor, None)
            elif tensor.ndim == 3 and tensor.shape[1] == 1:  # A convolution of each channel alone is no stack.
                self._add(name, tensor[:, 0], None)
            elif tensor.ndim == 3:
                for expert, each in enumerate(tensor):
                    self._add(name, each, expert)
            elif tensor.ndim == 1 and len(tensor) > 1:
                self._add(name, tensor[:, None], None)

    def _add(self, name: str, tensor: Tensor, expert: int | None) -> None:
        for turned, matrix in ((False, tensor), (True, tensor.T)):
            for row, values in enumerate(matrix):
                self.rows.setdefault(_key(values), (name, expert, row, len(matrix), turned))


def _pieces(name: str, tensor: Tensor, index: _Index) -> Iterator[tuple[Piece, Piece]]:
    if found := index.whole.get(_key(tensor)):
        other, turned = found
        size = tensor.shape[0] if tensor.ndim else 1
        yield Piece(name, None, 0, size, size), Piece(other, None, 0, size, size, turned)
        return
    if tensor.ndim == 3 and tensor.shape[1] == 1:
        yield from _runs(name, tensor[:, 0], None, index)
    elif tensor.ndim == 3:
        for expert, each in enumerate(tensor):
            yield from _runs(name, each, expert, index)
    elif tensor.ndim == 2:
        yield from _runs(name, tensor, None, index)
    elif tensor.ndim == 1 and len(tensor) > 1:
        yield from _runs(name, tensor[:, None], None, index)


def _runs(name: str, matrix: Tensor, expert: int | None, index: _Index) -> Iterator[tuple[Piece, Piece]]:
    """Runs of rows that lie one after another on the other side too; transposed where only columns do."""
    for turned, rows in ((False, matrix), (True, matrix.T)):
        found = [index.rows.get(_key(row)) for row in rows]
        if None in found:
            continue
        start = 0
        for at in range(1, len(found) + 1):
            before, here = found[at - 1], found[at] if at < len(found) else None
            assert before is not None
            if here is None or (here[0], here[1]) != (before[0], before[1]) or here[2] != before[2] + 1:
                first = found[start]
                assert first is not None
                yield (
                    Piece(name, expert, start, at, len(found), turned),
                    Piece(first[0], first[1], first[2], before[2] + 1, first[3], first[4]),
                )
                start = at
        return


def _key(tensor: Tensor) -> bytes:
    return bytes(str(tuple(tensor.shape)), "ascii") + tensor.contiguous().numpy().tobytes()


def unmatched(ours: Iterable[str], pairs: Iterable[tuple[Piece, Piece]]) -> set[str]:
    """Names of `ours` that no pair has on its second side."""
    return set(ours) - {other.name for _, other in pairs}
