"""Resident adapters: one budgeted block of device memory, and where in it each slot's lie."""

import threading
from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from spieldose_kernels.delta import index_dtype
from spieldose_kernels.errors import ArenaFull
from spieldose_kernels.sliced import ALIGNMENT, FIELDS, PackedAdapter, SlicedDelta, view


class Arena:
    """Hand out extents of one preallocated block of bytes, first fit.

    Not thread-safe: one owner allocates and frees. Lengths are multiples of ALIGNMENT.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        size -= size % ALIGNMENT
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._free = [(0, size)]  # (start, length), ascending, never adjacent

    @property
    def free_bytes(self) -> int:
        """Return the number of bytes not handed out."""
        return sum(length for _, length in self._free)

    def allocate(self, length: int) -> int:
        """Return the start of a free extent of `length` bytes. Raises ArenaFull."""
        for i, (start, available) in enumerate(self._free):
            if available >= length:
                rest = (start + length, available - length)
                self._free[i : i + 1] = [rest] if rest[1] else []
                return start
        raise ArenaFull(
            f"expected room for {length} bytes in one piece, "
            f"got {self.free_bytes} of {self.memory.numel()} bytes free"
        )

    def free(self, start: int, length: int) -> None:
        """Take back an extent."""
        insort(self._free, (start, length))
        merged: list[tuple[int, int]] = []
        for begin, size in self._free:
            if merged and merged[-1][0] + merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((begin, size))
        self._free = merged


@dataclass(frozen=True)
class LayerSlab:
    """Hold one layer's view of the slab."""

    memory: torch.Tensor  # [n] uint8, the whole arena
    table: torch.Tensor  # [A, FIELDS] int64, contiguous; all 0 where a slot leaves the layer alone
    shape: tuple[int, int]
    dtype: torch.dtype  # of values

    @cached_property
    def addresses(self) -> tuple[int, int]:
        """Return where arena and table lie, for compiled code on the CPU."""
        return self.memory.data_ptr(), self.table.data_ptr()

    @cached_property
    def index_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Return the types that rows and columns are stored in."""
        return index_dtype(self.shape[0]), index_dtype(self.shape[1])

    def delta(self, slot: int) -> SlicedDelta | None:
        """Return a slot's delta as views into the arena, None if it does not touch this layer."""
        record = tuple(self.table[slot].tolist())
        if record[0] == 0:
            return None
        return view(self.memory, record, shape=self.shape, dtype=self.dtype)


class Slab:
    """Hold the resident adapters, by slot.

    A slot is filled before any request uses it and cleared after the last one is gone, so a running
    step never reads what is being written. `put` and `remove` may be called from any thread.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        slots: int,
        budget: int,  # bytes
        dtype: torch.dtype,  # of values: bfloat16 or float32
        device: torch.device,
    ) -> None:
        self.dtype = dtype
        self.arena = Arena(budget, device)
        self._modules = {module: i for i, module in enumerate(shapes)}
        self._shapes = shapes
        # one table a layer, so that a layer's lies in one piece
        self._tables = torch.zeros(len(shapes), slots, FIELDS, dtype=torch.int64, device=device)
        self._extents: dict[int, tuple[int, int]] = {}
        self._free_slots = list(range(slots))[::-1]
        self._lock = threading.Lock()  # of extents and slots, not held while memory is copied
        # copies wait for no step, and no step for them
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which clears the tables

    @property
    def budget(self) -> int:
        """Return the bytes there are for all adapters together."""
        return self.arena.memory.numel()

    @property
    def slots(self) -> int:
        """Return how many adapters there is room for, whatever their size."""
        return self._tables.shape[1]

    @property
    def modules(self) -> list[str]:
        """Return the names of the layers it covers."""
        return list(self._modules)

    def layer(self, module: str) -> LayerSlab:
        """Return one layer's view; it follows every later `put` and `remove`."""
        table = self._tables[self._modules[module]]
        return LayerSlab(self.arena.memory, table, self._shapes[module], self.dtype)

    def put(self, packed: PackedAdapter) -> int:
        """Copy an adapter into the arena and return its slot. Raises ArenaFull.

        Returns when the copy has arrived: a step launched afterwards may play the slot.
        """
        with self._lock:
            if not self._free_slots:
                raise ArenaFull(f"expected a free slot, got all {self._tables.shape[1]} in use")
            start = self.arena.allocate(packed.nbytes)
            slot = self._free_slots.pop()
            self._extents[slot] = (start, packed.nbytes)
        try:
            self._write(slot, start, packed)
        except BaseException:
            self.remove(slot)
            raise
        return slot

    def _write(self, slot: int, start: int, packed: PackedAdapter) -> None:
        table = torch.zeros(len(self._modules), FIELDS, dtype=torch.int64)
        for module, (*counts, starts, rows, columns, values) in packed.records.items():
            offsets = (start + offset for offset in (starts, rows, columns, values))
            table[self._modules[module]] = torch.tensor([*counts, *offsets])
        with torch.cuda.stream(self._stream):  # no effect without one
            target = self.arena.memory[start : start + packed.nbytes]
            target.copy_(packed.memory, non_blocking=True)
            self._tables[:, slot].copy_(table, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()

    def remove(self, slot: int) -> None:
        """Give a slot and its memory back."""
        with self._lock:
            with torch.cuda.stream(self._stream):  # before whatever is put there next
                self._tables[:, slot] = 0
            self.arena.free(*self._extents.pop(slot))
            self._free_slots.append(slot)
