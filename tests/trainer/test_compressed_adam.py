"""SGC step by step against a dense float64 run, its state in bytes, and its restart."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from spieldose_trainer.errors import ConfigError
from spieldose_trainer.selectors.largest_deltas import LargestDeltas
from spieldose_trainer.updaters.compressed_adam import CompressedAdam
from spieldose_trainer.updaters.compression import Compression

from .dense_sgc import DenseRun

# four times `kept` is a whole chunk: any number of passes gathers the exact gradient
MESGC = Compression(chunk=16, kept=4, measurements=14)  # 120 weights: half a chunk of padding
CESGC = Compression(chunk=8, kept=2, measurements=7, rank=2, refresh=8)


@pytest.mark.parametrize("compression", [MESGC, CESGC], ids=["MESGC", "CESGC"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 2.0])
def test_twenty_updates_follow_a_dense_float64_run(
    make_toy: Callable[..., Any], compression: Compression, accumulation: int, weight_decay: float
) -> None:
    toy = compressed(make_toy(accumulation=accumulation), compression, weight_decay=weight_decay)
    for layer in toy.layers.values():  # of values that are equal anyone may be evicted
        layer.values.data.normal_(std=0.02, generator=torch.Generator().manual_seed(8))
    dense = DenseRun(toy, compression)
    replaced = evicted = 0.0
    for number in range(1, 21):
        replaced += toy.update(number)
        dense.update(number)
        evicted += dense.evicted
        for name, layer in toy.layers.items():
            on = torch.from_numpy(dense.support[name]).flatten().nonzero().flatten()
            assert toy.positions(name).tolist() == on.tolist(), f"update {number}, {name}"
            values = toy.dense(name, layer.values).double().numpy()
            torch.testing.assert_close(values, dense.deltas[name], rtol=1e-4, atol=1e-6)
    assert toy.selector._evicted == pytest.approx(evicted, rel=1e-3)
    assert replaced > 20  # of 43 entries
    assert dense.clamped > 5


@pytest.mark.parametrize("shape", [(64, 48), (64, 96), (30, 50)])
@pytest.mark.parametrize("chunk", [256, 1024])
def test_the_state_is_2k_floats_per_chunk_whatever_its_size(
    make_trainable: Callable[..., Any], shape: tuple[int, int], chunk: int
) -> None:
    layer = make_trainable(torch.arange(9), shape=shape)
    compression = Compression(chunk=chunk, measurements=20)
    updater = CompressedAdam({"a": layer}, lr=0.1, compression=compression)
    show(updater, "a", *drawn(shape))
    updater.step()
    entries = [e for e in updater.state[layer.values].values() if isinstance(e, torch.Tensor)]
    chunks = -(-shape[0] * shape[1] // chunk)
    assert sum(e.nbytes for e in entries) == chunks * 2 * 20 * 4
    assert updater.sketch.matrix.nbytes == 20 * chunk * 4  # shared, whatever the layers


def test_the_state_of_a_projected_gradient_is_2k_floats_per_chunk_and_the_projection(
    make_trainable: Callable[..., Any],
) -> None:
    shape, compression = (64, 96), Compression(chunk=128, measurements=20, rank=4)
    layer = make_trainable(torch.arange(9), shape=shape)
    updater = CompressedAdam({"a": layer}, lr=0.1, compression=compression)
    show(updater, "a", *drawn(shape))
    updater.step()
    entries = [e for e in updater.state[layer.values].values() if isinstance(e, torch.Tensor)]
    assert sum(e.nbytes for e in entries) == (4 * 96 // 128 * 2 * 20 + 64 * 4) * 4


def test_the_first_step_is_the_learning_rate_against_the_largest_of_each_chunk(
    make_trainable: Callable[..., Any],
) -> None:
    updater, x, dy = single(make_trainable, Compression(chunk=16, kept=2, measurements=14))
    show(updater, "a", x, dy)
    updater.step()
    gradient = (dy @ x.t()).view(-1, 16)
    largest = gradient.abs().topk(2).indices + 16 * torch.arange(len(gradient))[:, None]
    positions, change = updater.changes["a"]
    assert positions.tolist() == sorted(largest.flatten().tolist())
    expected = -0.1 * gradient.flatten()[positions].sign()
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=0)


def test_passes_of_an_update_count_as_one_gradient(make_trainable: Callable[..., Any]) -> None:
    whole, x, dy = single(make_trainable, MESGC)
    parts, _, _ = single(make_trainable, MESGC)
    show(whole, "a", x, dy)
    for x_part, dy_part in zip(x.chunk(2, 1), dy.chunk(2, 1), strict=True):
        show(parts, "a", x_part, dy_part)
    whole.step()
    parts.step()
    for one, other in zip(whole.changes["a"], parts.changes["a"], strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_moves_in_the_padding_of_the_last_chunk(
    make_trainable: Callable[..., Any],
) -> None:
    shape = (5, 7)
    layer = make_trainable(torch.arange(3), shape=shape)
    compression = Compression(chunk=32, kept=8, measurements=10)  # most of what it finds is wrong
    updater = CompressedAdam({"a": layer}, lr=0.1, compression=compression)
    for seed in range(5):
        show(updater, "a", *drawn(shape, seed=seed))
        updater.step()
        assert int(updater.changes["a"][0].max()) < 35


def test_what_a_lifted_step_leaves_out_is_counted(make_trainable: Callable[..., Any]) -> None:
    updater, x, dy = single(make_trainable, dataclasses.replace(CESGC, kept=1), entries=2)
    show(updater, "a", x, dy)
    updater.step()
    change = updater.changes["a"][1]
    assert change.numel() <= 6
    whole = 3 * 0.1**2  # the first step is lr at one entry of each of 3 chunks; P keeps its length
    assert updater.omitted["a"] == pytest.approx(whole - float(change.square().sum()), rel=1e-3)
    assert 0.1 * whole < updater.omitted["a"] < whole


@pytest.mark.parametrize("compression", [MESGC, CESGC], ids=["MESGC", "CESGC"])
def test_a_gradient_of_zeros_moves_nothing(
    make_trainable: Callable[..., Any], compression: Compression
) -> None:
    updater, x, dy = single(make_trainable, compression)
    show(updater, "a", x, 0 * dy)
    updater.step()
    assert [entries.numel() for entries in updater.changes["a"]] == [0, 0]
    assert updater.omitted["a"] == 0.0


def test_a_layer_that_was_not_watched_stays(make_trainable: Callable[..., Any]) -> None:
    layers = {name: make_trainable(torch.arange(3), shape=(4, 8)) for name in "ab"}
    for layer in layers.values():
        layer.values.data.fill_(1.0)
    updater = CompressedAdam(layers, lr=0.1, compression=MESGC, weight_decay=1.0)
    show(updater, "a", *drawn((4, 8)))
    updater.step()
    assert set(updater.changes) == {"a"}
    assert layers["a"].values.tolist() == pytest.approx([0.9] * 3)
    assert layers["b"].values.tolist() == [1.0] * 3


def test_moments_start_anew_with_every_projection(make_trainable: Callable[..., Any]) -> None:
    updater, x, dy = single(make_trainable, CESGC)
    state = updater.state[updater.layers["a"].values]
    ages, projections = [], []
    for _ in range(10):
        show(updater, "a", x, dy)
        show(updater, "a", dy.new_ones(x.shape), dy)  # a second pass never renews it
        updater.step()
        ages.append(state["updates"])
        projections.append(state["projection"])
        x, dy = x.roll(1, 1), -dy
    assert ages == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    assert all(one is projections[0] for one in projections[:8])
    assert all(one is projections[8] for one in projections[8:])
    assert projections[0] is not projections[8]


@pytest.mark.parametrize("compression", [MESGC, CESGC], ids=["MESGC", "CESGC"])
def test_a_run_restored_from_its_state_goes_on_bit_for_bit(
    make_toy: Callable[..., Any], compression: Compression
) -> None:
    whole, broken = (compressed(make_toy(), compression) for _ in range(2))
    for number in range(1, 7):
        whole.update(number)
        broken.update(number)
    moments = copy.deepcopy(broken.updater.state_dict())
    evictions = broken.selector.state_dict()
    compressed(broken, compression, lr=9.0)
    broken.updater.load_state_dict(moments)
    broken.selector.load_state_dict(evictions)
    for number in range(7, 13):  # CESGC's projection is renewed in update 9
        assert whole.update(number) == broken.update(number)
        assert whole.selector.lost == broken.selector.lost
        for name in whole.layers:
            assert torch.equal(whole.positions(name), broken.positions(name))
            assert torch.equal(whole.layers[name].values, broken.layers[name].values)
    assert whole.selector.lost_over_run == broken.selector.lost_over_run


def test_a_restored_state_is_float32_under_bfloat16_values(
    make_trainable: Callable[..., Any],
) -> None:
    updater, x, dy = single(make_trainable, CESGC, dtype=torch.bfloat16)
    show(updater, "a", x.bfloat16(), dy.bfloat16())
    updater.step()
    restored, _, _ = single(make_trainable, CESGC, dtype=torch.bfloat16)
    restored.load_state_dict(updater.state_dict())
    state = updater.state[updater.layers["a"].values]
    again = restored.state[restored.layers["a"].values]
    for name in ("p", "q", "projection"):
        assert torch.equal(state[name], again[name])
        assert again[name].dtype == torch.float32


def test_a_state_of_another_compression_is_refused(make_trainable: Callable[..., Any]) -> None:
    updater, _, _ = single(make_trainable, MESGC)
    other, _, _ = single(make_trainable, CESGC)
    with pytest.raises(ConfigError, match=r"expected an optimizer state .*'rank': 2"):
        other.load_state_dict(updater.state_dict())


def test_betas_that_bound_no_step_are_refused(make_trainable: Callable[..., Any]) -> None:
    layer = make_trainable(torch.arange(3), shape=(4, 8))
    with pytest.raises(ConfigError, match="beta1² < beta2 < 1"):
        CompressedAdam({"a": layer}, lr=0.1, compression=MESGC, betas=(0.9, 0.5))


@pytest.mark.parametrize("compression", [MESGC, CESGC], ids=["MESGC", "CESGC"])
def test_a_run_lowers_the_loss(make_toy: Callable[..., Any], compression: Compression) -> None:
    toy = compressed(make_toy(), compression, lr=0.03)
    x, target = next(toy.batches(1))
    toy.batches = lambda update: iter([(x, target)])
    losses = []
    for number in range(1, 61):
        losses.append(float(toy.loss(toy.product, x.float(), target.float()).detach()))
        toy.update(number)
    assert losses[-1] < 0.6 * losses[0]


def test_a_step_returns_the_closures_loss(make_trainable: Callable[..., Any]) -> None:
    updater, _, _ = single(make_trainable, MESGC)
    assert updater.step(lambda: 7.0) == 7.0


def compressed(toy: Any, compression: Compression, **settings: Any) -> Any:
    """Put a toy run under CompressedAdam and LargestDeltas."""
    settings = {"lr": 1e-2} | settings
    toy.updater = CompressedAdam(toy.layers, compression=compression, **settings)
    toy.selector = LargestDeltas(toy.layers, updater=toy.updater)
    return toy


def single(
    make_trainable: Callable[..., Any],
    compression: Compression,
    *,
    entries: int = 9,
    dtype: torch.dtype = torch.float32,
) -> tuple[CompressedAdam, torch.Tensor, torch.Tensor]:
    """Make an updater over one layer, and one pass of it."""
    shape = (8, 12)
    layer = make_trainable(torch.arange(entries), shape=shape)
    layer.values.data = layer.values.data.to(dtype)
    updater = CompressedAdam({"a": layer}, lr=0.1, compression=compression)
    return updater, *drawn(shape)


def drawn(shape: tuple[int, int], *, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw x [C, 6] and dy [R, 6]."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(sum(shape), 6, generator=generator)
    return draw[: shape[1]].contiguous(), draw[shape[1] :].contiguous()


def show(updater: CompressedAdam, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
    updater.watch(name)(x, dy)
