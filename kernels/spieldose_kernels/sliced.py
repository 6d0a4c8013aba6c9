"""The device's form of a delta: entries in vectors of 16 lanes, every row's sum in one place.

Rows are sorted by length. A long row owns a slice: its entries lie side by side in the lanes. Short
rows share a slice, one lane each, the k-th entries of all of them side by side. So every load is
one whole vector, every output has one owner, and trained supports, whose rows differ in length by
a factor of a hundred, need little padding. Empty rows are not stored. Padding has value 0 and its
row's own last column, so that it meets no activation the row does not use anyway.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from spieldose_kernels.cpu.bfloat16 import narrow
from spieldose_kernels.cpu.team import compiled
from spieldose_kernels.cpu.vector import LANES
from spieldose_kernels.delta import Adapter, index_dtype

ALIGNMENT: Final = 64  # bytes; of every array in the arena

# What a layer's table says of a slot, int64 each: the number of slices (0: it does not touch the
# layer), how many of them hold one long row, the number of rows stored, and where in the arena, in
# bytes, lie the slices' starts, the rows, the columns and the values.
FIELDS: Final = 7
Record = tuple[int, ...]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class SlicedDelta:
    """Hold one layer's delta sliced, as views into a larger piece of memory."""

    wide: int  # slices that hold one long row each; they come first
    starts: torch.Tensor  # [S + 1] int32, in vectors
    rows: torch.Tensor  # [n] uint16 or int32, in the order of their slices and lanes
    columns: torch.Tensor  # [V, 16] uint16 or int32
    values: torch.Tensor  # [V, 16] bfloat16 or float32

    def entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return row, column (int64) and value of every entry, [E] each, with the padding."""
        lengths = self.starts.long().diff()
        slices = torch.arange(lengths.numel(), device=lengths.device)
        places = torch.where(
            slices < self.wide, slices, self.wide + (slices - self.wide) * LANES
        ).repeat_interleave(lengths)[:, None]
        lanes = torch.arange(LANES, device=lengths.device)
        places = places + torch.where(places < self.wide, 0, lanes)
        stored = places < self.rows.numel()
        rows = self.rows.long()[places.clamp(max=self.rows.numel() - 1)]
        return rows[stored], self.columns.long()[stored], self.values[stored]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """Hold an adapter in the device's form, in one piece that is copied as it is."""

    memory: torch.Tensor  # [n] uint8, pinned where there is a GPU to copy it to
    records: Mapping[str, Record]  # by module, offsets from the piece's start

    @property
    def nbytes(self) -> int:
        """Return the bytes of arena the adapter takes."""
        return self.memory.numel()


def pack(adapter: Adapter, dtype: torch.dtype) -> PackedAdapter:
    """Slice all of an adapter's deltas; values as float32, or as bfloat16 rounded to even."""
    plans = {module: plan(delta.row_starts.numpy()) for module, delta in adapter.modules.items()}
    records, size = {}, 0
    for module, delta in adapter.modules.items():
        records[module], size = _place(plans[module], delta.shape, dtype, size)
    memory = torch.zeros(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    for module, delta in adapter.modules.items():
        rows, wide, starts = plans[module]
        at = records[module][3]
        memory[at : at + starts.nbytes] = torch.from_numpy(starts.view(np.uint8))
        sliced = view(memory, records[module], shape=delta.shape, dtype=dtype)
        values = sliced.values.view(torch.uint16 if dtype == torch.bfloat16 else dtype)
        source = delta.row_starts.numpy(), delta.columns.numpy(), delta.values.float().numpy()
        target = sliced.rows.numpy(), sliced.columns.numpy(), values.numpy()
        fill(*source, rows, wide, starts, *target)
    return PackedAdapter(memory, records)


def view(
    memory: torch.Tensor, record: Record, *, shape: tuple[int, int], dtype: torch.dtype
) -> SlicedDelta:
    """Return the delta a record names in a piece of memory, [n] uint8."""
    slices, wide, stored, *offsets = record
    row_dtype, column_dtype = map(index_dtype, shape)

    def array(offset: int, count: int, kind: torch.dtype) -> torch.Tensor:
        return memory[offset : offset + count * kind.itemsize].view(kind)

    starts = array(offsets[0], slices + 1, torch.int32)
    entries = int(starts[-1]) * LANES
    return SlicedDelta(
        wide,
        starts,
        array(offsets[1], stored, row_dtype),
        array(offsets[2], entries, column_dtype).view(-1, LANES),
        array(offsets[3], entries, dtype).view(-1, LANES),
    )


def _place(
    planned: tuple[Array, int, Array], shape: tuple[int, int], dtype: torch.dtype, size: int
) -> tuple[Record, int]:
    """Return a delta's record and the end of the memory it takes, from `size` on."""
    rows, wide, starts = planned
    row_dtype, column_dtype = map(index_dtype, shape)
    entries = int(starts[-1]) * LANES
    offsets = []
    for nbytes in (
        starts.nbytes,
        rows.size * row_dtype.itemsize,
        entries * column_dtype.itemsize,
        entries * dtype.itemsize,
    ):
        offsets.append(size)
        size += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return (starts.size - 1, wide, rows.size, *offsets), size


@compiled
def plan(row_starts):
    """Return the stored rows by falling length, how many own a slice, and the slices' starts.

    The number of rows that own a slice is the one that needs the fewest vectors.
    """
    lengths = np.diff(row_starts)
    rows = np.argsort(-lengths, kind="mergesort").astype(np.int32)
    rows = rows[: np.count_nonzero(lengths)]
    shared = np.zeros(rows.size + LANES, np.int64)  # vectors of rows i and after, if they share
    for i in range(rows.size - 1, -1, -1):
        shared[i] = lengths[rows[i]] + shared[i + LANES]
    wide, owned, best = 0, 0, shared[0]
    for i in range(rows.size):
        owned += -(-lengths[rows[i]] // LANES)
        if owned + shared[i + 1] < best:
            wide, best = i + 1, owned + shared[i + 1]
    slices = wide + -(-(rows.size - wide) // LANES)
    starts = np.zeros(slices + 1, np.int32)
    for s in range(slices):
        longest = lengths[rows[s if s < wide else wide + (s - wide) * LANES]]
        starts[s + 1] = starts[s] + (-(-longest // LANES) if s < wide else longest)
    return rows, wide, starts


@compiled
def fill(row_starts, columns, values, rows, wide, starts, out_rows, out_columns, out_values):
    """Write the slices that `plan` chose."""
    out_rows[:] = rows
    flat_columns, flat_values = out_columns.ravel(), out_values.ravel()
    for place in range(rows.size):
        if place < wide:
            first, stride = starts[place] * LANES, 1
            room = (starts[place + 1] - starts[place]) * LANES
        else:
            s, lane = wide + (place - wide) // LANES, (place - wide) % LANES
            first, stride = starts[s] * LANES + lane, LANES
            room = starts[s + 1] - starts[s]
        begin, end = row_starts[rows[place]], row_starts[rows[place] + 1]
        for k in range(room):
            at = first + k * stride
            flat_columns[at] = columns[min(begin + k, end - 1)]
            value = values[begin + k] if begin + k < end else np.float32(0)
            flat_values[at] = narrow(value, flat_values[at])
