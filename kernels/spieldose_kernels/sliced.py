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

    memory: torch.Tensor  # [n] uint8
    records: Mapping[str, Record]  # by module, offsets from the piece's start

    @property
    def nbytes(self) -> int:
        """Return the bytes of arena the adapter takes."""
        return self.memory.numel()

    @property
    def host_bytes(self) -> int:
        """Return the bytes of host memory it takes: PyTorch pins powers of two."""
        return 1 << (self.nbytes - 1).bit_length() if self.memory.is_pinned() else self.nbytes


class Packing:
    """Slice an adapter whose entries come piece by piece, so that they never all lie here twice."""

    def __init__(
        self,
        row_starts: Mapping[str, torch.Tensor],  # [R + 1] int32 by module
        widths: Mapping[str, int],
        dtype: torch.dtype,  # of values: float32, or bfloat16 rounded to even
        *,
        pinned: bool = False,
    ) -> None:
        """Take what is known before any entry; `pinned` memory is what a GPU copies from."""
        self._row_starts = {module: starts.numpy() for module, starts in row_starts.items()}
        self._plans = {module: plan(starts) for module, starts in self._row_starts.items()}
        self._shapes = {m: (row_starts[m].numel() - 1, width) for m, width in widths.items()}
        self._dtype = dtype
        records, size = {}, 0
        for module, shape in self._shapes.items():
            records[module], size = _place(self._plans[module], shape, dtype, size)
        memory = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
        self.packed = PackedAdapter(memory, records)
        self._sliced = {}
        for module, (places, _, _, starts) in self._plans.items():
            at = records[module][3]
            memory[at : at + starts.nbytes] = torch.from_numpy(starts.view(np.uint8))
            sliced = view(memory, records[module], shape=self._shapes[module], dtype=dtype)
            fill_rows(places, sliced.rows.numpy())
            self._sliced[module] = sliced

    def add_columns(self, module: str, first: int, columns: torch.Tensor) -> None:
        """Take the columns from entry `first` on."""
        out = self._sliced[module].columns.numpy()
        fill_columns(*self._where(module), first, columns.numpy(), out)

    def add_values(self, module: str, first: int, values: torch.Tensor) -> None:
        """Take the values from entry `first` on."""
        out = self._sliced[module].values
        if self._dtype == torch.bfloat16:
            out = out.view(torch.uint16)
        fill_values(*self._where(module), first, values.float().numpy(), out.numpy())

    def _where(self, module: str) -> tuple[Array, Array, int, Array]:
        places, _, wide, starts = self._plans[module]
        return self._row_starts[module], places, wide, starts


def pack(adapter: Adapter, dtype: torch.dtype) -> PackedAdapter:
    """Slice all of an adapter's deltas; values as float32, or as bfloat16 rounded to even."""
    row_starts = {module: delta.row_starts for module, delta in adapter.modules.items()}
    widths = {module: delta.width for module, delta in adapter.modules.items()}
    packing = Packing(row_starts, widths, dtype)
    for module, delta in adapter.modules.items():
        packing.add_columns(module, 0, delta.columns)
        packing.add_values(module, 0, delta.values)
    return packing.packed


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
    planned: tuple[Array, int, int, Array], shape: tuple[int, int], dtype: torch.dtype, size: int
) -> tuple[Record, int]:
    """Return a delta's record and the end of the memory it takes, from `size` on."""
    _, stored, wide, starts = planned
    row_dtype, column_dtype = map(index_dtype, shape)
    entries = int(starts[-1]) * LANES
    offsets = []
    for nbytes in (
        starts.nbytes,
        stored * row_dtype.itemsize,
        entries * column_dtype.itemsize,
        entries * dtype.itemsize,
    ):
        offsets.append(size)
        size += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return (starts.size - 1, wide, stored, *offsets), size


@compiled
def plan(row_starts):
    """Return each row's place by falling length (-1: empty), how many have one, how many of these
    own a slice, and the slices' starts.

    The number of rows that own a slice is the one that needs the fewest vectors. Rows are counted,
    not sorted: it takes no more memory than the delta itself.
    """
    height = row_starts.size - 1
    longest = 0
    for row in range(height):
        longest = max(longest, row_starts[row + 1] - row_starts[row])
    counts = np.zeros(longest + 1, np.int32)
    for row in range(height):
        counts[row_starts[row + 1] - row_starts[row]] += 1
    stored = height - counts[0]
    lengths = np.empty(stored, np.int32)  # falling
    at = 0
    for length in range(longest, 0, -1):
        end = at + counts[length]
        lengths[at:end] = length
        counts[length] = at  # from here on the next place of a row so long
        at = end
    places = np.empty(height, np.int32)
    for row in range(height):
        length = row_starts[row + 1] - row_starts[row]
        places[row] = counts[length] if length else -1
        counts[length] += 1

    owned = 0  # vectors of rows before i, if each owns a slice
    for i in range(stored):
        owned += -(-lengths[i] // LANES)
    shared = np.zeros(LANES, np.int64)  # vectors of rows i and after, if they share; by i % LANES
    wide, best = stored, owned
    for i in range(stored - 1, -1, -1):
        owned -= -(-lengths[i] // LANES)
        shared[i % LANES] += lengths[i]
        if owned + shared[i % LANES] <= best:
            wide, best = i, owned + shared[i % LANES]

    slices = wide + -(-(stored - wide) // LANES)
    starts = np.zeros(slices + 1, np.int32)
    for s in range(slices):
        longest = lengths[s if s < wide else wide + (s - wide) * LANES]
        starts[s + 1] = starts[s] + (-(-longest // LANES) if s < wide else longest)
    return places, stored, wide, starts


@compiled
def fill_rows(places, out):
    """Write the rows in the order of their places."""
    for row in range(places.size):
        if places[row] >= 0:
            out[places[row]] = row


@compiled
def lanes(place, wide, starts):
    """Return where a row's first entry lies, from one to the next, and how many have room."""
    if place < wide:
        return starts[place] * LANES, 1, (starts[place + 1] - starts[place]) * LANES
    s, lane = wide + (place - wide) // LANES, (place - wide) % LANES
    return starts[s] * LANES + lane, LANES, starts[s + 1] - starts[s]


@compiled
def fill_columns(row_starts, places, wide, starts, first, columns, out):
    """Write the columns from entry `first` on where `plan` put them; a row's last pads it."""
    flat = out.ravel()
    row, k, end = np.searchsorted(row_starts, first, "right") - 1, first, first + columns.size
    while k < end:
        begin, stop = row_starts[row], min(row_starts[row + 1], end)
        if k < stop:
            at, stride, room = lanes(places[row], wide, starts)
            for j in range(k, stop):
                flat[at + (j - begin) * stride] = columns[j - first]
            if stop == row_starts[row + 1]:
                for j in range(stop, begin + room):
                    flat[at + (j - begin) * stride] = columns[stop - 1 - first]
            k = stop
        row += 1


@compiled
def fill_values(row_starts, places, wide, starts, first, values, out):
    """Write the values, float32, from entry `first` on where `plan` put them."""
    flat = out.ravel()
    row, k, end = np.searchsorted(row_starts, first, "right") - 1, first, first + values.size
    while k < end:
        begin, stop = row_starts[row], min(row_starts[row + 1], end)
        if k < stop:
            at, stride, _ = lanes(places[row], wide, starts)
            for j in range(k, stop):
                out_at = at + (j - begin) * stride
                flat[out_at] = narrow(values[j - first], flat[out_at])
            k = stop
        row += 1
