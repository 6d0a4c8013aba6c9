"""What a delta file holds, for people: where it comes from, densities, norms."""

import hashlib
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

from spieldose_kernels.checkpoint import checkpoint_spec
from spieldose_kernels.delta import Adapter, SparseDelta
from spieldose_kernels.errors import one_line
from spieldose_kernels.terminal import harmless
from spieldose_trainer import delta_path
from spieldose_trainer.interop.config import InspectConfig
from spieldose_trainer.module_kind import by_kind, module_kind

BLOCK_RANGES: Final = 3  # columns of densities: more do not fit into 80 characters


@dataclass(frozen=True, slots=True)
class Measures:
    """Hold the sums over some layers' deltas."""

    entries: int
    weights: int
    norm: float  # ‖Δ‖
    largest: float  # max |δ|
    zeros: int  # entries whose value is 0

    @property
    def density(self) -> str:
        """Return entries over weights, in per cent; a dash where there are no weights."""
        return f"{self.entries / self.weights:.2%}" if self.weights else "–"


def inspect(config: InspectConfig, console: Console) -> None:
    """Check a delta file completely and print what it holds.

    Raises DeltaError, and BaseError if there is no such base; then nothing is printed.
    """
    base = None if config.base is None else checkpoint_spec(config.base)
    adapter = delta_path.read(config.file, base)
    with open(config.file, "rb") as file:
        version = hashlib.file_digest(file, "sha256").hexdigest()
    size = config.file.stat().st_size
    heading = f"{config.file}: version {version[:12]}, {size / 1e6:.1f} MB\n"
    console.print(heading, soft_wrap=True)
    console.print(_facts(adapter))
    console.print()
    console.print(module_table(adapter) if config.modules else kind_table(adapter))
    columns, rows = (f"{share:.0%}" for share in concentration(adapter.modules.values()))
    console.print(
        f"\nclustering: half of the entries lie in {columns} of the columns, {rows} of the rows"
    )
    zeros = measure(adapter.modules.values()).zeros
    fits = "" if config.base is None else f", fits {config.base}"
    checks = f"checks: whole, well-formed{fits}; {zeros:,} entries have the value 0"
    console.print(checks, soft_wrap=True)


def measure(deltas: Iterable[SparseDelta]) -> Measures:
    """Sum up some layers' deltas."""
    entries = weights = zeros = 0
    square = largest = 0.0
    for delta in deltas:
        values = delta.values.double()
        entries += delta.nnz
        weights += math.prod(delta.shape)
        zeros += int((values == 0).sum())
        square += values.square().sum().item()
        largest = max(largest, values.abs().max().item() if delta.nnz else 0.0)
    return Measures(entries, weights, math.sqrt(square), largest, zeros)


def concentration(deltas: Iterable[SparseDelta]) -> tuple[float, float]:
    """Return what share of a layer's columns, and of its rows, hold half of its entries.

    Medians over the layers; 0.5 where entries are spread evenly, a little less where at random.
    """
    shares = [
        (
            _half(delta.columns.unique(return_counts=True)[1], of=delta.width),
            _half(delta.row_starts.diff(), of=delta.shape[0]),
        )
        for delta in deltas
        if delta.nnz
    ]
    columns, rows = zip(*shares, strict=True) if shares else ((0.0,), (0.0,))
    return statistics.median(columns), statistics.median(rows)


def _half(counts: torch.Tensor, *, of: int) -> float:
    """Return the smallest share of `of` counts, of which some [n] are given, for half their sum."""
    largest = counts.sort(descending=True).values.cumsum(0)
    return (int((2 * largest < largest[-1]).sum()) + 1) / of


def kind_table(adapter: Adapter) -> Table:
    """Return a line for every kind of module, its density also by ranges of blocks."""
    ranges = block_ranges(adapter)
    table = _table("module", "entries", "density", *map(_range_name, ranges), "‖Δ‖", "max |δ|")
    for kind, names in by_kind(adapter.modules).items():
        table.add_row(one_line(kind), *_cells(adapter, names, ranges))
    table.add_row("all", *_cells(adapter, adapter.modules, ranges))
    return table


def module_table(adapter: Adapter) -> Table:
    """Return a line for every module."""
    table = _table("module", "shape", "entries", "density", "‖Δ‖", "max |δ|")
    for name, delta in adapter.modules.items():
        found = measure([delta])
        shape = "×".join(map(str, delta.shape))
        table.add_row(one_line(name), shape, f"{found.entries:,}", found.density, *_sizes(found))
    return table


def block_ranges(adapter: Adapter) -> list[range]:
    """Cut the numbers of the blocks into at most BLOCK_RANGES ranges of nearly equal length."""
    blocks = [block for name in adapter.modules if (block := module_kind(name).block) is not None]
    if not blocks:
        return []
    first, count = min(blocks), max(blocks) - min(blocks) + 1
    cuts = [first + count * i // BLOCK_RANGES for i in range(BLOCK_RANGES + 1)]
    return [range(a, b) for a, b in pairwise(cuts) if a < b]


def _facts(adapter: Adapter) -> Table:
    info = adapter.info
    dtypes = {str(delta.values.dtype).removeprefix("torch.") for delta in adapter.modules.values()}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("method", one_line(info.method))
    table.add_row("base", one_line(f"{info.base_model} ({info.base_fingerprint[:12]})"))
    table.add_row("density", f"{info.density:.2%} of the target layers' weights")
    table.add_row("values", f"{', '.join(sorted(dtypes))} in {len(adapter.modules)} modules")
    if info.description:
        table.add_row("description", one_line(info.description))
    if info.chat_template:
        table.add_row("chat template", harmless(info.chat_template))
    if info.settings:
        settings = (one_line(f"{k}={v}") for k, v in sorted(info.settings.items()))
        table.add_row("settings", " ".join(settings))
    return table


def _cells(adapter: Adapter, names: Iterable[str], ranges: list[range]) -> list[str]:
    deltas = {name: adapter.modules[name] for name in names}
    found = measure(deltas.values())
    densities = [
        measure(d for name, d in deltas.items() if module_kind(name).block in blocks).density
        for blocks in ranges
    ]
    return [f"{found.entries:,}", found.density, *densities, *_sizes(found)]


def _sizes(found: Measures) -> tuple[str, str]:
    return f"{found.norm:.3g}", f"{found.largest:.3g}"


def _range_name(blocks: range) -> str:
    return f"{blocks[0]}" if len(blocks) == 1 else f"{blocks[0]}–{blocks[-1]}"


def _table(*headings: str) -> Table:
    table = Table(box=None)
    for i, heading in enumerate(headings):
        name = i == 0
        table.add_column(
            heading, justify="left" if name else "right", no_wrap=not name, overflow="fold"
        )
    return table
