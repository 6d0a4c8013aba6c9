"""Measure serving on the CPU with the demo's base, both sides of every ratio interleaved.

`make bench-cpu`. Prints one table and, as its last line, one JSON object of the medians; all values
go into a JSON file. Each side runs in a process of its own, one at a time: two OpenMP teams in one
process would slow each other down.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from demo_base import demo_base
from sides import Side
from spieldose_kernels.base import load_base, pick_compute_dtype
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.delta_matmul import delta_matmul
from spieldose_kernels.slab import Slab
from spieldose_kernels.sliced import pack
from spieldose_kernels.token_groups import TokenGroups
from spieldose_server.config import ServerConfig
from spieldose_server.engine import Engine
from spieldose_server.request import GenerationRequest
from spieldose_server.sampling_params import SamplingParams
from spieldose_server.threads import apart

ADAPTERS = 8
DENSITY = 0.01
PROMPT = 16  # tokens
CPU = torch.device("cpu")

# key: what is compared, and what the ratio should reach
GOALS = {
    "mixed8_over_base": ("8 requests: 8 adapters / base alone", 0.80),
    "one_over_base_b1": ("1 request: an adapter / base alone", 0.85),
    "base_over_bare": ("1 request, base alone: adapters resident / without our layers", 0.99),
    "mixed8_over_peft_lora": ("8 requests, 8 adapters: Spieldose / PEFT's LoRA", 2.0),
    "product_over_csr_loop": ("8 products: delta_matmul / torch.sparse CSR loop", 3.0),
    "prefill8_over_base": ("prefill of 8 x 256 tokens: 8 adapters / base alone", 0.80),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Measure serving on the CPU."""

    out: Path = Path("build/cpu.jsonl")  # gets every run's values, a line a benchmark


def main() -> None:
    """Measure, keep all values, print."""
    arguments = tyro.cli(Arguments)
    ratios, rates = measure(demo_base())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rounded = {what: [round(v, 4) for v in values] for what, values in (ratios | rates).items()}
    with open(arguments.out, "a") as out:
        out.write(json.dumps({"threads": torch.get_num_threads()} | rounded) + "\n")
    table = Table("what", "median", "lowest", "highest", "goal")
    for key, (what, goal) in GOALS.items():
        values = ratios[key]
        numbers = (statistics.median(values), min(values), max(values))
        table.add_row(what, *(f"{number:.2f}" for number in numbers), f">= {goal:.2f}")
    for what, values in rates.items():
        numbers = (statistics.median(values), min(values), max(values))
        table.add_row(what, *(f"{number:.1f}" for number in numbers), "")
    Console(width=120).print(table)
    print(json.dumps({key: round(statistics.median(values), 3) for key, values in ratios.items()}))


