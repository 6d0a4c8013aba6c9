"""A mixed batch's Δ[slot]·x is its float64 definition, and disturbs nothing beside it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.delta_matmul import TokenGroups, delta_matmul, delta_matmul_reference
from spieldose_kernels.slab import Slab, pack

DTYPES = [torch.float32, torch.bfloat16]
BATCHES = [  # slot of each token, negative for the base
    pytest.param([0, -1, 2, 1, -1, 0, 2], id="mixed"),
    pytest.param([0], id="one-token"),
    pytest.param([1, -1, -1, -1, -1], id="mostly-base"),
    pytest.param([3, 3, 3], id="one-slot"),
    pytest.param([2, 1, 0], id="more-slots-than-tokens"),
    pytest.param([5, 4, -1, 0], id="slots-that-leave-the-layer-alone"),
    pytest.param([0, 1] * 50 + [-1] * 3 + [0] * 60, id="many-tokens-per-slot"),
]
HEIGHT, WIDTH = 37, 29  # the kernel stores 16 rows at once: two full blocks and a rest
UNTOUCHED = (4, 5)  # slots whose adapters lack the layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", BATCHES)
def test_a_batch_is_its_float64_definition(slots: list[int], dtype: torch.dtype) -> None:
    slab, deltas = filled_slab()
    x, y = random(len(slots), WIDTH).to(dtype), random(len(slots), HEIGHT).to(dtype)
    expected = defined(y, x, deltas, slots)
    multiply(slab, y, x, slots)
    assert_rounded_once(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", BATCHES)
def test_a_batch_is_the_references(slots: list[int], dtype: torch.dtype) -> None:
    slab, _ = filled_slab()
    x, y = random(len(slots), WIDTH).to(dtype), random(len(slots), HEIGHT).to(dtype)
    reference = y.clone()
    delta_matmul_reference(reference, x, slab.layer("m"), groups_of(slots))
    multiply(slab, y, x, slots)
    assert_rounded_once(y, reference.double())


def test_the_reference_is_its_float64_definition() -> None:
    slab, deltas = filled_slab()
    slots = [0, -1, 2, 1, -1, 4, 2]
    x, y = random(7, WIDTH).double(), random(7, HEIGHT).double()
    expected = defined(y, x, deltas, slots)
    delta_matmul_reference(y, x, slab.layer("m"), groups_of(slots))
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_tokens_rows_keep_every_bit(dtype: torch.dtype) -> None:
    slab, _ = filled_slab()
    slots = [-1, 0, -1, 1, 4, -1]
    y = random(6, HEIGHT).to(dtype)
    y[[0, 2]] = float("nan")
    before = y.clone()
    multiply(slab, y, random(6, WIDTH).to(dtype), slots)
    base = [0, 2, 4, 5]
    assert torch.equal(y[base].view(torch.uint8), before[base].view(torch.uint8))
    assert (y[[1, 3]] != before[[1, 3]]).any(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_tokens_activations_are_never_read_into_others(dtype: torch.dtype) -> None:
    slab, deltas = filled_slab()
    slots = [-1, 0, -1, 1]
    x, y = random(4, WIDTH).to(dtype), random(4, HEIGHT).to(dtype)
    expected = defined(y, x, deltas, slots)
    x[[0, 2]] = float("nan")
    multiply(slab, y, x, slots)
    assert_rounded_once(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_rows_add_nothing(dtype: torch.dtype) -> None:
    only_row_five = SparseDelta.from_flat(
        torch.tensor([5 * WIDTH + 3]), torch.tensor([2.0]), shape=(HEIGHT, WIDTH)
    )
    slab = slab_of([{"m": only_row_five}])
    y = torch.full((2, HEIGHT), 0.25, dtype=dtype)
    multiply(slab, y, torch.ones(2, WIDTH, dtype=dtype), [0, 0])
    expected = torch.full((2, HEIGHT), 0.25, dtype=dtype)
    expected[:, 5] = 2.25
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_without_entries_adds_nothing(dtype: torch.dtype) -> None:
    slab = slab_of([{"m": random_delta(0, density=0.0)}])
    y = random(3, HEIGHT).to(dtype)
    before = y.clone()
    multiply(slab, y, random(3, WIDTH).to(dtype), [0, -1, 0])
    assert torch.equal(y, before)


@pytest.mark.parametrize("tokens", [1, 3])
def test_sums_are_float32_and_rounded_once(tokens: int) -> None:
    # in bfloat16, 256 + 0.5 is 256: adding 29 halves one by one would never leave it
    full = SparseDelta.from_flat(
        torch.arange(HEIGHT * WIDTH), torch.full((HEIGHT * WIDTH,), 0.5), shape=(HEIGHT, WIDTH)
    )
    y = torch.full((tokens, HEIGHT), 256.0, dtype=torch.bfloat16)
    multiply(slab_of([{"m": full}]), y, torch.ones(tokens, WIDTH).bfloat16(), [0] * tokens)
    assert torch.equal(y, torch.full_like(y, 256 + 0.5 * WIDTH))  # 270.5 rounds to 270


@pytest.mark.parametrize("tokens", [1, 3])
def test_values_are_not_rounded_to_the_activations_dtype(tokens: int) -> None:
    value = 1 + 2**-12  # bfloat16 would make it 1
    delta = SparseDelta.from_flat(
        torch.tensor([0, 1]), torch.tensor([value, -1.0]), shape=(HEIGHT, WIDTH)
    )
    y = torch.zeros(tokens, HEIGHT, dtype=torch.bfloat16)
    multiply(slab_of([{"m": delta}]), y, torch.ones(tokens, WIDTH).bfloat16(), [0] * tokens)
    assert torch.equal(y[:, 0], torch.full((tokens,), 2**-12).bfloat16())


@pytest.mark.parametrize(("addend", "expected"), [(1.0, 256.0), (3.0, 260.0), (1.5, 258.0)])
def test_ties_round_to_even(addend: float, expected: float) -> None:
    delta = SparseDelta.from_flat(torch.tensor([0]), torch.tensor([addend]), shape=(HEIGHT, WIDTH))
    y = torch.full((1, HEIGHT), 256.0, dtype=torch.bfloat16)
    multiply(slab_of([{"m": delta}]), y, torch.ones(1, WIDTH).bfloat16(), [0])
    assert y[0, 0].item() == expected == (torch.tensor(256 + addend).bfloat16()).item()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_what_it_is(value: float, dtype: torch.dtype) -> None:
    slab, _ = filled_slab()
    y = torch.full((2, HEIGHT), value, dtype=dtype)
    multiply(slab, y, random(2, WIDTH).to(dtype), [0, 0])
    torch.testing.assert_close(y, torch.full_like(y, value), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_need_not_be_contiguous(dtype: torch.dtype) -> None:
    slab, deltas = filled_slab()
    slots = [0, -1, 2, 1]
    for x in (random(4, 2 * WIDTH).to(dtype)[:, ::2], random(WIDTH, 4).to(dtype).t()):
        y = random(4, HEIGHT).to(dtype)
        expected = defined(y, x, deltas, slots)
        multiply(slab, y, x, slots)
        assert_rounded_once(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_need_not_be_contiguous(dtype: torch.dtype) -> None:
    slab, deltas = filled_slab()
    slots = [0, -1, 2, 1]
    x, y = random(4, WIDTH).to(dtype), random(HEIGHT, 4).to(dtype).t()
    expected = defined(y, x, deltas, slots)
    multiply(slab, y, x, slots)
    assert_rounded_once(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_same_bits_whatever_stands_beside_it_in_other_slots(
    dtype: torch.dtype,
) -> None:
    slab, _ = filled_slab()
    x, y = random(4, WIDTH).to(dtype), random(4, HEIGHT).to(dtype)
    alone = y[2:3].clone()
    multiply(slab, alone, x[2:3], [2])
    multiply(slab, y, x, [0, -1, 2, 1])
    assert torch.equal(y[2:3], alone)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-1, 5), min_size=1, max_size=20), st.sampled_from(DTYPES))
def test_any_batch_is_its_float64_definition(slots: list[int], dtype: torch.dtype) -> None:
    if groups_or_none(slots) is not None:
        test_a_batch_is_its_float64_definition(slots, dtype)


# --- grouping ------------------------------------------------------------------------------------

SLOTS = st.lists(st.integers(-3, 6), max_size=40)


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
@given(st.lists(st.integers(-3, -1), max_size=10))
def test_a_batch_of_base_tokens_has_no_groups(slots: list[int]) -> None:
    assert groups_or_none(slots) is None


def test_groups_are_of_the_kernels_integer_types() -> None:
    groups = groups_of([1, -1, 0])
    assert (groups.order.dtype, groups.starts.dtype, groups.slots.dtype) == (
        torch.int64,
        torch.int32,
        torch.int32,
    )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_delta(seed: int, *, density: float = 0.2) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randperm(HEIGHT * WIDTH, generator=generator)
    positions = positions[: int(HEIGHT * WIDTH * density)]
    values = torch.randn(positions.numel(), generator=generator)
    return SparseDelta.from_flat(positions, values, shape=(HEIGHT, WIDTH))


def slab_of(adapters: list[dict[str, SparseDelta]], *, slots: int = 8) -> Slab:
    """Put adapters into slots 0, 1, ... of a slab whose memory was NaN before."""
    shapes = {"m": (HEIGHT, WIDTH), "other": (HEIGHT, WIDTH)}
    slab = Slab(shapes, slots=slots, budget=1 << 18, device=torch.device("cpu"))
    slab.arena.words.view(torch.float32).fill_(float("nan"))
    info = AdapterInfo(base_model="b", base_fingerprint="f", method="random", density=0.2)
    for expected, modules in enumerate(adapters):
        assert slab.put(pack(Adapter(info, modules))) == expected
    return slab


def filled_slab() -> tuple[Slab, dict[int, SparseDelta]]:
    """Return six adapters in eight slots; two of them do not touch the layer."""
    deltas = {slot: random_delta(slot) for slot in range(4)}
    others = [{"other": random_delta(slot)} for slot in UNTOUCHED]
    both = [{"other": random_delta(9 + slot), "m": delta} for slot, delta in deltas.items()]
    return slab_of([*both, *others]), deltas


def groups_or_none(slots: list[int]) -> TokenGroups | None:
    return TokenGroups.of(torch.tensor(slots, dtype=torch.int32))


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
    for t, slot in enumerate(slots):
        if slot in deltas:
            out[t] += deltas[slot].dense(torch.float64) @ x[t].double()
    return out


def assert_rounded_once(got: torch.Tensor, expected: torch.Tensor) -> None:
    half_ulp = 2**-8 if got.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), expected, rtol=half_ulp, atol=3e-6)
