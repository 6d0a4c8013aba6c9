"""Kernels run on a CUDA device, and without one on Triton's interpreter."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
if INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined

from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta  # noqa: E402
from spieldose_kernels.slab import Slab  # noqa: E402
from spieldose_kernels.sliced import pack  # noqa: E402

INFO = AdapterInfo(base_model="b", base_fingerprint="f", method="random", density=0.2)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@dataclass(frozen=True)
class Resident:
    """Hold one layer's deltas in a slab, and the same dense."""

    layer: dict[str, Any]  # what kernels take: memory, table and dtype
    dense: tuple[torch.Tensor, ...]  # by slot, [R, C] float64, from the original delta


def resident(deltas: Sequence[SparseDelta | None], dtype: torch.dtype) -> Resident:
    """Put one layer's deltas into slots 0, 1, ... of a slab whose memory was NaN before.

    None is an adapter that leaves the layer alone. Values are rounded to dtype first.
    """
    given = [delta and rounded(delta, dtype) for delta in deltas]
    shape = next(delta.shape for delta in given if delta)
    shapes = {"other": shape, "m": shape}
    slab = Slab(shapes, slots=len(given), budget=1 << 20, dtype=dtype, device=DEVICE)
    slab.arena.memory.fill_(0xFF)
    for slot, delta in enumerate(given):
        modules = {"other": random_delta(*shape, seed=99)} | ({"m": delta} if delta else {})
        assert slab.put(pack(Adapter(INFO, modules), dtype)) == slot
    layer = slab.layer("m")
    nothing = torch.zeros(shape, dtype=torch.float64)
    dense = tuple((d.dense(torch.float64) if d else nothing).to(DEVICE) for d in given)
    return Resident({"memory": layer.memory, "table": layer.table, "dtype": dtype}, dense)


def rounded(delta: SparseDelta, dtype: torch.dtype) -> SparseDelta:
    return SparseDelta(delta.row_starts, delta.columns, delta.values.to(dtype), delta.width)


def random_delta(height: int, width: int, *, seed: int, density: float = 0.2) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(height, width, generator=generator) < density
    return delta_at(mask.flatten().nonzero()[:, 0].tolist(), (height, width), seed=seed)


def delta_of_lengths(lengths: Sequence[int], width: int, *, seed: int) -> SparseDelta:
    """Make a delta of rows so long, at random columns."""
    generator = torch.Generator().manual_seed(seed)
    flat = [
        row * width + column
        for row, length in enumerate(lengths)
        for column in torch.randperm(width, generator=generator)[:length].tolist()
    ]
    return delta_at(flat, (len(lengths), width), seed=seed)


def delta_at(flat: Iterable[int], shape: tuple[int, int], *, seed: int) -> SparseDelta:
    """Make a delta with random values at these flat positions."""
    positions = torch.tensor(list(flat), dtype=torch.long)
    values = torch.randn(positions.numel(), generator=torch.Generator().manual_seed(seed))
    return SparseDelta.from_flat(positions, values, shape=shape)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def empty_pages(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return memory that is never touched but where a test writes it: pages cost nothing until."""
    return torch.empty(count, dtype=dtype, device=DEVICE)


def assert_rounded_once(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare with float64: at most the rounding of one store, and that of float32 sums."""
    # the interpreter cuts bfloat16 off where a GPU rounds it
    half_ulp = {torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}
    rtol = half_ulp.get(got.dtype, 1e-6)
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=3e-6)
