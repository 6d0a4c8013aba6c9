"""Measure the GPU kernels, every side of a comparison in turns within one run.

    python benchmarks/gpu.py [--out FILE] [--smoke]

Each kernel is first compared with its definition on the device; on a mismatch nothing is reported.
Layers are those of Llama-2-7B and Llama-3-8B with random weights; adapters are random, the lengths
of their rows log-normal, as trained ones' are far from equal. Times are medians of CUDA-graph
replays, every call finds the cache full of other data. Prints one table per question and one JSON
object as its last line, and writes everything to a file. --smoke runs every path that needs no CUDA
once, at toy size.
"""

import argparse
import gc
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined

import torch  # noqa: E402
import triton  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from triton.errors import TritonError  # noqa: E402

from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta, index_dtype  # noqa: E402
from spieldose_kernels.delta_matmul import delta_matmul_reference  # noqa: E402
from spieldose_kernels.gpu.gather import gather  # noqa: E402
from spieldose_kernels.gpu.nf4 import nf4_matmul  # noqa: E402
from spieldose_kernels.gpu.sampled import (  # noqa: E402
    product,
    sampled_product,
    transpose_support,
)
from spieldose_kernels.gpu.scatter import scatter_matmul  # noqa: E402
from spieldose_kernels.slab import LayerSlab, Slab  # noqa: E402
from spieldose_kernels.sliced import PackedAdapter, pack  # noqa: E402
from spieldose_kernels.token_groups import TokenGroups  # noqa: E402

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises a CPU kernel from the hub
try:
    import bitsandbytes
    from bitsandbytes.functional import QuantState
except ImportError:
    bitsandbytes = None

DEVICE = torch.device("cpu" if SMOKE else "cuda")
ROUNDS = 1 if SMOKE else 7
TIME_LIMIT = 420  # seconds; a section that would begin later is left out, and said to be
BF16 = torch.bfloat16

Shape = tuple[int, int]  # (R, C)
Work = Callable[[], object]
Row = dict[str, str | float | None]
INFO = AdapterInfo(base_model="", base_fingerprint="", method="random", density=0)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Say how large everything is."""

    models: Mapping[str, Sequence[Shape]]  # a decoder layer's linear layers
    shapes: Sequence[Shape]  # where a few layers are enough
    depth: int  # decoder layers in a stack
    batches: Sequence[int]
    batch: int  # where one is enough
    adapters: Sequence[int]
    densities: Sequence[float]
    density: float  # where one is enough
    high: float  # a second one
    segments: Sequence[int]  # tokens of one adapter
    training: Sequence[int]  # tokens of a training step
    few: Sequence[int]  # tokens of an NF4 product


FULL = Sizes(
    models={
        "Llama-2-7B": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)],
        "Llama-3-8B": [(4096, 4096)] * 2
        + [(1024, 4096)] * 2
        + [(14336, 4096)] * 2
        + [(4096, 14336)],
    },
    shapes=[(4096, 4096), (11008, 4096), (4096, 11008)],
    depth=32,
    batches=[1, 8, 32, 64],
    batch=32,
    adapters=[1, 8, 32],
    densities=[0.001, 0.005, 0.01, 0.025],
    density=0.005,
    high=0.025,
    segments=[8, 16, 32, 64, 128, 256, 512, 1024, 2048],
    training=[512, 2048],
    few=[1, 2, 4, 8, 16, 32, 64],
)
TOY = Sizes(
    models={"toy": [(48, 64), (64, 64)]},
    shapes=[(48, 64)],
    depth=2,
    batches=[1, 4],
    batch=4,
    adapters=[1, 4],
    densities=[0.05],
    density=0.05,
    high=0.2,
    segments=[2, 5],
    training=[5],
    few=[1, 3],
)
SIZES = TOY if SMOKE else FULL


class Clock:
    """Time work on the device."""

    def __init__(self) -> None:
        cached = 0 if SMOKE else torch.cuda.get_device_properties(DEVICE).L2_cache_size
        self._filling = torch.zeros(3 * cached // 4 + 1, device=DEVICE)
        self._sink = torch.zeros((), device=DEVICE)

    def compare(
        self, sides: Mapping[str, Work], *, eager: Sequence[str] = (), repeat: int = 10
    ) -> dict[str, float | None]:
        """Return each side's median microseconds, over rounds in which each side has its turn.

        Sides named in `eager` may be impossible here (None), and are not captured into a graph but
        queued while the device sleeps.
        """
        possible = {name: work for name, work in sides.items() if name not in eager or can(work)}
        if SMOKE:
            return dict.fromkeys(sides) | {name: wall(work) for name, work in possible.items()}
        torch.cuda.synchronize()
        runs = {
            name: partial(self._call, work, repeat) if name in eager else self._graph(work, repeat)
            for name, work in {"": nothing, **possible}.items()
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(elapsed(run, asleep=50_000_000 if name in eager else 4_000_000))
        medians = {name: statistics.median(values) for name, values in times.items()}
        return dict.fromkeys(sides) | {
            name: (medians[name] - medians[""]) / repeat for name in possible
        }

    def _graph(self, work: Work, repeat: int) -> Work:
        with torch.cuda.stream(torch.cuda.Stream()):
            self._call(work, 2)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._call(work, repeat)
        graph.replay()
        return graph.replay

    def _call(self, work: Work, repeat: int) -> None:
        for _ in range(repeat):
            # read, not written: what has to be written back would slow the work itself
            torch.sum(self._filling, dim=0, out=self._sink)
            work()


@cache
def clock() -> Clock:
    return Clock()


def nothing() -> None: ...


def can(work: Work) -> bool:
    try:
        work()
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


def elapsed(run: Work, *, asleep: int) -> float:
    """Return a run's microseconds; all of it is queued while the device sleeps so many cycles."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(asleep)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def wall(work: Work) -> float:
    """Return a call's microseconds on the host."""
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e6


