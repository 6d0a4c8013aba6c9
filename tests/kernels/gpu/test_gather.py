"""One launch adds every token its own adapter's Δ·x, and touches nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.gpu.configs import (
    FEW_TOKENS,
    MANY_TOKENS,
    ONE_TOKEN,
    Configuration,
    gather_configuration,
)
from spieldose_kernels.gpu.gather import gather

from .conftest import (
    DEVICE,
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
BATCHES = [  # slot of each token, negative for the base
    pytest.param([0, -1, 2, 1, -1, 0, 2], id="mixed"),
    pytest.param([0], id="one-token"),
    pytest.param([1, -1, -1, -1], id="mostly-base"),
    pytest.param([2, 1, 0], id="a-token-each"),
    pytest.param([1] * 7, id="one-slot"),
    pytest.param([0, 1] + [0] * 6, id="one-token-beside-many"),
]
# smaller than anything shipped: every loop of the kernel goes round more than once
TINY = Configuration(block_vectors=2, tokens=2, programs=12, warps=1)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_mixed_batch_is_its_float64_definition(dtype: torch.dtype, values: torch.dtype) -> None:
    assert_batch(three_adapters(37, 29, values), [0, -1, 2, 1, -1, 0, 2], dtype)


@pytest.mark.parametrize("slots", BATCHES)
def test_any_mix_of_slots_is_its_float64_definition(slots: list[int]) -> None:
    assert_batch(three_adapters(21, 13, torch.bfloat16), slots)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 29), (37, 1), (16, 16), (17, 33), (33, 47), (2, 3)]
)
def test_no_dimension_need_be_a_multiple_of_anything(height: int, width: int) -> None:
    everything = delta_at(range(height * width), (height, width), seed=1)
    held = resident([random_delta(height, width, seed=0), everything], torch.bfloat16)
    assert_batch(held, [1, 0, -1, 1])


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([0] * 40 + [1] + [0] * 9, id="one-entry"),
        pytest.param([29] * 3 + [0] * 40, id="some-rows-full-the-others-empty"),
        pytest.param([29, 0, 1, 2, 28] * 8, id="clustered"),
        pytest.param([3] * 16 + [29], id="a-full-row-beside-one-slice"),
        pytest.param(list(range(29)), id="all-lengths"),
        pytest.param([1] * 33, id="a-row-more-than-two-slices"),
    ],
)
def test_rows_of_any_lengths_are_multiplied(lengths: list[int]) -> None:
    assert_batch(resident([delta_of_lengths(lengths, 29, seed=3)], torch.bfloat16), [0, 0, -1])


@pytest.mark.parametrize(
    "configuration", [TINY, Configuration(block_vectors=4, tokens=1, programs=1, warps=1)]
)
def test_fewer_programs_than_slices_still_do_all(configuration: Configuration) -> None:
    lengths = [29, 0, 1, 2, 28] * 16
    held = resident([delta_of_lengths(lengths, 29, seed=seed) for seed in range(2)], torch.bfloat16)
    assert_batch(held, [0, 1, 1, 1, 1, 1], configuration=configuration)


@pytest.mark.parametrize("configuration", [ONE_TOKEN, FEW_TOKENS, MANY_TOKENS])
def test_every_shipped_configuration_does_any_batch(configuration: Configuration) -> None:
    held = three_adapters(9, 70, torch.bfloat16)
    assert_batch(held, [0, -1, 2, 1, 0, 0], configuration=configuration)


def test_the_configuration_follows_the_tokens_of_a_group() -> None:
    assert gather_configuration(7, 7) is ONE_TOKEN
    assert gather_configuration(8, 7) is FEW_TOKENS
    assert gather_configuration(28, 7) is FEW_TOKENS
    assert gather_configuration(29, 7) is MANY_TOKENS


def test_the_chosen_configuration_serves() -> None:
    assert_batch(three_adapters(9, 20, torch.bfloat16), [0, 1, 1], configuration=None)


def test_an_adapter_that_leaves_the_layer_alone_adds_nothing() -> None:
    held = resident([None, random_delta(19, 11, seed=0), None], torch.bfloat16)
    y = assert_batch(held, [0, 1, 2, 1, 0], dtype=torch.bfloat16)
    before = random(5, 19, dtype=torch.bfloat16)
    assert torch.equal(y[[0, 2, 4]], before[[0, 2, 4]])


def test_a_delta_without_entries_adds_nothing() -> None:
    held = resident([delta_at([], (19, 11), seed=0)], torch.bfloat16)
    y = assert_batch(held, [0, 0])
    assert torch.equal(y, random(2, 19, dtype=torch.float32))


def test_a_group_without_tokens_adds_nothing() -> None:
    held = three_adapters(19, 11, torch.bfloat16)
    x, y = random(3, 11, dtype=torch.float32), random(3, 19, dtype=torch.float32)
    expected = y.double()
    expected[1] += held.dense[2] @ x[1].double()
    launch(y, x, held, order=[1], starts=[0, 0, 1, 1], slots=[0, 2, 1])
    assert_rounded_once(y, expected)


def test_a_batch_without_groups_stays_as_it_is() -> None:
    held = three_adapters(19, 11, torch.bfloat16)
    y = random(3, 19, dtype=torch.float32)
    launch(y, random(3, 11, dtype=torch.float32), held, order=[], starts=[0], slots=[])
    assert torch.equal(y, random(3, 19, dtype=torch.float32))


def test_a_negative_slot_is_skipped() -> None:
    held = three_adapters(19, 11, torch.bfloat16)
    x, y = random(4, 11, dtype=torch.float32), random(4, 19, dtype=torch.float32)
    before = y.clone()
    launch(y, x, held, order=[2, 0, 1, 3], starts=[0, 1, 3, 4], slots=[-1, 0, -1])
    assert torch.equal(y[[2, 3]], before[[2, 3]])
    expected = before[[0, 1]].double() + x[[0, 1]].double() @ held.dense[0].t()
    assert_rounded_once(y[[0, 1]], expected)


def test_order_may_be_longer_than_its_groups() -> None:
    held = three_adapters(19, 11, torch.bfloat16)
    x, y = random(4, 11, dtype=torch.float32), random(4, 19, dtype=torch.float32)
    before = y.clone()
    launch(y, x, held, order=[3, 1, 10**9, -(10**9)], starts=[0, 2], slots=[1])
    assert torch.equal(y[[0, 2]], before[[0, 2]])
    expected = before[[1, 3]].double() + x[[1, 3]].double() @ held.dense[1].t()
    assert_rounded_once(y[[1, 3]], expected)


# --- what it must not touch ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_base_tokens_keep_every_bit_and_leak_none(dtype: torch.dtype) -> None:
    held, slots = three_adapters(19, 11, torch.bfloat16), [-1, 0, -1, 2, 2, -1]
    base, played = [0, 2, 5], [1, 3, 4]
    x, y = random(6, 11, dtype=dtype), random(6, 19, dtype=dtype)
    x[base], y[base] = torch.nan, torch.nan
    y.view(torch.uint8)[0, :] = 0xFE  # a NaN of its own, which arithmetic would make the usual one
    before = y.clone()
    expected = defined(y, x, held, slots)[played]
    run(y, x, held, slots)
    assert torch.equal(y[base].view(torch.uint8), before[base].view(torch.uint8))
    assert_rounded_once(y[played], expected)


def test_rows_without_entries_keep_every_bit() -> None:
    held = resident([delta_of_lengths([2, 0, 0, 5, 0] * 4, 11, seed=0)], torch.bfloat16)
    x, y = random(2, 11, dtype=torch.float32), random(2, 20, dtype=torch.float32)
    empty = held.dense[0].count_nonzero(1) == 0
    y[:, empty] = torch.nan
    run(y, x, held, [0, 0])
    assert y[:, empty].isnan().all()
    assert y[:, ~empty].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")  # in lanes that no row owns
def test_an_infinity_the_adapter_does_not_use_never_leaks() -> None:
    # column 0 is what masked loads name, 28 the last: no row has them, though rows differ in length
    lengths = [27, 0, 1, 2, 26, 5, 3] * 3
    inner = delta_of_lengths(lengths, 27, seed=5)
    columns = (inner.columns.int() + 1).to(torch.uint16)
    held = resident([SparseDelta(inner.row_starts, columns, inner.values, 29)], torch.bfloat16)
    x = random(3, 29, dtype=torch.float32)
    y = random(3, 21, dtype=torch.float32)
    expected = defined(y, x, held, [0, 0, 0])
    x[:, [0, 28]] = torch.tensor([torch.inf, torch.nan], device=DEVICE)
    run(y, x, held, [0, 0, 0])
    assert_rounded_once(y, expected)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_infinity_in_one_row_stays_in_the_rows_that_use_it() -> None:
    lengths = [11, 0, 1, 2, 10, 5, 3] * 3
    held = resident([delta_of_lengths(lengths, 11, seed=6)], torch.bfloat16)
    x, y = random(1, 11, dtype=torch.float32), random(1, 21, dtype=torch.float32)
    x[:, 4] = torch.inf
    run(y, x, held, [0])
    assert torch.equal(y[0].isfinite(), held.dense[0][:, 4] == 0)


def test_what_lies_between_strided_rows_is_not_touched() -> None:
    held = three_adapters(19, 11, torch.bfloat16)
    room = torch.full((4, 50), torch.nan, device=DEVICE)
    x, y = room[:, 3:14], room[:, 20:39]
    x.copy_(random(4, 11, dtype=torch.float32))
    y.copy_(random(4, 19, dtype=torch.float32))
    expected = defined(y, x, held, [0, 1, -1, 0])
    run(y, x, held, [0, 1, -1, 0])
    assert_rounded_once(y, expected)
    assert room[:, [0, 1, 2, *range(14, 20), *range(39, 50)]].isnan().all()


# --- how it sums ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[64], [64] * 16], ids=["a-long-row", "short-rows"])
def test_the_sum_is_rounded_once(dtype: torch.dtype, lengths: list[int]) -> None:
    inner = delta_of_lengths(lengths, 64, seed=0)
    halves = torch.full_like(inner.values, 0.5)
    held = resident([SparseDelta(inner.row_starts, inner.columns, halves, 64)], torch.bfloat16)
    large = 2.0 ** (9 if dtype == torch.bfloat16 else 12)  # whose neighbour is more than 0.5 away
    y = torch.full((1, len(lengths)), large, device=DEVICE, dtype=dtype)
    run(y, torch.ones(1, 64, device=DEVICE, dtype=dtype), held, [0])
    assert (y == large + 32).all()


def test_the_sum_is_not_rounded_before_it_is_added() -> None:
    # y's neighbour is 4 away and the product little more than 2: rounded by itself it would be 2,
    # and the sum half way, which is rounded down
    row = delta_at(range(5), (1, 5), seed=0)
    row.values.fill_(0.5)
    y = torch.full((1, 1), 2.0**12, device=DEVICE, dtype=torch.float16)
    x = torch.tensor([[1, 1, 1, 1, 2.0**-10]], device=DEVICE, dtype=torch.float16)
    run(y, x, resident([row], torch.bfloat16), [0])
    assert y.item() == 2.0**12 + 4


def test_a_second_run_gives_the_same_bits() -> None:
    held, slots = three_adapters(37, 29, torch.float32), [0, 1, 2, 0, 0]
    x = random(5, 29, dtype=torch.float32)
    first, second = random(5, 37, dtype=torch.float32), random(5, 37, dtype=torch.float32)
    run(first, x, held, slots)
    run(second, x, held, slots)
    assert torch.equal(first, second)


# --- large ---------------------------------------------------------------------------------------


def test_more_rows_than_uint16_names() -> None:
    shape = ((1 << 16) + 3, 2)
    flat = [0, 1, 2 * 40_000, 2 * 65_535, 2 * 65_536 + 1, 2 * 65_538, 2 * 65_538 + 1]
    assert_batch(resident([delta_at(flat, shape, seed=0)], torch.bfloat16), [0, -1])


def test_exactly_as_many_rows_and_columns_as_uint16_names() -> None:
    tall = delta_at([0, 1, 2 * 65_535, 2 * 65_535 + 1], (1 << 16, 2), seed=0)
    wide = delta_at([0, 65_535, 65_536, 2 * 65_536 - 1], (2, 1 << 16), seed=0)
    assert_batch(resident([tall], torch.bfloat16), [0])
    assert_batch(resident([wide], torch.bfloat16), [0])


def test_more_columns_than_uint16_names() -> None:
    width = (1 << 16) + 3
    flat = [0, 40_000, 65_535, 65_536, width - 1, width + 65_537, 2 * width - 1]
    assert_batch(resident([delta_at(flat, (3, width), seed=0)], torch.bfloat16), [0, -1])


def test_a_token_may_lie_beyond_2_to_the_31_elements() -> None:
    stride, held = 1 << 30, resident([random_delta(19, 11, seed=0)], torch.bfloat16)
    room = empty_pages(2 * stride + 64, torch.bfloat16)
    x, y = room.as_strided((3, 11), (stride, 1)), room.as_strided((3, 19), (stride, 1), 16)
    x[2], y[2] = random(11, dtype=torch.bfloat16), random(19, dtype=torch.bfloat16)
    expected = y[2].double() + held.dense[0] @ x[2].double()
    launch(y, x, held, order=[2], starts=[0, 1], slots=[0])
    assert_rounded_once(y[2], expected)


def test_an_adapter_may_lie_beyond_4_gib_of_arena() -> None:
    held, far = resident([random_delta(19, 11, seed=0)], torch.bfloat16), 1 << 32
    near, table = held.layer["memory"], held.layer["table"].clone()
    memory = empty_pages(far + near.numel(), torch.uint8)
    memory[far:] = near
    near.fill_(0xFF)
    table[:, 3:] += far
    moved = Resident({"memory": memory, "table": table, "dtype": torch.bfloat16}, held.dense)
    assert_batch(moved, [0, 0])


# --- any support ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 12), unique=True), min_size=1, max_size=36),
    st.lists(st.integers(-1, 1), min_size=1, max_size=4),
    st.sampled_from(FLOATS),
)
def test_any_support_is_its_float64_definition(
    rows: list[list[int]], slots: list[int], dtype: torch.dtype
) -> None:
    flat = [13 * row + column for row, columns in enumerate(rows) for column in columns]
    shape = len(rows), 13
    deltas = [delta_at(flat, shape, seed=0), random_delta(*shape, seed=1)]
    assert_batch(resident(deltas, torch.bfloat16), slots, dtype)


# -------------------------------------------------------------------------------------------------


def three_adapters(height: int, width: int, dtype: torch.dtype) -> Resident:
    """Put a random, a clustered and a nearly empty adapter into slots 0, 1 and 2."""
    clustered = [width - row % 3 if row % 5 == 2 else row % 3 for row in range(height)]
    random_one = random_delta(height, width, seed=0)
    clustered_one = delta_of_lengths([max(0, length) for length in clustered], width, seed=1)
    return resident([random_one, clustered_one, delta_at([width], (height, width), seed=2)], dtype)


def assert_batch(
    held: Resident,
    slots: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    configuration: Configuration | None = TINY,
) -> torch.Tensor:
    """Multiply a random batch, compare it with float64, and return it."""
    height, width = held.dense[0].shape
    x, y = random(len(slots), width, dtype=dtype), random(len(slots), height, dtype=dtype)
    expected = defined(y, x, held, slots)
    run(y, x, held, slots, configuration=configuration)
    assert_rounded_once(y, expected)
    return y


def defined(y: torch.Tensor, x: torch.Tensor, held: Resident, slots: list[int]) -> torch.Tensor:
    """Return y + Δ[slot]·x token by token, dense and in float64."""
    out = y.double()
    for token, slot in enumerate(slots):
        if slot >= 0:
            out[token] += held.dense[slot] @ x[token].double()
    return out


def run(
    y: torch.Tensor,
    x: torch.Tensor,
    held: Resident,
    slots: list[int],
    *,
    configuration: Configuration | None = TINY,
) -> None:
    """Launch a batch whose token t plays slots[t]; groups come in falling order of their slots."""
    members = {s: [t for t, slot in enumerate(slots) if slot == s] for s in set(slots) if s >= 0}
    groups = sorted(members, reverse=True)
    starts = [sum(len(members[s]) for s in groups[:g]) for g in range(len(groups) + 1)]
    order = [token for slot in groups for token in members[slot]]
    launch(y, x, held, order=order, starts=starts, slots=groups, configuration=configuration)


def launch(
    y: torch.Tensor,
    x: torch.Tensor,
    held: Resident,
    *,
    order: list[int],
    starts: list[int],
    slots: list[int],
    configuration: Configuration | None = TINY,
) -> None:
    groups = {"order": order, "starts": starts, "slots": slots}
    arrays = {n: torch.tensor(v, dtype=torch.int32, device=DEVICE) for n, v in groups.items()}
    gather(y, x, **held.layer, **arrays, configuration=configuration)
