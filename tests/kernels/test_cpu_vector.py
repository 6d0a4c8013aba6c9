"""The compiled building blocks are what their docstrings say, vector by vector."""

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest
import torch

from spieldose_kernels.cpu import team
from spieldose_kernels.cpu.bfloat16 import narrow, widen
from spieldose_kernels.cpu.team import WORTH_A_TEAM, Work, array_at, threads_for
from spieldose_kernels.cpu.vector import (
    BLOCK,
    LANES,
    add_block,
    dot_lanes,
    dot_tokens,
    load_block,
)

# numba's cache knows this file's age, not that of the functions under test
uncached = numba.njit
Array = np.ndarray[Any, np.dtype[Any]]
FLOATS = [torch.float32, torch.bfloat16]
INTEGERS = [np.uint16, np.int32]

# --- bfloat16 ------------------------------------------------------------------------------------


def test_every_bfloat16_widens_to_the_float32_it_is() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    wide = torch.from_numpy(widen_all(bits.numpy().view(np.uint16)))
    assert torch.equal(wide.view(torch.int32), bits.view(torch.bfloat16).float().view(torch.int32))


def test_every_bfloat16_comes_back_from_float32() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    assert np.array_equal(narrow_all(widen_all(bits), bits), bits)


def test_float32_narrows_as_pytorch_rounds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=generator)
    ties = torch.arange(-(1 << 15), 1 << 15) * (1 << 16) + (1 << 15)  # half way, every one
    values = torch.cat([bits, ties, ties - 1, ties + 1]).int().view(torch.float32)
    values = values[~values.isnan()]
    got = torch.from_numpy(narrow_all(values.numpy(), np.empty(0, np.uint16)).view(np.int16))
    assert torch.equal(got, values.bfloat16().view(torch.int16))


def test_nan_narrows_to_nan() -> None:
    values = torch.tensor([float("nan"), -float("nan"), float("inf") - float("inf")])
    got = torch.from_numpy(narrow_all(values.numpy(), np.empty(0, np.uint16)).view(np.int16))
    assert got.view(torch.bfloat16).isnan().all()


def test_float32_passes_both_ways_unchanged() -> None:
    values = random(100)
    assert np.array_equal(widen_all(values), values)
    assert np.array_equal(narrow_all(values, values), values)


@uncached
def widen_all(numbers):
    out = np.empty(numbers.size, np.float32)
    for i in range(numbers.size):
        out[i] = widen(numbers[i])
    return out


@uncached
def narrow_all(values, like):
    zero = like.dtype.type(0)
    out = np.empty(values.size, like.dtype)
    for i in range(values.size):
        out[i] = narrow(values[i], zero)
    return out


# --- vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(0, 5), (1, 4), (2, 3), (4, 5), (3, 3)])
@pytest.mark.parametrize("columns", INTEGERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_lanes_product_sums_its_own_entries_of_the_vectors_asked_for(
    dtype: torch.dtype, columns: type, first: int, last: int
) -> None:
    values, bits = rounded(random(5, LANES), dtype)
    source = random(1 << 16)
    taken = integers(5, LANES, below=1 << 16).astype(columns)
    taken[1, 0], taken[2, LANES - 1] = 0, (1 << 16) - 1
    out = np.full(LANES, np.nan, np.float32)
    call_dot_lanes(bits, taken, source, first, last, out)
    expected = (values * source[taken].astype(float))[first:last].sum(0)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("first", "step", "count"), [(0, 1, 80), (16, 1, 16), (7, LANES, 5), (15, LANES, 1), (3, 1, 0)]
)
@pytest.mark.parametrize("columns", INTEGERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_rows_product_sums_the_entries_asked_for_in_every_token(
    dtype: torch.dtype, columns: type, first: int, step: int, count: int
) -> None:
    values, bits = rounded(random(5 * LANES), dtype)
    tile = random(1 << 16, BLOCK)
    taken = integers(5 * LANES, below=1 << 16).astype(columns)
    taken[first] = (1 << 16) - 1
    out = np.full(BLOCK, np.nan, np.float32)
    call_dot_tokens(bits, taken, tile, first, step, count, out)
    entries = first + step * np.arange(count)
    expected = values[entries] @ tile[taken[entries]].astype(float)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [0, LANES, 3 * LANES])