def random_delta(shape: Shape, density: float, seed: int) -> SparseDelta:
    """Make a delta whose rows' lengths are log-normal."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weights = torch.randn(shape[0], 1, generator=generator, device=DEVICE).exp()
    chances = density * weights / weights.mean()
    mask = torch.rand(shape, generator=generator, device=DEVICE) < chances
    row_starts = torch.zeros(shape[0] + 1, dtype=torch.int32)
    row_starts[1:] = mask.sum(1).cumsum(0)
    columns = mask.nonzero()[:, 1].to(index_dtype(shape[1])).cpu()
    return SparseDelta(row_starts, columns, torch.randn(columns.numel()).bfloat16(), shape[1])


@dataclass(frozen=True)
class Mix:
    """Hold a batch's layers, their adapters in a slab, and the tokens' groups."""

    layers: Sequence[LayerSlab]
    groups: TokenGroups
    xs: Sequence[torch.Tensor]  # by layer
    ys: Sequence[torch.Tensor]
    nbytes: int  # of all the adapters' deltas for these layers
    slab: Slab

    def gather(self, i: int) -> None:
        add_gathered(self.ys[i], self.xs[i], self.layers[i], self.groups)

    def gather_all(self) -> None:
        for i in range(len(self.layers)):
            self.gather(i)


def add_gathered(y: torch.Tensor, x: torch.Tensor, layer: LayerSlab, groups: TokenGroups) -> None:
    arrays = {"order": groups.order, "starts": groups.starts, "slots": groups.slots}
    gather(y, x, memory=layer.memory, table=layer.table, dtype=layer.dtype, **arrays)


def make_groups(batch: int, adapters: int) -> TokenGroups:
    """Give every adapter its equal share of a batch."""
    arrays = (torch.arange(batch), torch.arange(0, batch + 1, batch // adapters))
    numbers = [array.int().to(DEVICE) for array in (*arrays, torch.arange(adapters))]
    return TokenGroups(numbers[0], numbers[1], numbers[2])


def make_packs(shapes: Sequence[Shape], density: float, count: int) -> list[PackedAdapter]:
    """Make adapters that touch layers of these shapes."""
    return [
        pack(
            Adapter(
                INFO, {str(i): random_delta(s, density, 100 * n + i) for i, s in enumerate(shapes)}
            ),
            BF16,
        )
        for n in range(count)
    ]


def make_slab(shapes: Sequence[Shape], packs: Sequence[PackedAdapter], slots: int) -> Slab:
    """Fill every slot with one of these adapters; each has memory of its own."""
    chosen = [packs[slot % len(packs)] for slot in range(slots)]
    slab = Slab(
        {str(i): shape for i, shape in enumerate(shapes)},
        slots=slots,
        budget=sum(pack.nbytes for pack in chosen),
        dtype=BF16,
        device=DEVICE,
    )
    for packed in chosen:
        slab.put(packed)
    return slab


def make_mix(slab: Slab, packs: Sequence[PackedAdapter], batch: int, adapters: int) -> Mix:
    """Make a batch of which every adapter plays an equal share."""
    layers = [slab.layer(module) for module in slab.modules]
    xs = [torch.randn(batch, layer.shape[1], device=DEVICE, dtype=BF16) for layer in layers]
    ys = [torch.zeros(batch, layer.shape[0], device=DEVICE, dtype=BF16) for layer in layers]
    nbytes = sum(packs[slot % len(packs)].nbytes for slot in range(adapters))
    return Mix(layers, make_groups(batch, adapters), xs, ys, nbytes, slab)


def check() -> Row:
    """Compare every kernel with its definition in float64; exit on a mismatch."""
    errors: Row = {}
    shape, adapters = SIZES.shapes[-1], SIZES.adapters[-1]
    packs = make_packs([shape], SIZES.high, 2)
    slab = make_slab([shape], packs, adapters)
    mix = make_mix(slab, packs, SIZES.batches[-1], adapters)
    layer, groups, x = mix.layers[0], mix.groups, mix.xs[0]
    y = torch.zeros(x.shape[0], shape[0], device=DEVICE, dtype=torch.float64)
    delta_matmul_reference(y, x.double(), layer, groups)
    out = torch.zeros(y.shape, device=DEVICE)
    add_gathered(out, x.float(), layer, groups)
    errors["gather"] = distance(out, y)
    starts = groups.starts.tolist()
    segments = [(i, slice(starts[i], starts[i + 1])) for i in range(adapters)]
    place = {"memory": layer.memory, "table": layer.table, "dtype": layer.dtype}
    scatter_matmul(out.zero_(), x.float(), segments=segments, **place)
    errors["scatter"] = distance(out, y)
    errors |= check_training(shape) | check_nf4(shape)
    # float32 sums; the NF4 product also rounds weights and outputs to bfloat16
    wrong = [k for k, e in errors.items() if not e < (2e-2 if k.startswith("nf4") else 1e-5)]
    if wrong:
        sys.exit(f"expected every kernel to be right, got {', '.join(wrong)} wrong: {errors}")
    return errors


def check_training(shape: Shape) -> Row:
    delta = random_delta(shape, SIZES.high, 0)
    support = support_of(delta)
    x, dy = (torch.randn(n, 77, device=DEVICE) for n in (shape[1], shape[0]))
    values, dense = delta.values.to(DEVICE), delta.dense(torch.float64).to(DEVICE)
    starts, rows, places = transpose_support(**support, width=shape[1])
    gradient = dy.double() @ x.double().t()
    return {
        "product": distance(product(x, values, **support), dense @ x.double()),
        "transposed product": distance(
            product(dy, values[places], row_starts=starts, columns=rows), dense.t() @ dy.double()
        ),
        "sampled product": distance(
            sampled_product(dy, x, **support),
            gradient[delta.rows().to(DEVICE), support["columns"].long()],
        ),
    }


def check_nf4(shape: Shape) -> Row:
    packed, state = random_nf4(shape)
    w = dequantised(packed, state).double()
    errors: Row = {}
    for tokens in SIZES.few:
        x = torch.randn(tokens, shape[1], device=DEVICE, dtype=BF16)
        y = nf4_matmul(x, packed, quant_state=state)
        errors[f"nf4, {tokens} tokens"] = distance(y, x.double() @ w.t())
    return errors


def distance(out: torch.Tensor, true: torch.Tensor) -> float:
    """Return ‖out - true‖ / ‖true‖."""
    return float(torch.linalg.norm(out.double() - true) / torch.linalg.norm(true))


def support_of(delta: SparseDelta) -> dict[str, torch.Tensor]:
    return {
        "row_starts": delta.row_starts.to(DEVICE),
        "columns": delta.columns.int().to(DEVICE),
    }


def random_nf4(shape: Shape) -> tuple[torch.Tensor, Any]:
    """Make an NF4 weight as bitsandbytes holds it, every number in it random."""
    blocks = shape[0] * shape[1] // 64
    packed = torch.randint(256, (32 * blocks, 1), dtype=torch.uint8, device=DEVICE)
    make = QuantState if bitsandbytes else SimpleNamespace
    nested = {
        "absmax": torch.rand(-(-blocks // 256), device=DEVICE) * 0.01,
        "code": torch.linspace(-1, 1, 256, device=DEVICE),
        "blocksize": 256,
        "dtype": torch.float32,
    }
    state = make(
        absmax=torch.randint(256, (blocks,), dtype=torch.uint8, device=DEVICE),
        shape=torch.Size(shape),
        code=torch.tensor(NF4, device=DEVICE),
        blocksize=64,
        quant_type="nf4",
        dtype=BF16,
        offset=torch.tensor(0.02, device=DEVICE),
        state2=make(**nested),
    )
    state.nested = True
    return packed, state


def dequantised(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return an NF4 weight as bfloat16."""
    outer = state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()]
    scales = state.state2.code[state.absmax.long()] * outer + state.offset
    numbers = torch.cat([packed >> 4, packed & 15], 1).flatten().long()
    return (state.code[numbers].view(-1, 64) * scales[:, None]).view(state.shape).to(BF16)


