"""A mixed batch's Δ[slot]·x is its float64 definition, and disturbs nothing beside it."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels.cpu.gather import FEW
from spieldose_kernels.cpu.team import WORTH_A_TEAM
from spieldose_kernels.cpu.vector import BLOCK
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.delta_matmul import delta_matmul, delta_matmul_reference
from spieldose_kernels.slab import Slab
from spieldose_kernels.sliced import pack
from spieldose_kernels.token_groups import SKIPPED, TokenGroups

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
BATCHES = [  # slot of each token, negative for the base
    pytest.param([0, -1, 2, 1, -1, 0, 2], id="mixed"),
    pytest.param([0], id="one-token"),
    pytest.param([1, -1, -1, -1, -1], id="mostly-base"),
    pytest.param([3, 3, 3], id="one-slot"),
    pytest.param([2, 1, 0], id="more-slots-than-tokens"),
    pytest.param([5, 4, -1, 0], id="slots-that-leave-the-layer-alone"),
    pytest.param([0, 1] * 50 + [-1] * 3 + [0] * 60, id="many-tokens-per-slot"),
    pytest.param([2, 3] * 20 + [1, -1] * 5 + [5] * 30, id="few-and-many-tokens-per-slot"),
]
# tokens of one slot: one by one up to FEW, then in blocks of BLOCK, stored LANES at once
COUNTS = [
    1,
    2,
    max(1, FEW - 1),
    FEW,
    FEW + 1,
    15,
    16,
    17,
    31,
    32,
    48,
    63,
    64,
    65,
    79,
    80,
    128,
    129,
    200,
]
SHAPES = [(37, 29), (48, 32), (16, 16), (1, 1), (15, 64), (64, 15), (17, 300)]
HEIGHT, WIDTH = 37, 29  # the kernel loads and stores 16 features at once: full blocks and a rest
UNTOUCHED = (4, 5)  # slots whose adapters lack the layer

# --- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", BATCHES)
def test_a_batch_is_its_float64_definition(
    slots: list[int], dtype: torch.dtype, resident: torch.dtype
) -> None:
    slab, deltas = filled_slab(resident)
    x, y = random(len(slots), WIDTH).to(dtype), random(len(slots), HEIGHT).to(dtype)
    expected = defined(y, x, deltas, slots)
    multiply(slab, y, x, slots)
    assert_rounded_once(y, expected)


@pytest.mark.parametrize("resident", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", BATCHES)
def test_a_batch_is_the_references(
    slots: list[int], dtype: torch.dtype, resident: torch.dtype
) -> None:
    slab, _ = filled_slab(resident)
    x, y = random(len(slots), WIDTH).to(dtype), random(len(slots), HEIGHT).to(dtype)
    reference = y.clone()
    delta_matmul_reference(reference, x, slab.layer("m"), groups_of(slots))
    multiply(slab, y, x, slots)
    assert_rounded_once(y, reference.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clustered", [False, True], ids=["uniform", "clustered"])
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_any_number_of_one_slots_tokens_is_the_float64_definition(
    height: int, width: int, clustered: bool, dtype: torch.dtype
) -> None:
    make = clustered_delta if clustered else random_delta
    delta = make(0, height=height, width=width)
    slab = slab_of([{"m": delta}], shape=(height, width))
    for count in COUNTS:
        x, y = random(count, width).to(dtype), random(count, height).to(dtype)
        expected = defined(y, x, {0: delta}, [0] * count)
        multiply(slab, y, x, [0] * count)
        assert_rounded_once(y, expected, terms=width)


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("shape", [(70_000, 3), (3, 70_000)], ids=["rows", "columns"])
def test_more_rows_or_columns_than_uint16_names_are_the_float64_definition(
    shape: tuple[int, int], tokens: int
) -> None:
    height, width = shape
    delta = random_delta(0, height=height, width=width, density=0.1)
    x, y = random(tokens, width), random(tokens, height)
    expected = defined(y, x, {0: delta}, [0] * tokens)
    multiply(slab_of([{"m": delta}], shape=shape), y, x, [0] * tokens)
    assert_rounded_once(y, expected, terms=width // 10 + 1)


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("shape", [(65_536, 3), (3, 65_536), (50_000, 3), (3, 50_000)])
def test_the_last_row_and_column_that_uint16_names_are_reached(
    shape: tuple[int, int], tokens: int
) -> None:
    height, width = shape
    delta = SparseDelta.from_flat(
        torch.tensor([height * width - 1]), torch.tensor([2.0]), shape=shape
    )
    y = torch.zeros(tokens, height)
    multiply(slab_of([{"m": delta}], shape=shape), y, torch.ones(tokens, width), [0] * tokens)
    assert (y[:, -1] == 2).all()
    assert y.count_nonzero() == tokens


def test_the_reference_is_its_float64_definition() -> None:
    slab, deltas = filled_slab()
    slots = [0, -1, 2, 1, -1, 4, 2]
    x, y = random(7, WIDTH).double(), random(7, HEIGHT).double()
    expected = defined(y, x, deltas, slots)
    delta_matmul_reference(y, x, slab.layer("m"), groups_of(slots))
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("resident", DTYPES)
def test_other_dtypes_are_left_to_the_reference(
    dtype: torch.dtype, resident: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spieldose_kernels.delta_matmul.gather", None)
    slab, deltas = filled_slab(resident)
    slots = [0, -1, 2, 1] * 10
    x, y = random(40, WIDTH).to(dtype), random(40, HEIGHT).to(dtype)
    expected = defined(y, x, deltas, slots)
    multiply(slab, y, x, slots)
    assert_rounded_once(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_not_needed_for_what_is_compiled(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spieldose_kernels.delta_matmul.delta_matmul_reference", None)
    test_a_batch_is_its_float64_definition([0, -1, 2, 1] * 10, dtype, torch.bfloat16)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_support_in_any_batch_is_its_float64_definition(data: st.DataObject) -> None:
    dtype, resident = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    lengths = st.lists(st.integers(0, width), min_size=height, max_size=height)
    few = st.lists(st.integers(0, min(width, 2)), min_size=height, max_size=height)
    deltas = {
        slot: delta_of(data.draw(st.one_of(lengths, few)), width, seed=slot)
        for slot in range(data.draw(st.integers(1, 3)))
    }
    counts = st.sampled_from([0, 1, 3, FEW, FEW + 1, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1])
    runs = data.draw(st.lists(st.tuples(st.integers(-1, 3), counts), min_size=1, max_size=4))
    slots = data.draw(st.permutations([slot for slot, count in runs for _ in range(count)]))
    if groups_or_none(slots) is None:
        return
    slab = slab_of(
        [{"m": delta} for delta in deltas.values()], shape=(height, width), dtype=resident
    )
    x, y = random(len(slots), width).to(dtype), random(len(slots), height).to(dtype)
    expected = defined(y, x, as_resident(deltas, resident), slots)
    multiply(slab, y, x, slots)
    assert_rounded_once(y, expected, terms=40)


@pytest.mark.parametrize("repeat", [1, 8])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_leading_dimensions_count_as_tokens(dtype: torch.dtype, repeat: int) -> None:
    slab, deltas = filled_slab()
    slots = [0, -1, 2, 1, 1, 3] * repeat
    x = random(len(slots), WIDTH).to(dtype)
    y = random(len(slots), HEIGHT).to(dtype)
    expected = defined(y, x, deltas, slots)
    multiply(slab, y.view(2, 3, repeat, HEIGHT), x.view(2, 3, repeat, WIDTH), slots)
    assert_rounded_once(y, expected)


# --- what stays as it was ------------------------------------------------------------------------


@pytest.mark.parametrize("repeat", [1, 5, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_base_tokens_rows_keep_every_bit(dtype: torch.dtype, repeat: int) -> None:
    slab, _ = filled_slab()
    slots = torch.tensor([-1, 0, -1, 1, 4, -1] * repeat)
    y = random(slots.numel(), HEIGHT).to(dtype)
    y[::6], y[2::6], y[4::6] = float("nan"), -0.0, -0.0
    before = y.clone()
    multiply(slab, y, random(slots.numel(), WIDTH).to(dtype), slots.tolist())
    base, playing = (slots < 0) | (slots == 4), (slots == 0) | (slots == 1)
    assert torch.equal(y[base].view(torch.uint8), before[base].view(torch.uint8))
    assert (y[playing] != before[playing]).any(1).all()


@pytest.mark.parametrize("repeat", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_base_tokens_activations_are_never_read_into_others(
    dtype: torch.dtype, repeat: int
) -> None:
    slab, deltas = filled_slab()
    slots = [-1, 0, -1, 1] * repeat
    x, y = random(len(slots), WIDTH).to(dtype), random(len(slots), HEIGHT).to(dtype)
    expected = defined(y, x, deltas, slots)
    x[::2] = float("nan")
    multiply(slab, y, x, slots)
    assert_rounded_once(y, expected)


@pytest.mark.parametrize("tokens", [1, FEW + 1])
@pytest.mark.parametrize("multiply", [delta_matmul, delta_matmul_reference])
def test_a_skipped_groups_tokens_keep_every_bit(multiply: Callable[..., None], tokens: int) -> None:
    deltas = {"other": random_delta(0), "m": random_delta(1)}
    slab = slab_of([deltas] * 8)  # whichever slot lies before the first, it has entries
    arrays = torch.arange(tokens), torch.tensor([0, tokens]), torch.tensor([SKIPPED])
    y = torch.full((tokens, HEIGHT), -0.0)
    before = y.clone()
    groups = TokenGroups(*(array.int() for array in arrays))
    multiply(y, random(tokens, WIDTH), slab.layer("m"), groups)
    assert torch.equal(y.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("tokens", [1, FEW + 1, 16, BLOCK, BLOCK + 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_beside_the_outputs(dtype: torch.dtype, tokens: int) -> None:
    slab, _ = filled_slab()
    around = torch.full((tokens + 4, HEIGHT), float("nan"), dtype=dtype)
    y = around[2:-2]
    y.zero_()
    multiply(slab, y, random(tokens, WIDTH).to(dtype), [3] * tokens)
    assert y.isfinite().all()
    assert around[:2].isnan().all() and around[-2:].isnan().all()


@pytest.mark.parametrize("tokens", [2, 20, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_rows_add_nothing(dtype: torch.dtype, tokens: int) -> None:
    only_row_five = SparseDelta.from_flat(
        torch.tensor([5 * WIDTH + 3]), torch.tensor([2.0]), shape=(HEIGHT, WIDTH)
    )
    slab = slab_of([{"m": only_row_five}])
    y = torch.full((tokens, HEIGHT), 0.25, dtype=dtype)
    multiply(slab, y, torch.ones(tokens, WIDTH, dtype=dtype), [0] * tokens)
    expected = torch.full((tokens, HEIGHT), 0.25, dtype=dtype)
    expected[:, 5] = 2.25
    assert torch.equal(y, expected)


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_without_entries_adds_nothing(dtype: torch.dtype, tokens: int) -> None:
    slab = slab_of([{"m": random_delta(0, density=0.0)}])
    y = random(tokens, HEIGHT).to(dtype)
    before = y.clone()
    multiply(slab, y, random(tokens, WIDTH).to(dtype), [0, -1] + [0] * (tokens - 2))
    assert torch.equal(y, before)


@pytest.mark.parametrize("tokens", [3, 20, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_activation_reaches_the_rows_that_use_it_and_no_others(
    dtype: torch.dtype, tokens: int
) -> None:
    for delta in (random_delta(1), clustered_delta(1), random_delta(2, density=0.02)):
        slab, uses = slab_of([{"m": delta}]), delta.dense(torch.float32) != 0
        for column in (0, 1, 15, 16, WIDTH - 1):
            x = random(tokens, WIDTH).to(dtype)
            x[:, column] = 0
            expected = defined(torch.zeros(tokens, HEIGHT), x, {0: delta}, [0] * tokens)
            x[:, column] = float("inf")
            y = torch.zeros(tokens, HEIGHT, dtype=dtype)
            multiply(slab, y, x, [0] * tokens)
            used = uses[:, column]
            assert not y[:, used].isfinite().any()
            assert_rounded_once(y[:, ~used], expected[:, ~used])


# --- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_sums_are_float32_and_rounded_once(tokens: int) -> None:
    # in bfloat16, 256 + 0.5 is 256: adding 29 halves one by one would never leave it
    full = SparseDelta.from_flat(
        torch.arange(HEIGHT * WIDTH), torch.full((HEIGHT * WIDTH,), 0.5), shape=(HEIGHT, WIDTH)
    )
    y = torch.full((tokens, HEIGHT), 256.0, dtype=torch.bfloat16)
    multiply(slab_of([{"m": full}]), y, torch.ones(tokens, WIDTH).bfloat16(), [0] * tokens)
    assert torch.equal(y, torch.full_like(y, 256 + 0.5 * WIDTH))  # 270.5 rounds to 270


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_float32_values_are_not_rounded_to_the_activations_dtype(tokens: int) -> None:
    value = 1 + 2**-12  # bfloat16 would make it 1
    delta = SparseDelta.from_flat(
        torch.tensor([0, 1]), torch.tensor([value, -1.0]), shape=(HEIGHT, WIDTH)
    )
    y = torch.zeros(tokens, HEIGHT, dtype=torch.bfloat16)
    multiply(slab_of([{"m": delta}]), y, torch.ones(tokens, WIDTH).bfloat16(), [0] * tokens)
    assert torch.equal(y[:, 0], torch.full((tokens,), 2**-12).bfloat16())


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_float32_activations_are_not_rounded_to_the_values_dtype(tokens: int) -> None:
    delta = SparseDelta.from_flat(torch.tensor([0]), torch.tensor([1.0]), shape=(HEIGHT, WIDTH))
    slab, y = slab_of([{"m": delta}], dtype=torch.bfloat16), torch.zeros(tokens, HEIGHT)
    multiply(slab, y, torch.full((tokens, WIDTH), 1 + 2**-12), [0] * tokens)
    assert (y[:, 0] == 1 + 2**-12).all()


@pytest.mark.parametrize("tokens", [1, 20])  # 20: sixteen in a vector, four by themselves
@pytest.mark.parametrize(("addend", "expected"), [(1.0, 256.0), (3.0, 260.0), (1.5, 258.0)])
def test_ties_round_to_even(addend: float, expected: float, tokens: int) -> None:
    column = SparseDelta.from_flat(
        torch.arange(HEIGHT) * WIDTH, torch.full((HEIGHT,), addend), shape=(HEIGHT, WIDTH)
    )
    y = torch.full((tokens, HEIGHT), 256.0, dtype=torch.bfloat16)
    multiply(slab_of([{"m": column}]), y, torch.ones(tokens, WIDTH).bfloat16(), [0] * tokens)
    assert (y == expected).all()
    assert expected == torch.tensor(256 + addend).bfloat16().item()


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_what_it_is(value: float, dtype: torch.dtype, tokens: int) -> None:
    slab, _ = filled_slab()
    y = torch.full((tokens, HEIGHT), value, dtype=dtype)
    multiply(slab, y, random(tokens, WIDTH).to(dtype), [0] * tokens)
    torch.testing.assert_close(y, torch.full_like(y, value), equal_nan=True)


# --- where things lie ----------------------------------------------------------------------------


@pytest.mark.parametrize("repeat", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_need_not_be_contiguous(dtype: torch.dtype, repeat: int) -> None:
    slab, deltas = filled_slab()
    slots = [0, -1, 2, 1] * repeat
    tokens = len(slots)
    for x in (random(tokens, 2 * WIDTH)[:, ::2], random(WIDTH, tokens).t(), random(1, WIDTH)):
        x = x.to(dtype).expand(tokens, WIDTH)
        y = random(tokens, HEIGHT).to(dtype)
        expected = defined(y, x, deltas, slots)
        multiply(slab, y, x, slots)
        assert_rounded_once(y, expected)


@pytest.mark.parametrize("repeat", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_need_not_be_contiguous(dtype: torch.dtype, repeat: int) -> None:
    slab, deltas = filled_slab()
    slots = [0, -1, 2, 1] * repeat
    tokens = len(slots)
    x = random(tokens, WIDTH).to(dtype)
    wider = random(tokens, HEIGHT + 3).to(dtype)
    beside = wider[:, HEIGHT:].clone()
    for y in (random(HEIGHT, tokens).to(dtype).t(), wider[:, :HEIGHT]):
        expected = defined(y, x, deltas, slots)
        multiply(slab, y, x, slots)
        assert_rounded_once(y, expected)
    assert torch.equal(wider[:, HEIGHT:], beside)


@pytest.mark.parametrize("repeat", [1, FEW + 1, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_same_bits_whatever_stands_beside_it_in_other_slots(
    dtype: torch.dtype, repeat: int
) -> None:
    slab, _ = filled_slab()
    slots = [0, -1, 2, 1] * repeat
    x, y = random(len(slots), WIDTH).to(dtype), random(len(slots), HEIGHT).to(dtype)
    alone = y[2::4].clone()
    multiply(slab, alone, x[2::4], [2] * repeat)
    multiply(slab, y, x, slots)
    assert torch.equal(y[2::4], alone)


# --- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slots",
    [
        pytest.param([0, -1, 2, 1] * 50, id="many-tokens-per-slot"),
        pytest.param([0, 1, 2, 3] * 2 + [-1] * 200, id="few-tokens-per-slot"),
        pytest.param([5, 0] * 8 + [1, 4] * 100 + [2], id="few-and-many"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_two_and_three_threads_give_the_same_bits(
    dtype: torch.dtype, slots: list[int], set_threads: Callable[[int], None]
) -> None:
    slab, deltas = filled_slab()
    x, y = random(len(slots), WIDTH).to(dtype), random(len(slots), HEIGHT).to(dtype)
    assert y.numel() >= WORTH_A_TEAM
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(y.clone())
        multiply(slab, results[-1], x, slots)
        assert_rounded_once(results[-1], defined(y, x, deltas, slots))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread elsewhere: at toy size a second one only waits, and spins meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Set PyTorch's number of threads, and back again at the end."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


# --- grouping ------------------------------------------------------------------------------------

SLOTS = st.lists(st.integers(-1, 6), max_size=40)


@settings(deadline=None)
@given(SLOTS)
def test_groups_hold_each_playing_token_once_under_its_own_slot(slots: list[int]) -> None:
    groups = groups_or_none(slots)
    pairs = [(t, slot) for slot, tokens in listed(groups) for t in tokens]
    assert sorted(pairs) == [(t, slot) for t, slot in enumerate(slots) if slot >= 0]


@settings(deadline=None)
@given(SLOTS)
def test_every_slot_has_one_group_and_no_group_is_empty(slots: list[int]) -> None:
    groups = listed(groups_or_none(slots))
    assert sorted(slot for slot, _ in groups) == sorted({slot for slot in slots if slot >= 0})
    assert all(tokens for _, tokens in groups)


@settings(deadline=None)
@given(SLOTS)
def test_a_groups_tokens_keep_their_order(slots: list[int]) -> None:
    for _, tokens in listed(groups_or_none(slots)):
        assert tokens == sorted(tokens)


@settings(deadline=None)
@given(st.lists(st.tuples(st.none() | st.integers(0, 3), st.integers(0, 5)), max_size=10))
def test_requests_of_several_tokens_are_grouped_as_their_tokens(
    requests: list[tuple[int | None, int]],
) -> None:
    slots, lengths = [slot for slot, _ in requests], [length for _, length in requests]
    groups = TokenGroups.of(slots, lengths, CPU)
    one_by_one = [slot for slot, length in requests for _ in range(length)]
    assert listed(groups) == listed(TokenGroups.of(one_by_one, [1] * len(one_by_one), CPU))


@pytest.mark.parametrize("requests", range(4))
def test_a_batch_of_base_tokens_has_no_groups(requests: int) -> None:
    assert TokenGroups.of([None] * requests, [3] * requests, CPU) is None


def test_groups_are_of_the_kernels_integer_types() -> None:
    groups = groups_of([1, -1, 0])
    arrays = groups.order, groups.starts, groups.slots
    assert [array.dtype for array in arrays] == [torch.int32] * 3
    assert all(array.is_contiguous() for array in arrays)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_delta(
    seed: int, *, height: int = HEIGHT, width: int = WIDTH, density: float = 0.2
) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randperm(height * width, generator=generator)
    positions = positions[: int(height * width * density)]
    values = torch.randn(positions.numel(), generator=generator)
    return SparseDelta.from_flat(positions, values, shape=(height, width))


def clustered_delta(seed: int, *, height: int = HEIGHT, width: int = WIDTH) -> SparseDelta:
    """Make a delta as training does: every fifth row nearly full, the others nearly empty."""
    lengths = [width - row % 3 if row % 5 == 2 else row % 3 for row in range(height)]
    return delta_of([max(0, min(length, width)) for length in lengths], width, seed=seed)


def delta_of(lengths: list[int], width: int, *, seed: int) -> SparseDelta:
    """Make a delta of rows so long, at random columns."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randperm(width, generator=generator)[:length] for length in lengths]
    flat = torch.cat([row * width + taken for row, taken in enumerate(columns)])
    values = torch.randn(flat.numel(), generator=generator)
    return SparseDelta.from_flat(flat, values, shape=(len(lengths), width))


