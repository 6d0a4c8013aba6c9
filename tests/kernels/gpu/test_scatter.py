"""A slot's Δ is written out as it is, and multiplied for its tokens alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels.gpu.configs import SCATTER, Configuration
from spieldose_kernels.gpu.scatter import Tokens, scatter, scatter_matmul

from .conftest import (
    DEVICE,
    INTERPRETED,
    Resident,
    assert_rounded_once,
    delta_at,
    delta_of_lengths,
    empty_pages,
    random,
    random_delta,
    resident,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
VALUES = [torch.bfloat16, torch.float32]
CLUSTERED = [29, 0, 1, 2, 28] * 8


# --- written out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_entry_is_written_in_the_dtype_of_out(
    dtype: torch.dtype, values: torch.dtype
) -> None:
    held = resident([delta_of_lengths(CLUSTERED, 29, seed=1), None], values)
    assert_written(held, 0, dtype)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 29), (37, 1), (16, 16), (17, 33), (2, 3)]
)
def test_no_dimension_need_be_a_multiple_of_anything(height: int, width: int) -> None:
    everything = delta_at(range(height * width), (height, width), seed=1)
    held = resident([random_delta(height, width, seed=0), everything], torch.bfloat16)
    assert_written(held, 0)
    assert_written(held, 1)


def test_a_slice_longer_than_a_tile_is_written_whole() -> None:
    assert_written(resident([delta_of_lengths([1500, 3], 1500, seed=0)], torch.bfloat16), 0)
    assert_written(resident([delta_of_lengths([70] * 16, 90, seed=0)], torch.bfloat16), 0)


def test_fewer_programs_than_slices_still_write_all() -> None:
    held = resident([delta_of_lengths(CLUSTERED * 2, 29, seed=1)], torch.bfloat16)
    few = Configuration(block_vectors=2, programs=3, warps=1, registers=128)
    assert_written(held, 0, configuration=few)


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_each_slot_has_its_own_delta(slot: int) -> None:
    held = resident([random_delta(19, 11, seed=seed) for seed in range(3)], torch.bfloat16)
    assert_written(held, slot)


def test_an_adapter_that_leaves_the_layer_alone_writes_nothing() -> None:
    held = resident([random_delta(19, 11, seed=0), None], torch.bfloat16)
    out = torch.full((19, 11), torch.nan, device=DEVICE)
    scatter(out, **held.layer, slot=1)
    assert out.isnan().all()


def test_only_entries_are_written() -> None:
    held = resident([delta_of_lengths(CLUSTERED, 29, seed=1)], torch.bfloat16)
    out = torch.full((40, 29), torch.nan, device=DEVICE)
    scatter(out, **held.layer, slot=0)
    assert torch.equal(out.isnan(), held.dense[0] == 0)


def test_what_lies_between_strided_rows_is_not_touched() -> None:
    held = resident([delta_of_lengths(CLUSTERED, 29, seed=1)], torch.bfloat16)
    room = torch.full((40, 50), torch.nan, device=DEVICE)
    room[:, 7:36] = 0
    scatter(room[:, 7:36], **held.layer, slot=0)
    assert torch.equal(room[:, 7:36].double(), held.dense[0])
    assert room[:, [*range(7), *range(36, 50)]].isnan().all()


def test_more_rows_than_uint16_names() -> None:
    shape = ((1 << 16) + 3, 2)
    flat = [0, 1, 2 * 40_000, 2 * 65_535, 2 * 65_536 + 1, 2 * 65_538, 2 * 65_538 + 1]
    assert_written(resident([delta_at(flat, shape, seed=0)], torch.bfloat16), 0)


def test_more_columns_than_uint16_names() -> None:
    width = (1 << 16) + 3
    flat = [0, 40_000, 65_535, 65_536, width - 1, width + 65_537, 2 * width - 1]
    assert_written(resident([delta_at(flat, (3, width), seed=0)], torch.bfloat16), 0)


def test_a_row_may_lie_beyond_2_to_the_31_elements() -> None:
    stride, held = 1 << 30, resident([random_delta(3, 11, seed=0, density=0.9)], torch.bfloat16)
    out = empty_pages(2 * stride + 16, torch.bfloat16).as_strided((3, 11), (stride, 1))
    out.zero_()
    scatter(out, **held.layer, slot=0)
    assert torch.equal(out.double(), held.dense[0])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 12), unique=True), min_size=1, max_size=36))
def test_any_support_is_written(rows: list[list[int]]) -> None:
    flat = [13 * row + column for row, columns in enumerate(rows) for column in columns]
    assert_written(resident([delta_at(flat, (len(rows), 13), seed=0)], torch.bfloat16), 0)


# --- multiplied ----------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_each_segment_is_multiplied_with_its_own_delta(
    dtype: torch.dtype, values: torch.dtype
) -> None:
    held = resident([random_delta(37, 29, seed=seed) for seed in range(3)], values)
    segments = [(2, slice(0, 3)), (0, torch.tensor([9, 4, 5])), (1, slice(6, 7))]
    assert_product(held, 10, segments, dtype)


def test_a_slot_may_have_more_than_one_segment() -> None:
    held = resident([random_delta(19, 11, seed=0)], torch.bfloat16)
    assert_product(held, 5, [(0, slice(0, 2)), (0, torch.tensor([4]))])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_tokens_are_named_by_either_integer(kind: torch.dtype) -> None:
    held = resident([random_delta(19, 11, seed=0)], torch.bfloat16)
    assert_product(held, 5, [(0, torch.tensor([3, 0], dtype=kind))])


def test_a_segment_without_tokens_adds_nothing() -> None:
    held = resident([random_delta(19, 11, seed=0)], torch.bfloat16)
    assert_product(held, 3, [(0, slice(1, 1)), (0, torch.tensor([], dtype=torch.int32))])
    assert_product(held, 3, [])


def test_an_adapter_that_leaves_the_layer_alone_adds_nothing() -> None:
    held = resident([random_delta(19, 11, seed=0), None], torch.bfloat16)
    assert_product(held, 4, [(0, slice(0, 2)), (1, slice(2, 4))])


@pytest.mark.parametrize("dtype", FLOATS)
def test_other_tokens_keep_every_bit_and_leak_none(dtype: torch.dtype) -> None:
    held = resident([random_delta(19, 11, seed=seed) for seed in range(2)], torch.bfloat16)
    x, y = random(6, 11, dtype=dtype), random(6, 19, dtype=dtype)
    x[[0, 3]], y[[0, 3]] = torch.nan, torch.nan
    y.view(torch.uint8)[0, :] = 0xFE
    before = y.clone()
    multiply(y, x, held, [(0, slice(1, 3)), (1, torch.tensor([5, 4]))])
    assert torch.equal(y[[0, 3]].view(torch.uint8), before[[0, 3]].view(torch.uint8))
    assert y[[1, 2, 4, 5]].isfinite().all()


@pytest.mark.parametrize("tokens", [slice(0, 2), torch.tensor([1, 0])], ids=["slice", "index"])
@pytest.mark.parametrize(
    ("dtype", "large", "small"),
    [(torch.bfloat16, 2.0**9, 2.0**-7), (torch.float16, 2.0**12, 2.0**-10)],
)
def test_the_sum_is_rounded_once(
    dtype: torch.dtype, large: float, small: float, tokens: Tokens
) -> None:
    # y's neighbour is 4 away and the product little more than 2: rounded by itself it would be 2,
    # and the sum half way, which is rounded down
    row = delta_at(range(5), (1, 5), seed=0)
    row.values.fill_(0.5)
    y = torch.full((2, 1), large, device=DEVICE, dtype=dtype)
    x = torch.tensor([[1, 1, 1, 1, small]] * 2, device=DEVICE, dtype=dtype)
    multiply(y, x, resident([row], torch.bfloat16), [(0, tokens)])
    assert (y == large + 4).all()


# -------------------------------------------------------------------------------------------------


def assert_written(
    held: Resident,
    slot: int,
    dtype: torch.dtype = torch.float32,
    *,
    configuration: Configuration = SCATTER,
) -> None:
    out = torch.zeros(held.dense[slot].shape, dtype=dtype, device=DEVICE)
    scatter(out, **held.layer, slot=slot, configuration=configuration)
    cut = INTERPRETED and (held.layer["dtype"], dtype) == (torch.float32, torch.bfloat16)
    if cut:
        assert_rounded_once(out, held.dense[slot])
    else:
        assert torch.equal(out, held.dense[slot].to(dtype))


def assert_product(
    held: Resident,
    count: int,
    segments: list[tuple[int, Tokens]],
    dtype: torch.dtype = torch.float32,
) -> None:
    height, width = held.dense[0].shape
    x, y = random(count, width, dtype=dtype), random(count, height, dtype=dtype)
    expected = y.double()
    for slot, tokens in segments:
        written = torch.zeros(height, width, dtype=dtype, device=DEVICE)
        scatter(written, **held.layer, slot=slot)
        assert_written(held, slot, dtype)
        expected[tokens] += x[tokens].double() @ written.double().t()
    multiply(y, x, held, segments)
    assert_rounded_once(y, expected)


def multiply(
    y: torch.Tensor, x: torch.Tensor, held: Resident, segments: list[tuple[int, Tokens]]
) -> None:
    there = [(s, t if isinstance(t, slice) else t.to(DEVICE)) for s, t in segments]
    scatter_matmul(y, x, **held.layer, segments=there)