# QLoRA (arXiv 2305.14314), appendix E
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def copy_bandwidth() -> float:
    """Return bytes per microsecond, read and written, of a copy on the device."""
    size = 1 << (10 if SMOKE else 30)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock().compare({"copy": lambda: target.copy_(source)})["copy"]


def gathers() -> Iterator[Row]:
    """Gather, all linear layers of one decoder layer: bandwidth next to a copy's."""
    copied = copy_bandwidth()
    for model, shapes in SIZES.models.items():
        for density in SIZES.densities:
            packs = make_packs(shapes, density, 2)
            slab = make_slab(shapes, packs, SIZES.adapters[-1])
            for batch in SIZES.batches:
                for adapters in (a for a in SIZES.adapters if a <= batch):
                    mix = make_mix(slab, packs, batch, adapters)
                    us = clock().compare({"gather": mix.gather_all})["gather"]
                    yield {
                        "model": model,
                        "density %": 100 * density,
                        "batch": batch,
                        "adapters": adapters,
                        "us": us,
                        "MB": mix.nbytes / 1e6,
                        "GB/s": mix.nbytes / us / 1e3,
                        "of copy": mix.nbytes / us / copied,
                    }


def stacks() -> Iterator[Row]:
    """A whole decoder stack's linear layers, one token a request: every request its own adapter."""
    batch, density = SIZES.batch, SIZES.density
    # a few different decoder layers over and over: far more than the cache holds all the same
    distinct = min(4, SIZES.depth)
    for model, layer in SIZES.models.items():
        shapes = [*layer] * distinct
        packs = make_packs(shapes, density, 2)
        mix = make_mix(make_slab(shapes, packs, batch), packs, batch, batch)
        weights = [random_nf4(shape) for shape in shapes]
        dense = [dequantised(*weight) for weight in weights]
        bases: dict[str, Callable[[int], torch.Tensor]] = {
            "bfloat16": lambda i, mix=mix, dense=dense: mix.xs[i] @ dense[i].t(),
            "NF4, ours": lambda i, mix=mix, weights=weights: fused(mix.xs[i], weights[i]),
        }
        if bitsandbytes:
            bases["NF4, bitsandbytes"] = lambda i, mix=mix, weights=weights: bnb(
                mix.xs[i], weights[i]
            )
        for name, base in bases.items():
            sides = {
                "base": partial(run_stack, base, mix, rounds=SIZES.depth // distinct, mixed=False),
                "mixed": partial(run_stack, base, mix, rounds=SIZES.depth // distinct, mixed=True),
            }
            us = clock().compare(sides, repeat=1)
            yield {
                "model": model,
                "base weights": name,
                "batch": batch,
                "density %": 100 * density,
                "base us": us["base"],
                "mixed us": us["mixed"],
                "rate kept": us["base"] / us["mixed"],
            }


def run_stack(base: Callable[[int], torch.Tensor], mix: Mix, *, rounds: int, mixed: bool) -> None:
    for _ in range(rounds):
        for i, layer in enumerate(mix.layers):
            y = base(i)
            if mixed:
                add_gathered(y, mix.xs[i], layer, mix.groups)


def fused(x: torch.Tensor, weight: tuple[torch.Tensor, Any]) -> torch.Tensor:
    return nf4_matmul(x, weight[0], quant_state=weight[1])


def bnb(x: torch.Tensor, weight: tuple[torch.Tensor, Any]) -> torch.Tensor:
    return bitsandbytes.matmul_4bit(x, weight[0], weight[1])


def alternatives() -> Iterator[Row]:
    """Gather against other ways to serve a mix: CSR products, merged weights, grouped LoRA."""
    batch, density = SIZES.batch, SIZES.density
    for shape in SIZES.shapes:
        packs = make_packs([shape], density, 2)
        slab = make_slab([shape], packs, SIZES.adapters[-1])
        for adapters in (a for a in SIZES.adapters if a <= batch):
            mix = make_mix(slab, packs, batch, adapters)
            x, y, share = mix.xs[0], mix.ys[0], batch // adapters
            rank = max(1, round(density * shape[0] * shape[1] / sum(shape)))
            down = torch.randn(adapters, shape[1], rank, device=DEVICE, dtype=BF16)
            up = torch.randn(adapters, rank, shape[0], device=DEVICE, dtype=BF16)
            merged = torch.randn(adapters, *shape[::-1], device=DEVICE, dtype=BF16)
            deltas = [as_csr(random_delta(shape, density, n)) for n in range(adapters)]
            by_adapter = (x.view(adapters, share, -1), y.view(adapters, share, -1))
            sides = {
                "gather": partial(mix.gather, 0),
                "torch CSR": partial(add_csr, *by_adapter, deltas),
                "grouped LoRA": partial(add_lora, *by_adapter, down, up),
                "merged weights": partial(torch.bmm, by_adapter[0], merged),
            }
            us = clock().compare(sides, eager=["torch CSR"], repeat=2)
            times = {f"{name} us": value for name, value in us.items()}
            yield {"layer": str(shape), "adapters": adapters, "LoRA rank": rank, **times}


def as_csr(delta: SparseDelta) -> torch.Tensor:
    parts = (delta.row_starts, delta.columns.int(), delta.values)
    return torch.sparse_csr_tensor(*parts, size=delta.shape, check_invariants=True).to(DEVICE)


def add_csr(x: torch.Tensor, y: torch.Tensor, deltas: Sequence[torch.Tensor]) -> None:
    for x_own, y_own, delta in zip(x, y, deltas, strict=True):
        y_own.add_((delta @ x_own.t()).t())


def add_lora(x: torch.Tensor, y: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> None:
    y.baddbmm_(torch.bmm(x, down), up)


def crossovers() -> Iterator[Row]:
    """One adapter's segment: entry by entry (gather) or written out densely (scatter)."""
    for shape in SIZES.shapes:
        for density in (SIZES.density, SIZES.high):
            packs = make_packs([shape], density, 1)
            slab = make_slab([shape], packs, 1)
            layer = slab.layer("0")
            place = {"memory": layer.memory, "table": layer.table, "dtype": layer.dtype}
            for tokens in SIZES.segments:
                mix = make_mix(slab, packs, tokens, 1)
                whole = [(0, slice(0, tokens))]
                sides = {
                    "gather": partial(mix.gather, 0),
                    "scatter": partial(
                        scatter_matmul, mix.ys[0], mix.xs[0], segments=whole, **place
                    ),
                }
                us = clock().compare(sides, repeat=3)
                yield {
                    "layer": str(shape),
                    "density %": 100 * density,
                    "tokens": tokens,
                    "gather us": us["gather"],
                    "scatter us": us["scatter"],
                    "gather / scatter": us["gather"] / us["scatter"],
                }


def training_steps() -> Iterator[Row]:
    """A training step's products on the support against dense and CSR ones."""
    for shape in SIZES.shapes:
        for density in (SIZES.density, SIZES.high):
            delta = random_delta(shape, density, 0)
            support, flat = support_of(delta), delta.rows().to(DEVICE) * shape[1]
            flat += support["columns"]
            turned = transpose_support(**support, width=shape[1])
            for dtype in (torch.float32, BF16):
                values = delta.values.to(DEVICE, dtype)
                dense, csr = delta.dense(dtype).to(DEVICE), as_csr(delta).to(dtype)
                for tokens in SIZES.training:
                    x = torch.randn(shape[1], tokens, device=DEVICE, dtype=dtype)
                    dy = torch.randn(shape[0], tokens, device=DEVICE, dtype=dtype)
                    back = {"row_starts": turned[0], "columns": turned[1]}
                    turned_values = values[turned[2]]
                    sides = {
                        "sampled": partial(sampled_product, dy, x, **support),
                        "dense dW": lambda dy=dy, x=x, flat=flat: (dy @ x.t()).view(-1)[flat],
                        "product": partial(product, x, values, **support),
                        "dense product": partial(torch.mm, dense, x),
                        "CSR product": partial(torch.mm, csr, x),
                        "transposed": partial(product, dy, turned_values, **back),
                        "turning": partial(transpose_support, **support, width=shape[1]),
                    }
                    us = clock().compare(sides, eager=["CSR product"], repeat=2)
                    case = {"layer": str(shape), "density %": 100 * density, "tokens": tokens}
                    times = {f"{name} us": value for name, value in us.items()}
                    yield case | {"dtype": str(dtype).removeprefix("torch.")} | times


def few_tokens() -> Iterator[Row]:
    """NF4 products of few tokens."""
    for shape in dict.fromkeys(s for layer in SIZES.models.values() for s in layer):
        weight = random_nf4(shape)
        dense = dequantised(*weight)
        for tokens in SIZES.few:
            x = torch.randn(tokens, shape[1], device=DEVICE, dtype=BF16)
            sides: dict[str, Work] = {
                "ours": partial(fused, x, weight),
                "bfloat16": partial(torch.mm, x, dense.t()),
            }
            if bitsandbytes:
                sides["bitsandbytes"] = partial(bnb, x, weight)
            us = clock().compare(sides)
            theirs = us.get("bitsandbytes")
            yield {
                "layer": str(shape),
                "tokens": tokens,
                "ours us": us["ours"],
                "bitsandbytes us": theirs,
                "bfloat16 us": us["bfloat16"],
                "bitsandbytes / ours": theirs and theirs / us["ours"],
            }


def swaps() -> Iterator[Row]:
    """Put an adapter of a whole model from pinned memory into the slab, against a plain copy."""
    for model, layer in SIZES.models.items():
        deltas = {i: random_delta(shape, SIZES.density, i) for i, shape in enumerate(layer)}
        shapes = {f"{n}.{i}": shape for n in range(SIZES.depth) for i, shape in enumerate(layer)}
        adapter = Adapter(INFO, {f"{n}.{i}": deltas[i] for n in range(SIZES.depth) for i in deltas})
        packed = pack(adapter, BF16)
        slab = Slab(shapes, slots=2, budget=2 * packed.nbytes, dtype=BF16, device=DEVICE)
        target = torch.empty_like(packed.memory, device=DEVICE)
        puts, copies = [], []
        for _ in range(ROUNDS + 1):  # the first warms up
            slot: list[int] = []
            puts.append(wall(lambda: slot.append(slab.put(packed))))  # noqa: B023
            slab.remove(slot[0])
            copies.append(wall(lambda: link_copy(target, packed.memory)))  # noqa: B023
        put, copy = statistics.median(puts[1:]), statistics.median(copies[1:])
        yield {
            "model": model,
            "density %": 100 * SIZES.density,
            "MB": packed.nbytes / 1e6,
            "put ms": put / 1e3,
            "copy ms": copy / 1e3,
            "link GB/s": packed.nbytes / copy / 1e3,
            "of link": copy / put,
        }


def link_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
    if not SMOKE:
        torch.cuda.synchronize()


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "gather": gathers,
    "alternatives": alternatives,
    "crossover": crossovers,
    "training": training_steps,
    "swap": swaps,
    "stack": stacks,
    "nf4": few_tokens,
}


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write; by default named for the GPU")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, without CUDA")
    arguments = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        sys.exit("expected a CUDA device, got none; --smoke runs at toy size without one")
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    begin = time.monotonic()
    report: dict[str, Any] = {"machine": machine(), "errors": check(), "sections": {}}
    slug = re.sub(r"\W+", "-", report["machine"]["gpu"].lower()).strip("-")
    out = arguments.out or Path(__file__).parent / "results" / f"gpu-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    print(*(f"{key}: {value}" for key, value in report["machine"].items()), sep="\n")
    for name, section in SECTIONS.items():
        rows, note = collect(section, late=time.monotonic() - begin > TIME_LIMIT)
        report["sections"][name] = {"rows": rows, "note": note}
        report["seconds"] = round(time.monotonic() - begin)
        out.write_text(json.dumps(report, indent=1) + "\n")
        show(f"{section.__doc__}", rows, note)
    print(json.dumps(summary(report)))


def collect(section: Callable[[], Iterator[Row]], *, late: bool) -> tuple[list[Row], str]:
    """Return a section's rows and what kept it from having more of them."""
    rows: list[Row] = []
    if late:
        return rows, "left out: no time"
    try:
        rows.extend(section())
    except (RuntimeError, TritonError) as error:  # of memory, or an operation this machine lacks
        return rows, f"stopped: {error}"
    finally:
        gc.collect()  # graphs and what they hold
        torch.cuda.empty_cache()
    return rows, ""


def machine() -> dict[str, str]:
    """Say on what it is measured."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": "interpreter" if SMOKE else torch.cuda.get_device_name(DEVICE),
        "driver": "none" if SMOKE else subprocess.check_output(query, text=True).strip(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bitsandbytes": bitsandbytes.__version__ if bitsandbytes else "none",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def show(title: str, rows: Sequence[Row], note: str) -> None:
    """Print a section as a table."""
    table = Table(*(rows[0] if rows else ()), title=title, caption=note or None)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console(width=140)
    console.print(table if rows else f"{title}\n{note}")


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one would quote."""
    rows = {name: section["rows"] for name, section in report["sections"].items()}
    return {
        "gpu": report["machine"]["gpu"],
        "gather_best_of_copy": max((round(r["of copy"], 3) for r in rows["gather"]), default=None),
        "mixed_rate_kept": {
            f"{r['model']}, {r['base weights']}": round(r["rate kept"], 3) for r in rows["stack"]
        },
        "scatter_faster_at": faster(rows["crossover"], "gather / scatter"),
        "nf4_faster_at": faster(rows["nf4"], "bitsandbytes / ours"),
        "swap_of_link": {r["model"]: round(r["of link"], 3) for r in rows["swap"]},
        "incomplete": [n for n, section in report["sections"].items() if section["note"]],
        "seconds": report["seconds"],
    }


def faster(rows: Sequence[Row], ratio: str) -> dict[str, list[Any]]:
    """Return by case the numbers of tokens at which a ratio is above 1."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        density = f", {row['density %']:g} %" if "density %" in row else ""
        if isinstance(value := row[ratio], float) and value > 1:
            found.setdefault(f"{row['layer']}{density}", []).append(row["tokens"])
    return found


if __name__ == "__main__":
    main()
