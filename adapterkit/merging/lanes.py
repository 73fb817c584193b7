"""Lanes: blocks on their way from the disk through where they are computed and back, one or several at a time.

In the host's memory a block is computed where it was read. To a device blocks go by staging memory, pinned where the
device is CUDA, on a stream of their own; they are computed on a second and come back on a third, `DEPTH` of them at a
time. It is one code path for every device of torch, whose streams are empty forms on the CPU: there it is tested, byte
by byte against numpy. It has not been run on a card.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from ..io.lazy import DType
from .arrays import Arrays, TorchArrays
from .blocks import Block

DEPTH = 3
"""Blocks in flight: one is on its way there, one is computed, one is on its way back."""

Host = Callable[[Block, memoryview], None]
Compute = Callable[[Block, Any, Any], None]


class Written(Protocol):
    """Where the bytes of blocks go, one behind another."""

    def room(self, nbytes: int) -> memoryview:
        """Memory for the next bytes."""

    def filled(self, nbytes: int) -> None:
        """So many bytes of that memory are those of a block."""


class Lane(Protocol):
    """One worker's way for blocks."""

    def computing(self) -> AbstractContextManager[Any]:
        """A context in which what is loaded and computed is so before any block that follows."""

    def through(
        self, blocks: Sequence[Block], source: DType, target: DType, read: Host, compute: Compute, written: Written
    ) -> None:
        """Takes blocks all the way; returns when the last is written.

        Args:
            blocks: of one tensor.
            source: the dtype of the bytes that are read.
            target: of the bytes that are written.
            read: fills a block's bytes.
            compute: computes a block from flat numbers into flat numbers.
            written: where the bytes of the blocks go, in their order.
        """


def lane_for(arrays: Arrays) -> Lane:
    """The lane of one worker."""
    return DeviceLane(arrays) if isinstance(arrays, TorchArrays) else HostLane(arrays)


class HostLane:
    """A block at a time, from a buffer that is used again for every block to where it is written from."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self._raw = bytearray()

    def computing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def through(
        self, blocks: Sequence[Block], source: DType, target: DType, read: Host, compute: Compute, written: Written
    ) -> None:
        for block in blocks:
            self._raw = _grown(self._raw, block.elements * source.itemsize)
            raw = memoryview(self._raw)[: block.elements * source.itemsize]
            out = written.room(block.elements * target.itemsize)
            read(block, raw)
            compute(block, self.arrays.over(raw, source), self.arrays.over(out, target))
            written.filled(len(out))


def _grown(held: bytearray, nbytes: int) -> bytearray:
    return held if len(held) >= nbytes else bytearray(nbytes)


class DeviceLane:
    """Several blocks at a time, each in a slot of its own; a slot is taken again when its last block is written."""

    def __init__(self, arrays: TorchArrays) -> None:
        self.torch, self.device = arrays.torch, arrays.device
        module = self.torch.get_device_module(self.device)
        self.streams: Any = module if hasattr(module, "Stream") else self.torch.cpu
        # Without streams of its own, a device's copies must be over when they return.
        self.apart = self.streams is not self.torch.cpu
        self.up, self.work, self.down = (self._stream() for _ in range(3))
        self.slots = [_Slot(self) for _ in range(DEPTH)]

    def computing(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.streams.stream(self.work)
        return context

    def through(
        self, blocks: Sequence[Block], source: DType, target: DType, read: Host, compute: Compute, written: Written
    ) -> None:
        for position, block in enumerate(blocks):
            slot = self.slots[position % DEPTH]
            slot.finish(written)
            slot.start(block, source, target, read, compute)
        for position in range(len(blocks), len(blocks) + DEPTH):
            self.slots[position % DEPTH].finish(written)

    def _stream(self) -> Any:
        return self.streams.Stream(device=self.device) if self.apart else self.streams.Stream()


class _Slot:
    """Memory for one block, on the host and on the device, and the events that say how far it is."""

    def __init__(self, lane: DeviceLane) -> None:
        self.lane, self.torch = lane, lane.torch
        self.sent, self.computed, self.fetched = (lane.streams.Event() for _ in range(3))
        empty = self.torch.empty(0, dtype=self.torch.uint8)
        self.given = self.made = self.there = self.result = empty
        self.pending: Block | None = None
        self.nbytes = 0

    def start(self, block: Block, source: DType, target: DType, read: Host, compute: Compute) -> None:
        """Reads a block and has everything else done to it; no waiting, where the device has streams."""
        lane, nbytes, self.nbytes = self.lane, block.elements * source.itemsize, block.elements * target.itemsize
        self._make_room(nbytes, self.nbytes)
        read(block, _bytes(self.given, nbytes))
        with lane.streams.stream(lane.up):
            self.there[:nbytes].copy_(self.given[:nbytes], non_blocking=lane.apart)
            self.sent.record(lane.up)
        with lane.computing():
            lane.work.wait_event(self.sent)
            raw, out = self._over(self.there, nbytes, source), self._over(self.result, self.nbytes, target)
            compute(block, raw, out)
            self.computed.record(lane.work)
        with lane.streams.stream(lane.down):
            lane.down.wait_event(self.computed)
            self.made[: self.nbytes].copy_(self.result[: self.nbytes], non_blocking=lane.apart)
            self.fetched.record(lane.down)
        self.pending = block

    def finish(self, written: Written) -> None:
        """Waits for the slot's block, if there is one, and has it written."""
        if self.pending is not None:
            self.fetched.synchronize()
            written.room(self.nbytes)[:] = _bytes(self.made, self.nbytes)
            written.filled(self.nbytes)
            self.pending = None

    def _make_room(self, given: int, made: int) -> None:
        """Memory belongs to the stream that first writes it: the allocator may hand it out while others work."""
        lane, pinned = self.lane, self.lane.device.type == "cuda"
        if len(self.given) < given:
            self.given = self.torch.empty(given, dtype=self.torch.uint8, pin_memory=pinned)
            with lane.streams.stream(lane.up):
                self.there = self.torch.empty(given, dtype=self.torch.uint8, device=lane.device)
        if len(self.made) < made:
            self.made = self.torch.empty(made, dtype=self.torch.uint8, pin_memory=pinned)
            with lane.computing():
                self.result = self.torch.empty(made, dtype=self.torch.uint8, device=lane.device)

    def _over(self, data: Any, nbytes: int, dtype: DType) -> Any:
        return data[:nbytes].view(getattr(self.torch, dtype.torch))


def _bytes(tensor: Any, nbytes: int) -> memoryview:
    return memoryview(tensor.numpy())[:nbytes]
