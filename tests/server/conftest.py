"""A whole server with four adapters, on a real socket, in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spieldose_kernels.delta_file import write_delta

from ..conftest import Running


@pytest.fixture
def running(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Iterator[Running]:
    """A server with the adapters a1 to a4."""
    directory = tmp_path / "adapters"
    directory.mkdir()
    for seed in range(1, 5):
        write_delta(directory / f"a{seed}.safetensors", make_adapter(seed))
    yield from serve_tiny(directory, max_batch_tokens=64)