@pytest.mark.parametrize("c", [0, 5, 21])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_block_of_activations_is_turned_into_its_place_in_the_tile(
    dtype: torch.dtype, c: int, t: int
) -> None:
    values, bits = rounded(random(100, 37), dtype)
    tokens = integers(BLOCK, below=100).astype(np.int32)
    tile = np.full((37, BLOCK), np.nan, np.float32)
    call_load_block(bits, tokens, t, c, tile)
    expected = np.full_like(tile, np.nan)
    expected[c : c + LANES, t : t + LANES] = values[tokens[t : t + LANES], c : c + LANES].T
    np.testing.assert_array_equal(tile, expected)


@pytest.mark.parametrize("t", [0, LANES, 3 * LANES])
@pytest.mark.parametrize("r", [0, 5, 21])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_block_of_sums_is_added_to_its_tokens_rows_and_to_nothing_else(
    dtype: torch.dtype, r: int, t: int
) -> None:
    values, bits = rounded(random(100, 37), dtype)
    tokens = np.random.default_rng(0).permutation(100)[:BLOCK].astype(np.int32)
    sums = random(37, BLOCK)
    expected = values.astype(np.float32)
    expected[tokens[t : t + LANES], r : r + LANES] += sums[r : r + LANES, t : t + LANES].T
    call_add_block(sums, bits, tokens, t, r)
    np.testing.assert_array_equal(bits, rounded(expected, dtype)[1])


@uncached
def call_dot_lanes(values, columns, source, first, last, out):
    dot_lanes(values, columns, source, first, last, out)


@uncached
def call_dot_tokens(values, columns, tile, first, step, count, out):
    dot_tokens(values, columns, tile, first, step, count, out)


@uncached
def call_load_block(x, tokens, t, c, tile):
    load_block(x, tokens, t, c, tile)


@uncached
def call_add_block(sums, y, tokens, t, r):
    add_block(sums, y, tokens, t, r)


# --- team ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not team._SHARED, reason="PyTorch's OpenMP is not GNU's: one thread works")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_thread_of_the_team_runs_the_work_once(threads: int) -> None:
    seen = np.zeros((8, 2), np.int64)
    Work(note_thread, 2)(seen.ctypes.data, 7, threads=threads)
    assert seen[:threads].tolist() == [[threads, 7]] * threads
    assert not seen[threads:].any()


def test_without_a_shared_runtime_one_thread_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_SHARED", False)
    seen = np.zeros((8, 2), np.int64)
    Work(note_thread, 2)(seen.ctypes.data, 7, threads=2)
    assert seen[0].tolist() == [1, 7]
    assert not seen[1:].any()


def test_arguments_are_whole_int64() -> None:
    seen = np.zeros((8, 2), np.int64)
    for number in (-1, 1 << 40, -(1 << 63), (1 << 63) - 1):
        Work(note_thread, 2)(seen.ctypes.data, number, threads=1)
        assert seen[0, 1] == number


def test_only_work_that_is_worth_it_gets_pytorchs_threads(two_threads: None) -> None:
    assert threads_for(WORTH_A_TEAM - 1) == threads_for(1) == 1
    assert threads_for(WORTH_A_TEAM) == threads_for(1 << 40) == 2


def note_thread(arguments, thread, threads):
    """Count the team and note the second argument, in the thread's own line of [8, 2] int64."""
    seen = numba.carray(array_at(arguments[0]), (8, 2), np.int64)
    seen[thread, 0] += threads
    seen[thread, 1] = arguments[1]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Have PyTorch use two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def integers(*shape: int, below: int) -> Array:
    return np.random.default_rng(sum(shape)).integers(0, below, shape)


def rounded(values: Array, dtype: torch.dtype) -> tuple[Array, Array]:
    """Return values rounded to a dtype, as float64 and as compiled code takes them."""
    tensor = torch.from_numpy(values).to(dtype)
    bits = tensor.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else None
    return tensor.double().numpy(), tensor.numpy().copy() if bits is None else bits
