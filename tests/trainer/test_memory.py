"""What a run's active values cost is measured, and set beside what the papers' code costs."""

import io
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer import process_memory
from spieldose_trainer.memory import (
    MemoryTable,
    PaperBytes,
    measure_memory,
    peak_bytes,
    print_memory,
    readable,
    tensor_bytes,
)
from spieldose_trainer.process_memory import resident

SHAPES = {"first": (12, 10), "second": (8, 12)}
ENTRIES = {"first": 30, "second": 20}

Layers = dict[str, TrainableDelta]


@pytest.fixture
def layers(make_trainable: Callable[..., TrainableDelta]) -> Layers:
    """Two layers with 50 active values together."""
    return {
        name: make_trainable(torch.arange(ENTRIES[name]), shape=shape)
        for name, shape in SHAPES.items()
    }


def step(layers: Layers, optimizer: torch.optim.Optimizer) -> None:
    for layer in layers.values():
        layer.values.grad = torch.ones_like(layer.values)
    optimizer.step()


def adam(layers: Layers) -> torch.optim.Optimizer:
    return torch.optim.Adam([layer.values for layer in layers.values()], foreach=False)


def test_values_gradients_and_moments_are_counted_as_they_lie_in_memory(layers: Layers) -> None:
    optimizer = adam(layers)
    step(layers, optimizer)
    table = measure_memory(layers, optimizer, method="spiel-ag")
    assert table.entries == 50
    assert table.value == table.gradient == 4 * 50
    assert table.moments == 2 * 4 * 50 + 2 * 4  # and a count of steps per parameter


def test_positions_are_what_a_layer_keeps_of_its_support(layers: Layers) -> None:
    table = measure_memory(layers, adam(layers), method="spiel-ag")
    buffers = [buffer for layer in layers.values() for buffer in layer.buffers()]
    assert table.position == sum(buffer.nbytes for buffer in buffers)
    assert table.position >= 4 * 50 + 4 * (13 + 9)  # columns and row starts


def test_gradients_that_were_cleared_cost_nothing(layers: Layers) -> None:
    optimizer = adam(layers)
    step(layers, optimizer)
    optimizer.zero_grad()
    assert measure_memory(layers, optimizer, method="spiel-ag").gradient == 0


def test_half_precision_gradients_cost_half(layers: Layers) -> None:
    for layer in layers.values():
        layer.values.data = layer.values.data.bfloat16()
        layer.values.grad = torch.ones_like(layer.values)
    table = measure_memory(layers, adam(layers), method="spiel-ag")
    assert table.gradient == table.value == 2 * 50


def test_a_tensor_held_twice_is_counted_once() -> None:
    shared = torch.zeros(10)
    assert tensor_bytes({"a": [shared], "b": (shared, None, 3, "text")}) == 40


@pytest.mark.parametrize(
    ("method", "paper"),
    [
        ("spiel-ag", PaperBytes(total=24)),
        ("spiel-ma", PaperBytes(total=12)),
        ("zo", PaperBytes(moments=0)),
        ("lift", None),
    ],
)
def test_a_method_is_compared_with_its_own_paper(
    layers: Layers, method: str, paper: PaperBytes | None
) -> None:
    assert measure_memory(layers, adam(layers), method=method).paper == paper


def test_the_peak_covers_what_was_freed_again() -> None:
    before = peak_bytes(torch.device("cpu"))
    torch.ones((before - resident() + (1 << 26)) // 4)
    assert peak_bytes(torch.device("cpu")) > before + (1 << 25)


def test_the_peak_is_this_processs_own_and_not_its_parents() -> None:
    ballast = torch.ones(1 << 26)  # 256 MiB that a child does not hold
    code = f"import runpy; print(runpy.run_path({process_memory.__file__!r})['peak_resident']())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(out.stdout) < ballast.nbytes


def test_the_table_sets_the_papers_bytes_beside_ours() -> None:
    table = MemoryTable(
        entries=1000,
        value=4000,
        position=4400,
        gradient=4000,
        moments=12000,
        peak=3_000_000_000,
        paper=PaperBytes(total=24),
    )
    out = io.StringIO()
    print_memory(table, Console(file=out, width=100))
    together = next(line for line in out.getvalue().splitlines() if "together" in line)
    assert together.replace("│", "").split() == ["together", "24.40", "24.4", "kB", "24"]
    assert "3.00 GB" in out.getvalue()


@pytest.mark.parametrize(
    ("size", "text"), [(900, "0.9 kB"), (7_071_092, "7.1 MB"), (2_340_000_000, "2.34 GB")]
)
def test_bytes_are_written_in_decimal_units(size: int, text: str) -> None:
    assert readable(size) == text
