"""The sliced form holds exactly the delta, each row in one place, in as few vectors as it can."""

from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels.cpu.vector import LANES
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.sliced import (
    ALIGNMENT,
    FIELDS,
    PackedAdapter,
    Packing,
    SlicedDelta,
    pack,
    view,
)

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [  # entries of each row, C
    pytest.param([5, 0, 3, 29, 1, 0, 0, 7] * 4 + [2], 29, id="odd"),
    pytest.param([23], 29, id="one-row"),
    pytest.param([1], 1, id="one-everything"),
    pytest.param([1, 0, 1] * 17, 1, id="one-column"),
    pytest.param([0] * 5, 7, id="no-entries"),
    pytest.param([0] * 40 + [3] + [0] * 40, 7, id="mostly-empty-rows"),
    pytest.param([0, 0, 33, 0, 1], 33, id="a-row-with-every-column"),
    pytest.param([17] * 33, 17, id="full"),
    pytest.param([2] * 16, 9, id="as-many-rows-as-lanes"),
    pytest.param([2] * 17, 9, id="one-row-more-than-lanes"),
    pytest.param([300, 2, 1, 0, 200, 3] * 3 + [1] * 40, 400, id="clustered"),
    pytest.param([16, 32, 48, 160], 160, id="rows-of-whole-vectors"),
    pytest.param([3, 0, 40_000, 1], 40_000, id="more-entries-in-a-row-than-int16-counts"),
]
EDGES = [  # shapes at the borders of uint16
    pytest.param((1 << 16, 3), torch.uint16, torch.uint16, id="most-short-rows"),
    pytest.param(((1 << 16) + 1, 3), torch.int32, torch.uint16, id="fewest-long-rows"),
    pytest.param((3, 1 << 16), torch.uint16, torch.uint16, id="most-short-columns"),
    pytest.param((3, (1 << 16) + 1), torch.uint16, torch.int32, id="fewest-long-columns"),
    pytest.param((70_000, 80_000), torch.int32, torch.int32, id="both-long"),
]
supports = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 60)), min_size=1, max_size=50)

# --- what it holds -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "width"), LENGTHS)
def test_what_is_packed_is_read_back(lengths: list[int], width: int, dtype: torch.dtype) -> None:
    delta = delta_of(lengths, width)
    sliced = slice_delta(delta, dtype)
    assert torch.equal(dense(sliced, delta.shape), delta.dense(dtype).float())
    assert_holds(sliced, delta)


@settings(deadline=None)
@given(supports, st.integers(0, 99), st.sampled_from(DTYPES))
def test_any_support_is_read_back(lengths: list[int], seed: int, dtype: torch.dtype) -> None:
    delta = delta_of(lengths, 60, seed=seed)
    sliced = slice_delta(delta, dtype)
    assert torch.equal(dense(sliced, delta.shape), delta.dense(dtype).float())
    assert_holds(sliced, delta)


