"""Compile every GPU kernel as it is shipped, and print what each takes, one JSON line a build.

No GPU is needed, but the kernels must be compiled ones: run without TRITON_INTERPRET.

A new kernel joins with one function that yields its `Case`s, named in `KERNELS` at the end.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spieldose_kernels.gpu.configs import FEW_TOKENS, MANY_TOKENS, ONE_TOKEN, SCATTER
from spieldose_kernels.gpu.gather import gather_kernel
from spieldose_kernels.gpu.nf4 import FLOAT32_TILE, TILES, nf4_kernel
from spieldose_kernels.gpu.sampled import (
    BLOCK_J,
    BLOCK_T,
    STAGES,
    WARPS,
    product_kernel,
    sampled_product_kernel,
)
from spieldose_kernels.gpu.scatter import scatter_kernel

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Case:
    """Name one build of a kernel."""

    kernel: Any  # what @triton.jit returned
    label: str  # which configuration and dtypes, for people
    types: Mapping[str, str]  # by argument: "*bf16", "i64"; ":16" says divisible by 16, as "*u8:16"
    constants: Mapping[str, Any]  # by argument, of those that are constexpr
    warps: int
    stages: int = 3  # triton's own default
    registers: int | None = None  # a thread's at most, if the launch bounds them (`maxnreg`)


def build(case: Case, architecture: int) -> dict[str, Any]:
    """Compile a case and return what it takes of a streaming multiprocessor."""
    signature, attributes = {}, {}
    assert set(case.kernel.arg_names) == case.types.keys() | case.constants.keys(), case.label
    for i, parameter in enumerate(case.kernel.params):
        kind, _, divisor = case.types.get(parameter.name, "constexpr").partition(":")
        signature[parameter.name] = kind
        if divisor:
            assert not parameter.do_not_specialize, f"a launch never knows {parameter.name}'s"
            attributes[i,] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(case.kernel, signature, dict(case.constants), attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, "maxnreg": case.registers}
    options["enable_fp_fusion"] = True
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage = resource_usage(compiled.asm["cubin"])
    return {
        "kernel": case.kernel.__name__,
        "case": case.label,
        "architecture": architecture,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],  # where spilled registers go
        "local_bytes": usage["LOCAL"],
        "shared_bytes": max(usage["SHARED"], compiled.metadata.shared),
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return what cuobjdump says of a cubin that holds one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (line,) = (line for line in text.splitlines() if "REG:" in line)
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", line)}


FLOATS = ("bf16", "fp16", "fp32")  # activations
VALUES = ("bf16", "fp32")
INDICES = (("u16", "u16"), ("i32", "i32"))  # rows, columns; the narrow with all floats


def sliced_cases(kernel: Any, configurations: set[Any], types: Mapping[str, str]) -> Iterator[Case]:
    """Yield a kernel's builds; "{}" in its types stands for the activations'."""
    floats = [(x, value, *INDICES[0]) for x in FLOATS for value in VALUES]
    indices = [("bf16", "bf16", *index) for index in INDICES[1:]]
    builds = {(c.block_vectors, c.warps, c.registers) for c in configurations}
    for block_vectors, warps, registers in builds:
        for x, value, row, column in floats + indices:
            yield Case(
                kernel,
                f"{block_vectors} vectors, {warps} warps, {x}, {value} values, {row} {column}",
                {name: kind.format(x) for name, kind in types.items()}
                | {"slice_starts": "*i32:16", "rows": f"*{row}:16"}
                | {"columns": f"*{column}:16", "values": f"*{value}:16"},
                {"BLOCK_V": block_vectors},
                warps,
                registers=registers,
            )


def gather_cases() -> Iterator[Case]:
    types = {"y": "*{}", "x": "*{}", "order": "*i32", "group_starts": "*i32", "slots": "*i32"}
    types |= {"table": "*i64", "y_stride": "i32", "x_stride": "i32"}
    yield from sliced_cases(gather_kernel, {ONE_TOKEN, FEW_TOKENS, MANY_TOKENS}, types)


def scatter_cases() -> Iterator[Case]:
    types = {"out": "*{}", "table": "*i64", "out_stride": "i32", "slot": "i32"}
    yield from sliced_cases(scatter_kernel, {SCATTER}, types)


def sampled_cases() -> Iterator[Case]:
    types = {"out_ptr": "*fp32:16", "row_starts_ptr": "*i32:16", "columns_ptr": "*i32:16"}
    sizes = {"BLOCK_J": BLOCK_J, "BLOCK_T": BLOCK_T}
    for x in FLOATS:
        types |= {"x_ptr": f"*{x}:16", "tokens": "i32:16"}
        sampled = (
            types | {"y_ptr": f"*{x}:16"} | dict.fromkeys(("entries", "height", "steps"), "i32")
        )
        yield Case(sampled_product_kernel, x, sampled, sizes, WARPS)
        for value in VALUES:
            product = types | {"values_ptr": f"*{value}:16", "tokens": "i32", "x_tokens": "i32:16"}
            label = f"{x}, {value} values"
            yield Case(product_kernel, label, product, sizes | {"STAGES": STAGES}, WARPS)


def nf4_cases() -> Iterator[Case]:
    types = {"packed_ptr": "*u8:16", "code_ptr": "*fp32:16", "offset_ptr": "*fp32:16"}
    types |= {"scales_ptr": "*u8:16", "scale_code_ptr": "*fp32:16", "outer_scales_ptr": "*fp32:16"}
    types |= {"tokens": "i32", "height": "i32:16", "width": "i32:16"}
    tiles = [(x, tile) for x in FLOATS[:2] for tile in TILES.values()]
    for x, tile in [*tiles, ("fp32", FLOAT32_TILE)]:
        constants = {"BLOCK_T": tile.tokens, "BLOCK_R": tile.rows, "BLOCK_C": tile.columns}
        constants |= {"STAGES": tile.stages, "WIDEN": False}
        pointers = {"x_ptr": f"*{x}:16", "y_ptr": f"*{x}:16"}
        yield Case(nf4_kernel, f"{x}, {tile}", types | pointers, constants, tile.warps)


KERNELS: tuple[Callable[[], Iterator[Case]], ...] = (
    gather_cases,
    scatter_cases,
    sampled_cases,
    nf4_cases,
)


if __name__ == "__main__":
    wanted = sys.argv[1:]  # kernels' names; none: all
    for cases in KERNELS:
        for case in cases():
            if not wanted or case.kernel.__name__ in wanted:
                for architecture in ARCHITECTURES:
                    print(json.dumps(build(case, architecture)), flush=True)
