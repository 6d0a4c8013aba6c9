"""Resident adapters: one budgeted block of device memory, and where in it each slot's lie."""

import threading
from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

from spieldose_kernels.cpu import Array
from spieldose_kernels.delta import Adapter, SparseDelta
from spieldose_kernels.errors import ArenaFull

WORD: Final = 4  # bytes; row starts, columns (int32) and values (float32) are words of one arena


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """Hold an adapter as one contiguous piece, ready to be copied into the arena."""

    words: torch.Tensor  # [n] int32; values are float32 bits
    offsets: Mapping[str, tuple[int, int, int]]  # of row starts, columns, values, by module

    @property
    def nbytes(self) -> int:
        """Return the bytes of arena the adapter takes."""
        return self.words.numel() * WORD


def pack(adapter: Adapter) -> PackedAdapter:
    """Lay all of an adapter's arrays end to end."""
    pieces: list[torch.Tensor] = []
    offsets: dict[str, tuple[int, int, int]] = {}
    position = 0
    for module, delta in adapter.modules.items():
        parts = delta.row_starts, delta.columns.int(), delta.values.float().view(torch.int32)
        starts = []
        for part in parts:
            starts.append(position)
            pieces.append(part)
            position += part.numel()
        offsets[module] = (starts[0], starts[1], starts[2])
    return PackedAdapter(torch.cat(pieces), offsets)


class Arena:
    """Hand out extents of one preallocated block of words, first fit.

    Not thread-safe: one owner allocates and frees.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.words = torch.empty(size, dtype=torch.int32, device=device)
        self._free = [(0, size)]  # (start, length), ascending, never adjacent

    @property
    def free_words(self) -> int:
        """Return the number of words not handed out."""
        return sum(length for _, length in self._free)

    def allocate(self, length: int) -> int:
        """Return the start of a free extent of `length` words. Raises ArenaFull."""
        for i, (start, available) in enumerate(self._free):
            if available >= length:
                rest = (start + length, available - length)
                self._free[i : i + 1] = [rest] if rest[1] else []
                return start
        raise ArenaFull(
            f"expected room for {length * WORD} bytes in one piece, "
            f"got {self.free_words * WORD} of {self.words.numel() * WORD} bytes free"
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

    arena: torch.Tensor  # [n] int32
    table: torch.Tensor  # [A, 3] int64: where a slot's row starts, columns, values begin, or -1
    shape: tuple[int, int]

    @cached_property
    def host_arena(self) -> tuple[Array, Array]:
        """Return the arena as int32 and as float32 arrays; for an arena on the CPU."""
        return self.arena.numpy(), self.arena.view(torch.float32).numpy()

    @cached_property
    def host_table(self) -> Array:
        """Return the table as an array; for a table on the CPU."""
        array: Array = self.table.numpy()
        return array

    def delta(self, slot: int) -> SparseDelta | None:
        """Return a slot's delta as views into the arena, None if it does not touch this layer."""
        row_starts, columns, values = self.table[slot].tolist()
        if row_starts < 0:
            return None
        height, width = self.shape
        starts = self.arena[row_starts : row_starts + height + 1]
        nnz = int(starts[-1])
        return SparseDelta(
            starts,
            self.arena[columns : columns + nnz],
            self.arena[values : values + nnz].view(torch.float32),
            width,
        )


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
        device: torch.device,
    ) -> None:
        self.arena = Arena(budget // WORD, device)
        self._modules = {module: i for i, module in enumerate(shapes)}
        self._shapes = shapes
        self._tables = torch.full((len(shapes), slots, 3), -1, dtype=torch.int64, device=device)
        self._extents: dict[int, tuple[int, int]] = {}
        self._free_slots = list(range(slots))[::-1]
        self._lock = threading.Lock()  # of extents and slots, not held while tensors are copied

    @property
    def modules(self) -> list[str]:
        """Return the names of the layers it covers."""
        return list(self._modules)

    def layer(self, module: str) -> LayerSlab:
        """Return one layer's view; it follows every later `put` and `remove`."""
        return LayerSlab(
            self.arena.words, self._tables[self._modules[module]], self._shapes[module]
        )

    def put(self, packed: PackedAdapter) -> int:
        """Copy an adapter into the arena and return its slot. Raises ArenaFull."""
        length = packed.words.numel()
        with self._lock:
            if not self._free_slots:
                raise ArenaFull(f"expected a free slot, got all {self._tables.shape[1]} in use")
            start = self.arena.allocate(length)
            slot = self._free_slots.pop()
            self._extents[slot] = (start, length)
        self.arena.words[start : start + length].copy_(packed.words)
        rows = torch.full((len(self._modules), 3), -1, dtype=torch.int64)
        for module, offsets in packed.offsets.items():
            rows[self._modules[module]] = start + torch.tensor(offsets)
        self._tables[:, slot] = rows.to(self._tables.device)
        return slot

    def remove(self, slot: int) -> None:
        """Give a slot and its memory back."""
        with self._lock:
            self._tables[:, slot] = -1
            self.arena.free(*self._extents.pop(slot))
            self._free_slots.append(slot)
