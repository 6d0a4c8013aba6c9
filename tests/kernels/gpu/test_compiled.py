"""Every kernel compiles as shipped, with its work in registers and its tiles in shared memory."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spieldose_kernels import gpu

ARCHITECTURES = {80, 90, 100}
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may have

Builds = list[dict[str, Any]]


@pytest.fixture(scope="module")
def builds() -> Builds:
    """What `compile_kernels.py` prints; in a process of its own, as it needs no interpreter."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_architecture(builds: Builds) -> None:
    compiled = {(build["kernel"], build["architecture"]) for build in builds}
    assert compiled == {(kernel, a) for kernel in kernels() for a in ARCHITECTURES}


def test_no_kernel_spills(builds: Builds) -> None:
    assert [b for b in builds if b["stack_bytes"] or b["local_bytes"]] == []


def test_every_kernel_fits_into_shared_memory(builds: Builds) -> None:
    assert [b for b in builds if b["shared_bytes"] > SHARED_LIMIT[b["architecture"]]] == []


def kernels() -> set[str]:
    """Return the names of the package's kernels, which end alike."""
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(gpu.__path__, "spieldose_kernels.gpu.")
    ]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}