def measure(base: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the ratios by key, one per pair of neighbouring runs, and the rates behind them."""
    ratios: dict[str, list[float]] = {key: [] for key in GOALS}
    rates: dict[str, list[float]] = {}

    def rate(what: str, value: float) -> float:
        rates.setdefault(what, []).append(value)
        return value

    products = Side(Products, base)
    for _ in range(9):
        ratios["product_over_csr_loop"].append(products("csr_loop") / products("spieldose"))
        rate("dense product of 512 tokens: its time / ours", products("dense") / products("long"))
        rate("packing 32 M entries (7B at 0.5 %), seconds on one core", products("pack"))
    rate("the same, bytes an entry", products("bytes_an_entry"))
    products.close()
    ours, lora = Side(Spieldose, base), Side(PeftLora, base)
    for side in (ours, lora):
        side("generate", requests=8, adapters=8, tokens=8)
    for _ in range(9):
        alone = rate("Spieldose, base alone, tokens/s", ours("generate", requests=8, tokens=32))
        mixed = ours("generate", requests=8, adapters=8, tokens=32)
        theirs = lora("generate", requests=8, adapters=8, tokens=32)
        plain = rate("PEFT, base alone, tokens/s", lora("generate", requests=8, tokens=32))
        rate("Spieldose, 8 adapters, tokens/s", mixed)
        rate("PEFT LoRA, 8 adapters, tokens/s", theirs)
        rate("PEFT LoRA, 8 adapters / its own base", theirs / plain)
        ratios["mixed8_over_base"].append(mixed / alone)
        ratios["mixed8_over_peft_lora"].append(mixed / theirs)
    for _ in range(12):
        alone = ours("generate", requests=1, tokens=24)
        one = ours("generate", requests=1, adapters=1, tokens=24)
        ratios["one_over_base_b1"].append(one / alone)
    for _ in range(24):
        bare = ours("generate", requests=1, tokens=24, bare=True)
        ratios["base_over_bare"].append(ours("generate", requests=1, tokens=24) / bare)
    for _ in range(5):
        alone = ours("generate", requests=8, prompt=256, tokens=1)
        mixed = ours("generate", requests=8, adapters=8, prompt=256, tokens=1)
        ratios["prefill8_over_base"].append(mixed / alone)
    ours.close()
    lora.close()
    return ratios, rates


class Spieldose:
    """Run the server's engine, as `spieldose serve` does, without the network."""

    def __init__(self, base: str) -> None:
        loaded = apart(lambda: load_base(base, device=CPU, compute_dtype=DTYPE, fused=True))
        config = ServerConfig(base=base, adapters=Path(base), adapter_memory=1 << 28)
        self.engine = apart(lambda: Engine(loaded, config))
        self.engine.end_ids = frozenset()  # every request runs to its last token
        self.engine.start()
        self.slots = apart(lambda: [self._put(loaded.spec.shapes, i) for i in range(ADAPTERS)])
        self.count = 0

    def _put(self, shapes: dict[str, tuple[int, int]], seed: int) -> int:
        return self.engine.slab.put(pack(random_adapter(shapes, seed), self.engine.slab.dtype))

    def generate(
        self,
        *,
        requests: int,
        tokens: int,
        adapters: int = 0,
        prompt: int = PROMPT,
        bare: bool = False,
    ) -> float:
        """Return tokens per second; `bare` leaves all of Spieldose out of the forward pass."""
        processors = self.engine._manager.logit_processor
        processors._prepare = self.engine.record.add if bare else self.engine._prepare
        slots = [self.slots[i] if i < adapters else None for i in range(requests)]
        begin = time.perf_counter()
        asyncio.run(self._together(slots, prompt, tokens))
        return requests * tokens / (time.perf_counter() - begin)

    async def _together(self, slots: Sequence[int | None], prompt: int, tokens: int) -> None:
        await asyncio.gather(*(self._one(slot, prompt, tokens) for slot in slots))

    async def _one(self, slot: int | None, prompt: int, tokens: int) -> None:
        self.count += 1
        request = GenerationRequest(
            id=str(self.count),
            tokens=random_prompt(self.count, prompt),
            plays=b"",
            slot=slot,
            sampling=SamplingParams(),
            seed=0,
            max_tokens=tokens,
        )
        async for _ in self.engine.generate(request):
            pass


class PeftLora:
    """Run PEFT's mixed-batch LoRA with as many parameters, over the same NF4 base."""

    def __init__(self, base: str) -> None:
        loaded = load_base(base, device=CPU, compute_dtype=DTYPE, fused=True)
        # rank 3 has 0.86 times as many parameters as 1 % of the weights, rank 4 everywhere 1.15
        # times; this has 0.99 times as many
        config = LoraConfig(
            r=3,
            rank_pattern={"q_proj": 4, "o_proj": 4, "gate_proj": 4},
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(loaded.model, config, adapter_name="0")
        for i in range(1, ADAPTERS):
            self.model.add_adapter(str(i), config)
        self.model.eval()

    @torch.inference_mode()
    def generate(self, *, requests: int, tokens: int, adapters: int = 0) -> float:
        """Return tokens per second; without adapters LoRA's layers are disabled."""
        ids = torch.tensor([random_prompt(i, PROMPT) for i in range(requests)])
        arguments = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
            "do_sample": False,
        }
        begin = time.perf_counter()
        if adapters:
            self.model.generate(**arguments, adapter_names=[str(i) for i in range(adapters)])
        else:
            with self.model.disable_adapter():
                self.model.generate(**arguments)
        return requests * tokens / (time.perf_counter() - begin)


class Products:
    """Multiply one token for each of 8 adapters by every layer's delta, in float32."""

    def __init__(self, base: str) -> None:
        loaded = load_base(base, device=CPU, compute_dtype=torch.float32, fused=False)
        shapes = loaded.spec.shapes
        adapters = [random_adapter(shapes, seed) for seed in range(ADAPTERS)]
        slab = Slab(shapes, slots=ADAPTERS, budget=1 << 28, dtype=torch.float32, device=CPU)
        slots = [slab.put(pack(adapter, slab.dtype)) for adapter in adapters]
        groups = TokenGroups.of(slots, [1] * ADAPTERS, CPU)
        assert groups is not None
        self.groups = groups
        self.layers = [slab.layer(module) for module in shapes]
        self.csr = [[_csr(adapter.modules[module]) for adapter in adapters] for module in shapes]
        sizes = {size for shape in shapes.values() for size in shape}
        self.x = {size: torch.randn(ADAPTERS, size) for size in sizes}
        self.y = {size: torch.zeros(ADAPTERS, size) for size in sizes}
        self.first = self.layers[:7]
        self.long_x = {size: torch.randn(512, size) for size in sizes}
        self.long_y = {size: torch.zeros(512, size) for size in sizes}
        self.one = TokenGroups.of([0], [512], CPU)
        self.threads = torch.get_num_threads()
        self.large = _large_adapter()
        self.packed_bytes = 0  # known once packed
        self._check()

    def _check(self) -> None:
        """Refuse to time products that differ."""
        self.spieldose()
        ours = {size: y.clone() for size, y in self.y.items()}
        for y in self.y.values():
            y.zero_()
        self.csr_loop()
        for size, y in self.y.items():
            torch.testing.assert_close(ours[size], y)

    def spieldose(self) -> float:
        """Return the seconds that our product takes."""
        begin = time.perf_counter()
        for layer in self.layers:
            height, width = layer.shape
            delta_matmul(self.y[height], self.x[width], layer, self.groups)
        return time.perf_counter() - begin

    def csr_loop(self) -> float:
        """Return the seconds that torch.sparse takes, adapter by adapter."""
        begin = time.perf_counter()
        for layer, matrices in zip(self.layers, self.csr, strict=True):
            height, width = layer.shape
            for i, matrix in enumerate(matrices):
                self.y[height][i] += matrix @ self.x[width][i]
        return time.perf_counter() - begin

    def long(self) -> float:
        """Return the seconds that 512 tokens of one adapter take in the first decoder layer."""
        begin = time.perf_counter()
        for layer in self.first:
            delta_matmul(self.long_y[layer.shape[0]], self.long_x[layer.shape[1]], layer, self.one)
        return time.perf_counter() - begin

    def dense(self) -> float:
        """Return the seconds that the same takes by writing each delta out densely."""
        begin = time.perf_counter()
        for layer in self.first:
            delta = layer.delta(0)
            assert delta is not None
            rows, columns, values = delta.entries()
            weight = torch.zeros(layer.shape).index_put_((rows, columns), values, accumulate=True)
            self.long_y[layer.shape[0]].addmm_(self.long_x[layer.shape[1]], weight.t())
        return time.perf_counter() - begin

    def pack(self) -> float:
        """Return the seconds that an adapter as large as Llama-2-7B's takes to pack."""
        torch.set_num_threads(1)
        begin = time.perf_counter()
        self.packed_bytes = pack(self.large, torch.bfloat16).nbytes
        seconds = time.perf_counter() - begin
        torch.set_num_threads(self.threads)
        return seconds

    def bytes_an_entry(self) -> float:
        """Return what an entry of that adapter takes once it is packed."""
        return self.packed_bytes / self.large.nnz


def random_adapter(
    shapes: dict[str, tuple[int, int]], seed: int, *, density: float = DENSITY
) -> Adapter:
    """Make an adapter with a uniformly random support."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for module, (height, width) in shapes.items():
        count = int(density * height * width)
        positions = torch.randperm(height * width, generator=generator)[:count]
        values = 1e-4 * torch.randn(count, generator=generator)
        modules[module] = SparseDelta.from_flat(positions, values, shape=(height, width))
    info = AdapterInfo(base_model="", base_fingerprint="", method="random", density=density)
    return Adapter(info, modules)


def _large_adapter() -> Adapter:
    """Make an adapter for Llama-2-7B's layers, 0.5 %; its 32 blocks are alike."""
    block = {"q": (4096, 4096), "gate": (11008, 4096), "down": (4096, 11008)}
    one = random_adapter(block, 0, density=0.005)
    kinds = ["q", "q", "q", "q", "gate", "gate", "down"] * 32
    return Adapter(one.info, {str(i): one.modules[kind] for i, kind in enumerate(kinds)})


def random_prompt(seed: int, length: int) -> list[int]:
    """Make a prompt of tokens that end no text."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(1000, 40_000, (length,), generator=generator).tolist()
    return ids


def _csr(delta: SparseDelta) -> torch.Tensor:
    return torch.sparse_csr_tensor(
        delta.row_starts.int(), delta.columns.int(), delta.values, size=delta.shape
    )


DTYPE = pick_compute_dtype("auto", CPU)

if __name__ == "__main__":
    main()
