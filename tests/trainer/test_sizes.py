"""Sizes told from shapes are those that real objects turn out to have."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spieldose_kernels.base import Base
from spieldose_kernels.checkpoint import target_shapes
from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import write_delta
from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.memory import tensor_bytes
from spieldose_trainer.selectors.accumulated_gradients import CANDIDATE_FACTOR, FLOOR, SPARE
from spieldose_trainer.selectors.candidates import Candidates
from spieldose_trainer.sizes import (
    base_bytes,
    candidate_bytes,
    file_bytes,
    gathered_bytes,
    moment_bytes,
)
from spieldose_trainer.updaters.adamw import SparseAdamW
from spieldose_trainer.updaters.compressed_adam import CompressedAdam
from spieldose_trainer.updaters.compression import Compression
from spieldose_trainer.updaters.sm3 import SM3
from spieldose_trainer.updaters.zeroth_order import ZerothOrder

HEIGHT, WIDTH, ENTRIES = 64, 160, 100


def test_a_quantised_base_is_as_large_as_told(tiny_directory: Path, tiny_base: Base) -> None:
    layers: Any = tiny_base.layers.values()
    states = [layer.weight.quant_state for layer in layers]
    tables = [(s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code) for s in states]
    real = tensor_bytes([list(tiny_base.model.parameters()), tables])
    config = AutoConfig.from_pretrained(tiny_directory)
    told = base_bytes(config, tiny_base.spec.shapes, dtype=torch.float32, quantised=True)
    assert told == pytest.approx(real, rel=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_is_not_quantised_is_as_large_as_its_weights(
    tiny_directory: Path, dtype: torch.dtype
) -> None:
    config, shapes = AutoConfig.from_pretrained(tiny_directory), target_shapes(tiny_directory)
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    told = base_bytes(config, shapes, dtype=dtype, quantised=False)
    assert told == weights * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_file_is_about_as_large_as_told(
    make_adapter: Callable[..., Adapter], tmp_path: Path, dtype: torch.dtype
) -> None:
    adapter = make_adapter(0)
    modules = {
        name: dataclasses.replace(delta, values=delta.values.to(dtype))
        for name, delta in adapter.modules.items()
    }
    write_delta(tmp_path / "a.safetensors", Adapter(adapter.info, modules))
    told = sum(file_bytes(n, *d.shape, d.nnz, dtype=dtype) for n, d in modules.items())
    assert told == pytest.approx((tmp_path / "a.safetensors").stat().st_size, abs=1000)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("updates", [0, 2], ids=["first update", "later"])
@pytest.mark.parametrize("normalised", [False, True])
def test_candidates_never_hold_more_than_told(updates: int, passes: int, normalised: bool) -> None:
    count = CANDIDATE_FACTOR * ENTRIES
    room = None if passes == 1 else max(SPARE * count, FLOOR)
    watcher = Candidates((HEIGHT, WIDTH), count=count, room=room, normalised=normalised)
    for _ in range(updates):
        watcher.observe(torch.randn(WIDTH, 7), torch.randn(HEIGHT, 7))
        watcher.finish_update()
    watcher.observe(torch.randn(WIDTH, 7), torch.randn(HEIGHT, 7))
    support = watcher._support
    held = tensor_bytes([watcher.positions, watcher._update, watcher._late])
    held += tensor_bytes([watcher.total, watcher.total_square])
    if support is not None:
        held += tensor_bytes([support.row_starts, support.columns])
    if watcher._norms is not None:
        held += tensor_bytes(watcher._norms.squares.values())
    told = candidate_bytes(HEIGHT, WIDTH, ENTRIES, passes=passes, normalised=normalised)
    assert held <= told
    if not updates and passes > 1:  # with one pass later updates hold more
        assert held == told


@pytest.mark.parametrize("updater", ["adamw", "sm3", "zeroth-order"])
def test_updaters_keep_as_much_as_told(
    make_trainable: Callable[..., TrainableDelta], updater: Any
) -> None:
    layer = make_trainable(torch.arange(ENTRIES), shape=(HEIGHT, WIDTH))
    layer.values.grad = torch.ones_like(layer.values)
    real: Any = {
        "adamw": lambda: SparseAdamW([layer.values], lr=1e-3),
        "sm3": lambda: SM3([layer], lr=1e-3),
        "zeroth-order": lambda: ZerothOrder([layer], lr=1e-3),
    }[updater]()
    real.step()
    assert moment_bytes(updater, HEIGHT, WIDTH, ENTRIES) == tensor_bytes(real.state.values())


@pytest.mark.parametrize("rank", [None, 16], ids=["mesgc", "cesgc"])
def test_compressed_adam_keeps_and_gathers_as_much_as_told(
    make_trainable: Callable[..., TrainableDelta], rank: int | None
) -> None:
    compression = Compression(chunk=1000, kept=4, rank=rank)
    layer = make_trainable(torch.arange(ENTRIES), shape=(HEIGHT, WIDTH))
    updater = CompressedAdam({"layer": layer}, lr=1e-3, compression=compression)
    updater.watch("layer")(torch.randn(WIDTH, 80), torch.randn(HEIGHT, 80))
    updater.step()
    told = moment_bytes("compressed-adam", HEIGHT, WIDTH, ENTRIES, compression=compression)
    assert told == tensor_bytes(updater.state.values())
    gathered = updater._gradients["layer"]
    held = tensor_bytes([gathered._positions, gathered._values])
    assert gathered_bytes(HEIGHT, WIDTH, compression) == held