def slab_of(
    adapters: list[dict[str, SparseDelta]],
    *,
    shape: tuple[int, int] = (HEIGHT, WIDTH),
    dtype: torch.dtype = torch.float32,
) -> Slab:
    """Put adapters into slots 0, 1, ... of a slab of eight whose memory was NaN before."""
    slab = Slab({"other": shape, "m": shape}, slots=8, budget=1 << 21, dtype=dtype, device=CPU)
    slab.arena.memory.fill_(0xFF)
    info = AdapterInfo(base_model="b", base_fingerprint="f", method="random", density=0.2)
    for expected, modules in enumerate(adapters):
        assert slab.put(pack(Adapter(info, modules), dtype)) == expected
    return slab


def filled_slab(dtype: torch.dtype = torch.float32) -> tuple[Slab, dict[int, SparseDelta]]:
    """Return six adapters in eight slots; two of them do not touch the layer.

    The deltas have the values as they are resident.
    """
    deltas = {slot: (clustered_delta if slot % 2 else random_delta)(slot) for slot in range(4)}
    others = [{"other": random_delta(slot)} for slot in UNTOUCHED]
    both = [{"other": random_delta(9 + slot), "m": delta} for slot, delta in deltas.items()]
    return slab_of([*both, *others], dtype=dtype), as_resident(deltas, dtype)


