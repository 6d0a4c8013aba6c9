"""What a run keeps in memory per active value, measured, beside what the paper's code keeps."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.process_memory import peak_resident


@dataclass(frozen=True, slots=True)
class PaperBytes:
    """Hold a paper's own accounting, in bytes per active value; None where it gives none."""

    total: int | None = None
    moments: int | None = None


# read from the SpIEL authors' code (arXiv 2401.16405); the zeroth-order paper (arXiv 2406.02913)
# has no optimiser state at all
PAPER = {
    "spiel-ag": PaperBytes(total=24),
    "spiel-ma": PaperBytes(total=12),
    "zo": PaperBytes(moments=0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTable:
    """Hold what the active values of a run cost, in bytes over all layers, and the run's peak."""

    entries: int  # active values
    value: int
    position: int  # columns, row starts and whatever else a layer keeps of its support
    gradient: int
    moments: int  # whatever the updater keeps from one update to the next
    peak: int  # of the process; on CUDA, of what PyTorch allocated there
    paper: PaperBytes | None  # None: no paper to compare with

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "MemoryTable":
        """Return what `dataclasses.asdict` took apart."""
        paper = saved["paper"]
        return cls(**(dict(saved) | {"paper": None if paper is None else PaperBytes(**paper)}))

    def with_peak(self, device: torch.device) -> "MemoryTable":
        """Return the same with the peak of now, or of the process that was resumed if higher."""
        return replace(self, peak=max(self.peak, peak_bytes(device)))

    @property
    def total(self) -> int:
        """Return the bytes of values, positions, gradients and moments together."""
        return self.value + self.position + self.gradient + self.moments


def measure_memory(
    layers: Mapping[str, TrainableDelta], optimizer: torch.optim.Optimizer, *, method: str
) -> MemoryTable:
    """Measure the live tensors: call it after `optimizer.step` and before gradients are cleared.

    Earlier there are no moments yet, later no gradients. `method` picks the paper to compare with.
    """
    device = next(iter(layers.values())).values.device
    return MemoryTable(
        entries=sum(layer.values.numel() for layer in layers.values()),
        value=tensor_bytes(layer.values for layer in layers.values()),
        position=tensor_bytes(list(layer.buffers()) for layer in layers.values()),
        gradient=tensor_bytes(layer.values.grad for layer in layers.values()),
        moments=tensor_bytes(optimizer.state.values()),
        peak=peak_bytes(device),
        paper=PAPER.get(method),
    )


def tensor_bytes(held: object) -> int:
    """Return the bytes of all tensors in nested mappings and sequences, each tensor once."""
    found: dict[int, torch.Tensor] = {}
    _collect(held, found)
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def _collect(held: Any, found: dict[int, torch.Tensor]) -> None:
    if isinstance(held, torch.Tensor):
        found[id(held)] = held
    elif isinstance(held, Mapping):
        _collect(held.values(), found)
    elif isinstance(held, Iterable) and not isinstance(held, str):
        for part in held:
            _collect(part, found)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory held at once so far: by this process, on CUDA by its tensors there."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident()


def memory_rows(table: MemoryTable) -> list[tuple[str, str, str, str]]:
    """Return the accounting as text: what, bytes per active value, bytes, the paper's."""
    paper = table.paper or PaperBytes()
    parts: list[tuple[str, int, int | None]] = [
        ("value", table.value, None),
        ("position", table.position, None),
        ("gradient", table.gradient, None),
        ("moments", table.moments, paper.moments),
        ("together", table.total, paper.total),
    ]
    return [
        (what, f"{size / table.entries:.2f}", readable(size), "" if known is None else f"{known}")
        for what, size, known in parts
    ]


def print_memory(table: MemoryTable, console: Console) -> None:
    """Print the accounting and the peak."""
    grid = Table(title=f"Memory of {table.entries:,} active values", title_justify="left")
    grid.add_column("")
    for heading in ("bytes per value", "total", "paper's code"):
        grid.add_column(heading, justify="right")
    for row in memory_rows(table):
        grid.add_row(*row)
    console.print(grid)
    console.print(f"Peak memory of the run: {readable(table.peak)}")


def readable(size: int) -> str:
    """Return a number of bytes for people, in decimal units."""
    if size < 1e6:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
