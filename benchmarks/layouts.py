"""Compare layouts of a delta on trained supports: bytes an entry takes, time it takes on the CPU.

    python benchmarks/layouts.py ADAPTER.safetensors ...   (`make demo` leaves some in build/demo)

Every file is compared with uniformly random supports of its size. Values are bfloat16, columns 16
bits. Times are of one token through every layer on one thread, medians of interleaved rounds.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from spieldose_kernels.cpu.bfloat16 import widen
from spieldose_kernels.cpu.team import compiled
from spieldose_kernels.cpu.vector import LANES, dot_lanes
from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.delta_file import read_delta
from spieldose_kernels.sliced import fill, plan

ROUNDS = 15
Array = np.ndarray[Any, np.dtype[Any]]
Layer = tuple[int, Callable[[Array, Array], None]]  # bytes, and the product of x into y


def main() -> None:
    """Print one table for every file, and one for a random support of its size."""
    for name in sys.argv[1:]:
        deltas = list(read_delta(Path(name).read_bytes()).modules.values())
        compare(Path(name).stem, deltas)
        compare(f"{Path(name).stem}, but random", [shuffled(delta) for delta in deltas])


def compare(title: str, deltas: list[SparseDelta]) -> None:
    """Print bytes and nanoseconds an entry for every layout."""
    entries = sum(delta.nnz for delta in deltas)
    built = {name: [make(delta) for delta in deltas] for name, make in LAYOUTS.items()}
    inputs = [
        (np.ones(delta.width, np.float32), np.zeros(delta.shape[0], np.float32)) for delta in deltas
    ]
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for _ in range(ROUNDS):
        for name, layers in built.items():
            begin = time.perf_counter()
            for (_, multiply), (x, y) in zip(layers, inputs, strict=True):
                multiply(x, y)
            times[name].append(time.perf_counter() - begin)
    lengths = torch.cat([delta.row_starts.diff() for delta in deltas])
    table = Table("layout", "bytes an entry", "ns an entry", title=f"{title}: {describe(lengths)}")
    for name, layers in built.items():
        size = sum(nbytes for nbytes, _ in layers) / entries
        table.add_row(name, f"{size:.2f}", f"{statistics.median(times[name]) / entries * 1e9:.2f}")
    Console().print(table)


def describe(lengths: torch.Tensor) -> str:
    """Say how rows differ in length."""
    counts = lengths.double()
    return (
        f"rows hold {counts.mean():.1f} ± {counts.std():.1f} entries, at most {int(counts.max())}, "
        f"{(counts == 0).double().mean():.0%} none"
    )


def shuffled(delta: SparseDelta) -> SparseDelta:
    """Return as many entries at random places."""
    height, width = delta.shape
    generator = torch.Generator().manual_seed(0)
    positions = torch.randperm(height * width, generator=generator)[: delta.nnz]
    return SparseDelta.from_flat(positions, delta.values, shape=delta.shape)


def csr(delta: SparseDelta) -> Layer:
    """Lay rows out one after the other; a thread would take a block of rows."""
    starts, columns, values = arrays(delta)
    return starts.nbytes + columns.nbytes + values.nbytes, lambda x, y: _csr(
        x, y, starts, columns, values
    )


def chunks(delta: SparseDelta) -> Layer:
    """Lay entries out with their rows; a thread would take as many entries as any other."""
    _, columns, values = arrays(delta)
    rows = delta.rows().numpy().astype(np.uint16)
    return rows.nbytes + columns.nbytes + values.nbytes, lambda x, y: _chunks(
        x, y, rows, columns, values
    )


def slices(delta: SparseDelta, *, sort: bool, wide: bool) -> Layer:
    """Lay rows out side by side, 16 to a slice as long as its longest."""
    row_starts, columns, _ = arrays(delta)
    lengths = np.diff(row_starts)
    rows, owners, starts = plan(row_starts)
    if not wide:
        rows = rows if sort else np.flatnonzero(lengths).astype(np.int32)
        longest = [lengths[rows[i : i + LANES]].max() for i in range(0, rows.size, LANES)]
        owners, starts = 0, np.concatenate([[0], np.cumsum(longest)]).astype(np.int32)
    shape = int(starts[-1]), LANES
    sliced = np.empty(rows.size, np.uint16), np.empty(shape, np.uint16), np.empty(shape, np.uint16)
    fill(row_starts, columns, delta.values.float().numpy(), rows, owners, starts, *sliced)
    nbytes = starts.nbytes + sum(array.nbytes for array in sliced)
    return nbytes, lambda x, y: _slices(x, y, owners, starts, *sliced)


def arrays(delta: SparseDelta) -> tuple[Array, Array, Array]:
    """Return row starts, columns and values, the latter as the bits of bfloat16."""
    values = delta.values.bfloat16().view(torch.uint16).numpy()
    return delta.row_starts.numpy(), delta.columns.numpy(), values


@compiled
def _csr(x, y, starts, columns, values):
    for row in range(y.size):
        total = np.float32(0)
        for j in range(starts[row], starts[row + 1]):
            total += widen(values[j]) * x[columns[j]]
        y[row] += total


@compiled
def _chunks(x, y, rows, columns, values):
    for j in range(rows.size):
        y[rows[j]] += widen(values[j]) * x[columns[j]]


@compiled
def _slices(x, y, wide, starts, rows, columns, values):
    sums = np.empty(LANES, np.float32)
    for s in range(starts.size - 1):
        dot_lanes(values, columns, x, starts[s], starts[s + 1], sums)
        if s < wide:
            y[rows[s]] += sums.sum()
        else:
            first = wide + (s - wide) * LANES
            for lane in range(min(LANES, rows.size - first)):
                y[rows[first + lane]] += sums[lane]


LAYOUTS: dict[str, Callable[[SparseDelta], Layer]] = {
    "CSR, by rows": csr,
    "entries with their rows, in equal chunks": chunks,
    "slices of 16 rows": lambda delta: slices(delta, sort=False, wide=False),
    "slices of 16 rows sorted by length": lambda delta: slices(delta, sort=True, wide=False),
    "the same, long rows in slices of their own": lambda delta: slices(delta, sort=True, wide=True),
}

if __name__ == "__main__":
    main()
