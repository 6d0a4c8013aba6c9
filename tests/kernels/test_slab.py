"""The slab gives out memory and slots without overlap, and takes all of it back."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.errors import ArenaFull
from spieldose_kernels.slab import WORD, Arena, Slab, pack

CPU = torch.device("cpu")
SHAPES = {"m": (5, 7), "n": (3, 4)}

# --- arena ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_extents_never_overlap_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    arena, held = Arena(100, CPU), []
    for allocates, number in steps:
        if allocates:
            length = number
            try:
                held.append((arena.allocate(length), length))
            except ArenaFull:
                assert longest_gap(held, 100) < length
        elif held:
            arena.free(*held.pop(number % len(held)))
        used = [word for start, length in held for word in range(start, start + length)]
        assert len(used) == len(set(used))
        assert all(0 <= word < 100 for word in used)
        assert arena.free_words == 100 - len(used)
    for extent in held:
        arena.free(*extent)
    assert arena.allocate(100) == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_neighbours_grow_together_in_whatever_order_they_are_freed(order: tuple[int, ...]) -> None:
    arena = Arena(30, CPU)
    starts = [arena.allocate(10) for _ in range(3)]
    for i in order:
        arena.free(starts[i], 10)
    assert arena.allocate(30) == 0


def test_the_first_gap_that_fits_is_taken() -> None:
    arena = Arena(30, CPU)
    for _ in range(3):
        arena.allocate(10)
    arena.free(20, 10)
    arena.free(0, 10)
    assert arena.allocate(5) == 0
    assert arena.allocate(6) == 20


def test_a_full_arena_says_what_was_asked_and_what_is_free() -> None:
    arena = Arena(10, CPU)
    arena.allocate(6)
    with pytest.raises(ArenaFull, match=r"room for 20 bytes .* got 16 of 40 bytes free"):
        arena.allocate(5)


def test_a_refused_allocation_takes_nothing() -> None:
    arena = Arena(10, CPU)
    with pytest.raises(ArenaFull):
        arena.allocate(11)
    assert arena.allocate(10) == 0


def test_room_in_pieces_is_not_room_in_one() -> None:
    arena = Arena(30, CPU)
    for _ in range(3):
        arena.allocate(10)
    arena.free(0, 10)
    arena.free(20, 10)
    with pytest.raises(ArenaFull, match="in one piece, got 80 of 120 bytes free"):
        arena.allocate(11)


# --- slots ---------------------------------------------------------------------------------------


def test_what_is_put_is_read_back_from_its_slot() -> None:
    slab, adapter = make_slab(), make_adapter(1)
    assert_plays(slab, slab.put(pack(adapter)), adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_resident_exactly(dtype: torch.dtype) -> None:
    slab, adapter = make_slab(), make_adapter(1, dtype=dtype)
    delta = slab.layer("m").delta(slab.put(pack(adapter)))
    assert delta is not None
    assert torch.equal(delta.values, adapter.modules["m"].values.float())


def test_columns_past_32767_are_resident_as_they_are() -> None:
    wide = SparseDelta.from_flat(torch.tensor([65_535]), torch.ones(1), shape=(1, 65_536))
    slab = Slab({"wide": (1, 65_536)}, slots=1, budget=1 << 10, device=CPU)
    delta = slab.layer("wide").delta(slab.put(pack(Adapter(info(), {"wide": wide}))))
    assert delta is not None
    assert delta.columns.tolist() == [65_535]


def test_a_layer_the_adapter_does_not_touch_has_no_delta() -> None:
    slab = make_slab()
    slot = slab.put(pack(Adapter(info(), {"n": make_adapter(1).modules["n"]})))
    assert slab.layer("m").delta(slot) is None
    assert slab.layer("n").delta(slot) is not None


def test_a_layers_view_follows_what_comes_and_goes_after_it_was_taken() -> None:
    slab, adapter = make_slab(), make_adapter(1)
    layer = slab.layer("m")
    host_table, host_floats = layer.host_table, layer.host_arena[1]
    assert layer.delta(0) is None

    slot = slab.put(pack(adapter))
    delta = layer.delta(slot)
    assert delta is not None
    assert torch.equal(delta.dense(torch.float32), adapter.modules["m"].dense(torch.float32))
    first_value = host_table[slot, 2]
    assert host_floats[first_value] == adapter.modules["m"].values[0].item()

    slab.remove(slot)
    assert layer.delta(slot) is None
    assert (host_table[slot] == -1).all()


def test_two_adapters_do_not_disturb_each_other() -> None:
    slab, first, second = make_slab(), make_adapter(1), make_adapter(2)
    a = slab.put(pack(first))
    b = slab.put(pack(second))
    assert a != b
    assert_plays(slab, a, first)
    assert_plays(slab, b, second)
    slab.remove(a)
    assert_plays(slab, b, second)


def test_a_removed_adapters_slot_and_memory_are_used_again() -> None:
    size = pack(make_adapter(1)).nbytes
    slab = Slab(SHAPES, slots=1, budget=size, device=CPU)
    for seed in range(5):
        adapter = make_adapter(seed)
        slot = slab.put(pack(adapter))
        assert_plays(slab, slot, adapter)
        slab.remove(slot)


def test_a_reused_slot_forgets_the_layers_of_the_one_before() -> None:
    slab, adapter = make_slab(slots=1), make_adapter(1)
    slab.remove(slab.put(pack(adapter)))
    slot = slab.put(pack(Adapter(info(), {"n": adapter.modules["n"]})))
    assert slab.layer("m").delta(slot) is None


def test_no_free_slot_is_said_with_their_number() -> None:
    slab = make_slab(slots=2)
    for seed in range(2):
        slab.put(pack(make_adapter(seed)))
    with pytest.raises(ArenaFull, match="free slot, got all 2 in use"):
        slab.put(pack(make_adapter(2)))


def test_an_adapter_that_does_not_fit_takes_neither_slot_nor_memory() -> None:
    packed = pack(make_adapter(1))
    slab = Slab(SHAPES, slots=1, budget=packed.nbytes - WORD, device=CPU)
    with pytest.raises(ArenaFull, match=f"{packed.nbytes} bytes in one piece"):
        slab.put(packed)
    assert slab.arena.free_words == packed.nbytes // WORD - 1
    small = Adapter(info(), {"n": make_adapter(1).modules["n"]})
    assert slab.put(pack(small)) == 0


def test_a_packed_adapters_bytes_are_the_arenas() -> None:
    slab, packed = make_slab(), pack(make_adapter(1))
    before = slab.arena.free_words
    slab.put(packed)
    assert (before - slab.arena.free_words) * WORD == packed.nbytes


def test_threads_may_put_and_remove_at_once() -> None:
    slab = make_slab(slots=8, adapters=6)  # sometimes short of memory too
    before = slab.arena.free_words

    def churn(seed: int) -> None:
        adapter = make_adapter(seed)
        packed = pack(adapter)
        for _ in range(60):
            try:
                slot = slab.put(packed)
            except ArenaFull:
                continue
            assert_plays(slab, slot, adapter)
            slab.remove(slot)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within a line
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(churn, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert slab.arena.free_words == before
    assert slab.arena.allocate(before) == 0
    assert not any(slab.layer("m").delta(slot) for slot in range(8))


def longest_gap(held: list[tuple[int, int]], size: int) -> int:
    taken = {word for start, length in held for word in range(start, start + length)}
    longest = run = 0
    for word in range(size):
        run = 0 if word in taken else run + 1
        longest = max(longest, run)
    return longest


def info() -> AdapterInfo:
    return AdapterInfo(base_model="b", base_fingerprint="f", method="random", density=0.5)


def make_adapter(seed: int, *, dtype: torch.dtype = torch.float32) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for module, (height, width) in SHAPES.items():
        positions = torch.randperm(height * width, generator=generator)[: height * width // 2]
        values = torch.randn(positions.numel(), generator=generator).to(dtype)
        modules[module] = SparseDelta.from_flat(positions, values, shape=(height, width))
    return Adapter(info(), modules)


def make_slab(*, slots: int = 4, adapters: int = 4) -> Slab:
    """Make a slab with room for so many adapters, its memory NaN."""
    budget = adapters * pack(make_adapter(0)).nbytes
    slab = Slab(SHAPES, slots=slots, budget=budget, device=CPU)
    slab.arena.words.view(torch.float32).fill_(float("nan"))
    return slab


def assert_plays(slab: Slab, slot: int, adapter: Adapter) -> None:
    for module, expected in adapter.modules.items():
        delta = slab.layer(module).delta(slot)
        assert delta is not None
        assert delta.shape == expected.shape
        assert torch.equal(delta.dense(torch.float32), expected.dense(torch.float32))