def as_resident(deltas: dict[int, SparseDelta], dtype: torch.dtype) -> dict[int, SparseDelta]:
    """Return the deltas with their values rounded to a slab's dtype."""
    return {
        slot: SparseDelta(delta.row_starts, delta.columns, delta.values.to(dtype), delta.width)
        for slot, delta in deltas.items()
    }


def groups_or_none(slots: list[int]) -> TokenGroups | None:
    """Group tokens by slot, negative for the base."""
    return TokenGroups.of([None if s < 0 else s for s in slots], [1] * len(slots), CPU)


def groups_of(slots: list[int]) -> TokenGroups:
    groups = groups_or_none(slots)
    assert groups is not None
    return groups


def listed(groups: TokenGroups | None) -> list[tuple[int, list[int]]]:
    if groups is None:
        return []
    starts, order = groups.starts.tolist(), groups.order.tolist()
    assert (starts[0], starts[-1]) == (0, len(order))
    pieces = [order[low:high] for low, high in pairwise(starts)]
    return list(zip(groups.slots.tolist(), pieces, strict=True))


def multiply(slab: Slab, y: torch.Tensor, x: torch.Tensor, slots: list[int]) -> None:
    delta_matmul(y, x, slab.layer("m"), groups_of(slots))


def defined(
    y: torch.Tensor, x: torch.Tensor, deltas: dict[int, SparseDelta], slots: list[int]
) -> torch.Tensor:
    """Return y + Δ[slot]·x token by token, dense and in float64."""
    out = y.double().clone()
    for slot, delta in deltas.items():
        tokens = torch.tensor(slots) == slot
        out[tokens] += x[tokens].double() @ delta.dense(torch.float64).t()
    return out


def assert_rounded_once(got: torch.Tensor, expected: torch.Tensor, *, terms: int = WIDTH) -> None:
    """Compare with float64: float32 sums of so many terms, rounded to the output's dtype."""
    half_ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-13}
    rtol = half_ulp.get(got.dtype, 1e-6)
    atol = 1e-13 if got.dtype == torch.float64 else 3e-7 * terms
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)