@pytest.mark.parametrize(("shape", "row_dtype", "column_dtype"), EDGES)
def test_the_last_row_and_column_have_the_narrowest_type_that_names_them(
    shape: tuple[int, int], row_dtype: torch.dtype, column_dtype: torch.dtype
) -> None:
    height, width = shape
    flat = torch.tensor([0, height // 2 * width + 1, height * width - 2, height * width - 1])
    delta = SparseDelta.from_flat(flat, torch.tensor([1.0, 2.0, 3.0, 4.0]), shape=shape)
    sliced = slice_delta(delta, torch.float32)
    assert (sliced.rows.dtype, sliced.columns.dtype) == (row_dtype, column_dtype)
    assert_holds(sliced, delta)


def test_columns_may_come_as_int32_whatever_the_width() -> None:
    delta = delta_of([5, 0, 20], 29)
    same = SparseDelta(delta.row_starts, delta.columns.int(), delta.values, delta.width)
    assert_holds(slice_delta(same, torch.float32), delta)


def test_a_row_of_zeros_is_stored_like_any_other() -> None:
    delta = SparseDelta.from_flat(torch.tensor([4, 5]), torch.zeros(2), shape=(3, 4))
    sliced = slice_delta(delta, torch.float32)
    assert sliced.rows.tolist() == [1]
    assert sliced.columns[0].tolist() == [0] + [1] * (LANES - 1)
    assert not sliced.values.any()


# --- values --------------------------------------------------------------------------------------


def test_float32_values_keep_every_bit() -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, (4096,), generator=torch.Generator().manual_seed(0))
    values = bits.int().view(torch.float32)
    values = values[values.isfinite()]
    assert torch.equal(
        packed_values(values, torch.float32).view(torch.int32), values.view(torch.int32)
    )


def test_bfloat16_values_are_rounded_to_nearest_and_ties_to_even() -> None:
    one, step = 1.0, 2.0**-7  # 1's neighbour in bfloat16 is 1 + step
    values = torch.tensor([step / 2, step / 2 + 2**-20, step, 3 * step / 2, 3 * step / 2 - 2**-20])
    expected = torch.tensor([one, one + step, one + step, one + 2 * step, one + step])
    assert packed_values(one + values, torch.bfloat16).tolist() == expected.tolist()
    assert packed_values(-one - values, torch.bfloat16).tolist() == (-expected).tolist()


def test_bfloat16_values_are_pytorchs() -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, (4096,), generator=torch.Generator().manual_seed(0))
    values = bits.int().view(torch.float32)  # of every size, subnormal and huge too
    values = values[values.isfinite()]
    got = packed_values(values, torch.bfloat16)
    assert torch.equal(got.view(torch.int16), values.bfloat16().view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_bfloat16_already_stay_what_they_are(dtype: torch.dtype) -> None:
    delta = delta_of([5, 0, 20, 1], 29, dtype=torch.bfloat16)
    assert_holds(slice_delta(delta, dtype), delta)


# --- padding -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(supports, st.sampled_from(DTYPES))
def test_paddings_columns_belong_to_the_row_they_pad(
    lengths: list[int], dtype: torch.dtype
) -> None:
    delta = delta_of(lengths, 60)
    rows, columns, values = slice_delta(delta, dtype).entries()
    assert torch.isin(rows * delta.width + columns, flat_positions(delta)).all()
    assert values.count_nonzero() == delta.nnz


@settings(deadline=None)
@given(supports, st.sampled_from(DTYPES))
def test_lanes_without_a_row_name_a_column_and_hold_nothing(
    lengths: list[int], dtype: torch.dtype
) -> None:
    delta = delta_of(lengths, 60)
    sliced = slice_delta(delta, dtype)
    assert (sliced.columns.long() < delta.width).all()
    assert sliced.values.count_nonzero() == delta.nnz


# --- order and size ------------------------------------------------------------------------------


@settings(deadline=None)
@given(supports)
def test_rows_come_by_falling_length_and_equals_in_their_order(lengths: list[int]) -> None:
    sliced = slice_delta(delta_of(lengths, 60), torch.bfloat16)
    expected = [row for row in range(len(lengths)) if lengths[row]]
    assert sliced.rows.tolist() == sorted(expected, key=lambda row: (-lengths[row], row))


def test_equally_long_rows_keep_their_order_among_many() -> None:
    lengths = [1 + row % 3 for row in range(3000)]
    sliced = slice_delta(delta_of(lengths, 3), torch.bfloat16)
    assert sliced.rows.tolist() == [*range(2, 3000, 3), *range(1, 3000, 3), *range(0, 3000, 3)]


def test_empty_rows_are_not_stored() -> None:
    lengths = [0] * 1000
    lengths[7], lengths[500] = 2, 1
    delta = delta_of(lengths, 60)
    assert slice_delta(delta, torch.bfloat16).rows.tolist() == [7, 500]
    assert pack_delta(delta, torch.bfloat16).nbytes == 4 * ALIGNMENT  # one line for each array


def test_a_delta_without_entries_has_no_slices() -> None:
    delta = delta_of([0] * 9, 7)
    assert pack_delta(delta, torch.float32).records["m"][:3] == (0, 0, 0)
    assert slice_delta(delta, torch.float32).columns.shape == (0, LANES)


@settings(deadline=None)
@given(supports)
def test_the_vectors_are_the_fewest_that_any_number_of_wide_rows_allows(
    lengths: list[int],
) -> None:
    sliced = slice_delta(delta_of(lengths, 60), torch.float32)
    falling = sorted(filter(None, lengths), reverse=True)
    fewest = min(vectors(falling, wide) for wide in range(len(falling) + 1))
    assert sliced.columns.shape == sliced.values.shape == (fewest, LANES)
    assert vectors(falling, sliced.wide) == fewest


@settings(deadline=None)
@given(supports)
def test_slices_are_as_long_as_their_longest_row(lengths: list[int]) -> None:
    sliced = slice_delta(delta_of(lengths, 60), torch.float32)
    falling = sorted(filter(None, lengths), reverse=True)
    expected = [-(-length // LANES) for length in falling[: sliced.wide]]
    expected += falling[sliced.wide :: LANES]
    assert sliced.starts[0] == 0
    assert sliced.starts.diff().tolist() == expected


def test_uniform_entries_take_little_more_than_their_own_bytes() -> None:
    height = width = 4096
    generator = torch.Generator().manual_seed(0)
    flat = (torch.rand(height * width, generator=generator) < 0.01).nonzero().squeeze(1)
    delta = SparseDelta.from_flat(flat, torch.ones(flat.numel()), shape=(height, width))
    taken = pack_delta(delta, torch.bfloat16).nbytes
    assert taken <= 1.01 * (4 * delta.nnz + 4 * (height + 1))  # what compressed rows would take


# --- memory --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(supports, min_size=1, max_size=4), st.sampled_from(DTYPES))
def test_every_array_is_aligned_and_overlaps_no_other(
    modules: list[list[int]], dtype: torch.dtype
) -> None:
    deltas = {str(i): delta_of(lengths, 60, seed=i) for i, lengths in enumerate(modules)}
    packed = pack(Adapter(INFO, deltas), dtype)
    extents = []
    for module, delta in deltas.items():
        sliced = view(packed.memory, packed.records[module], shape=delta.shape, dtype=dtype)
        for offset, array in zip(packed.records[module][3:], arrays(sliced), strict=True):
            assert offset % 64 == 0
            assert array.data_ptr() == packed.memory.data_ptr() + offset or not array.numel()
            extents.append((offset, offset + array.nbytes))
    assert packed.memory.data_ptr() % 64 == packed.nbytes % 64 == 0
    ends = [*sorted(extents), (packed.nbytes, packed.nbytes)]
    assert all(0 <= start - end < ALIGNMENT for (_, end), (start, _) in pairwise(ends))


@pytest.mark.parametrize("dtype", DTYPES)
def test_modules_of_all_shapes_lie_in_one_piece(dtype: torch.dtype) -> None:
    deltas = {
        "none": delta_of([0] * 4, 7),
        "narrow": delta_of([1, 3, 0], 3),
        "wide": delta_of([300, 1, 0, 2], 70_000),
        "tall": delta_of([1, 0, 0] * 22_000, 2),
    }
    packed = pack(Adapter(INFO, deltas), dtype)
    assert list(packed.records) == list(deltas)
    for module, delta in deltas.items():
        record = packed.records[module]
        assert len(record) == FIELDS
        assert_holds(view(packed.memory, record, shape=delta.shape, dtype=dtype), delta)


def test_an_adapter_without_modules_takes_nothing() -> None:
    assert pack(Adapter(INFO, {}), torch.bfloat16).nbytes == 0


@settings(deadline=None)
@given(st.lists(supports, min_size=1, max_size=3), st.integers(1, 70), st.sampled_from(DTYPES))
def test_entries_may_come_in_any_pieces(
    modules: list[list[int]], size: int, dtype: torch.dtype
) -> None:
    deltas = {str(i): delta_of(lengths, 60, seed=i) for i, lengths in enumerate(modules)}
    row_starts = {module: delta.row_starts for module, delta in deltas.items()}
    packing = Packing(row_starts, dict.fromkeys(deltas, 60), dtype)
    for module, delta in deltas.items():
        for first in range(0, delta.nnz, size):
            packing.add_values(module, first, delta.values[first : first + size])
            packing.add_columns(module, first, delta.columns[first : first + size])
    whole = pack(Adapter(INFO, deltas), dtype)
    assert packing.packed.records == whole.records
    assert torch.equal(packing.packed.memory, whole.memory)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_adapter_is_packed_into_the_same_bytes(dtype: torch.dtype) -> None:
    delta = delta_of([5, 0, 3, 29, 1] * 9, 29)
    first, second = pack_delta(delta, dtype), pack_delta(delta, dtype)
    assert first.records == second.records
    assert torch.equal(first.memory, second.memory)


def vectors(falling: list[int], wide: int) -> int:
    """Return the vectors that rows take if so many own a slice."""
    owned = sum(-(-length // LANES) for length in falling[:wide])
    return owned + sum(falling[wide::LANES])


INFO = AdapterInfo(base_model="b", base_fingerprint="f", method="random", density=0.2)


def delta_of(
    lengths: list[int], width: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> SparseDelta:
    """Make a delta of rows so long, at random columns, no value 0 in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randperm(width, generator=generator)[:length] for length in lengths]
    flat = torch.cat([row * width + taken for row, taken in enumerate(columns)])
    values = 0.1 + torch.rand(flat.numel(), generator=generator)
    return SparseDelta.from_flat(flat, values.to(dtype), shape=(len(lengths), width))


def pack_delta(delta: SparseDelta, dtype: torch.dtype) -> PackedAdapter:
    return pack(Adapter(INFO, {"m": delta}), dtype)


def slice_delta(delta: SparseDelta, dtype: torch.dtype) -> SlicedDelta:
    packed = pack_delta(delta, dtype)
    return view(packed.memory, packed.records["m"], shape=delta.shape, dtype=dtype)


def packed_values(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of one row after packing."""
    count = values.numel()
    delta = SparseDelta.from_flat(torch.arange(count), values, shape=(1, count))
    return slice_delta(delta, dtype).entries()[2][:count]


def flat_positions(delta: SparseDelta) -> torch.Tensor:
    return delta.rows() * delta.width + delta.columns.long()


def arrays(sliced: SlicedDelta) -> list[torch.Tensor]:
    """Return starts, rows, columns and values."""
    return [getattr(sliced, field.name) for field in fields(sliced)[1:]]


def dense(sliced: SlicedDelta, shape: tuple[int, int]) -> torch.Tensor:
    """Return what the entries add up to, [R, C] float32: one stored twice counts twice."""
    rows, columns, values = sliced.entries()
    return torch.zeros(shape).index_put_((rows, columns), values.float(), accumulate=True)


def assert_holds(sliced: SlicedDelta, delta: SparseDelta) -> None:
    """Compare entry by entry, for shapes too large to be dense too."""
    rows, columns, values = sliced.entries()
    flat, real = rows * delta.width + columns, values != 0
    order = flat[real].argsort()
    assert torch.equal(flat[real][order], flat_positions(delta))
    assert torch.equal(values[real][order], delta.values.to(values.dtype))
    assert torch.isin(flat, flat_positions(delta)).all()
