"""The slab gives out memory and slots without overlap, and takes all of it back."""

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_char
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.errors import ArenaFull
from spieldose_kernels.slab import Arena, LayerSlab, Slab
from spieldose_kernels.sliced import ALIGNMENT, FIELDS, PackedAdapter, SlicedDelta, pack

CPU = torch.device("cpu")
SHAPES = {"m": (5, 7), "n": (3, 4)}
DTYPES = [torch.bfloat16, torch.float32]

# --- arena ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_extents_never_overlap_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    arena, held = make_arena(100), []
    for allocates, number in steps:
        if allocates:
            try:
                held.append((arena.allocate(number * ALIGNMENT) // ALIGNMENT, number))
            except ArenaFull:
                assert longest_gap(held, 100) < number
        elif held:
            give_back(arena, *held.pop(number % len(held)))
        used = [line for start, length in held for line in range(start, start + length)]
        assert len(used) == len(set(used))
        assert all(0 <= line < 100 for line in used)
        assert arena.free_bytes == (100 - len(used)) * ALIGNMENT
    for extent in held:
        give_back(arena, *extent)
    assert arena.allocate(100 * ALIGNMENT) == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_neighbours_grow_together_in_whatever_order_they_are_freed(order: tuple[int, ...]) -> None:
    arena = make_arena(30)
    starts = [arena.allocate(10 * ALIGNMENT) for _ in range(3)]
    for i in order:
        arena.free(starts[i], 10 * ALIGNMENT)
    assert arena.allocate(30 * ALIGNMENT) == 0


def test_the_first_gap_that_fits_is_taken() -> None:
    arena = full_arena(3, 10)
    give_back(arena, 20, 10)
    give_back(arena, 0, 10)
    assert arena.allocate(5 * ALIGNMENT) == 0
    assert arena.allocate(6 * ALIGNMENT) == 20 * ALIGNMENT


def test_a_full_arena_says_what_was_asked_and_what_is_free() -> None:
    arena = make_arena(10)
    arena.allocate(6 * ALIGNMENT)
    with pytest.raises(ArenaFull, match=r"room for 320 bytes .* got 256 of 640 bytes free"):
        arena.allocate(5 * ALIGNMENT)


def test_a_refused_allocation_takes_nothing() -> None:
    arena = make_arena(10)
    with pytest.raises(ArenaFull):
        arena.allocate(11 * ALIGNMENT)
    assert arena.allocate(10 * ALIGNMENT) == 0


def test_room_in_pieces_is_not_room_in_one() -> None:
    arena = full_arena(3, 10)
    give_back(arena, 0, 10)
    give_back(arena, 20, 10)
    with pytest.raises(ArenaFull, match="in one piece, got 1280 of 1920 bytes free"):
        arena.allocate(11 * ALIGNMENT)


@pytest.mark.parametrize(("size", "whole"), [(0, 0), (63, 0), (64, 64), (191, 128)])
def test_an_arena_is_whole_lines_and_no_more_than_its_budget(size: int, whole: int) -> None:
    arena = Arena(size, CPU)
    assert arena.memory.nbytes == arena.free_bytes == whole
    assert arena.memory.data_ptr() % ALIGNMENT == 0
    with pytest.raises(ArenaFull):
        arena.allocate(whole + ALIGNMENT)


# --- slots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_put_is_read_back_from_its_slot(dtype: torch.dtype) -> None:
    slab, adapter = make_slab(dtype=dtype), make_adapter(1)
    assert_plays(slab, slab.put(pack(adapter, dtype)), adapter)


@pytest.mark.parametrize("resident", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_resident_as_the_slabs_dtype_has_them(
    dtype: torch.dtype, resident: torch.dtype
) -> None:
    slab, adapter = make_slab(dtype=resident), make_adapter(1, dtype=dtype)
    delta = slab.layer("m").delta(slab.put(pack(adapter, resident)))
    assert delta is not None
    assert delta.values.dtype == resident
    expected = adapter.modules["m"].values.to(resident).float()
    assert torch.equal(delta.values[delta.values != 0].float().sort()[0], expected.sort()[0])


@pytest.mark.parametrize(
    ("shape", "last"), [((1, 65_536), (0, 65_535)), ((65_536, 1), (65_535, 0))]
)
def test_rows_and_columns_past_32767_are_resident_as_they_are(
    shape: tuple[int, int], last: tuple[int, int]
) -> None:
    delta = SparseDelta.from_flat(torch.tensor([65_535]), torch.ones(1), shape=shape)
    slab = Slab({"long": shape}, slots=1, budget=1 << 10, dtype=torch.float32, device=CPU)
    slot = slab.put(pack(Adapter(INFO, {"long": delta}), torch.float32))
    resident = slab.layer("long").delta(slot)
    assert resident is not None
    row, column, _ = (array[0].item() for array in resident.entries())
    assert (row, column) == last


def test_the_layers_are_those_the_slab_was_made_for() -> None:
    slab = make_slab()
    assert slab.modules == ["m", "n"]
    assert [slab.layer(module).shape for module in slab.modules] == [(5, 7), (3, 4)]


def test_a_layer_the_adapter_does_not_touch_has_no_delta() -> None:
    slab = make_slab()
    slot = slab.put(packed(Adapter(INFO, {"n": make_adapter(1).modules["n"]})))
    assert slab.layer("m").delta(slot) is None
    assert slab.layer("n").delta(slot) is not None


def test_a_delta_without_entries_is_none() -> None:
    slab, adapter = make_slab(), make_adapter(1)
    none = SparseDelta.from_flat(torch.tensor([]).long(), torch.tensor([]), shape=SHAPES["m"])
    slot = slab.put(packed(Adapter(INFO, {"m": none, "n": adapter.modules["n"]})))
    assert slab.layer("m").delta(slot) is None
    assert_plays(slab, slot, Adapter(INFO, {"n": adapter.modules["n"]}))


def test_an_adapter_without_modules_takes_a_slot_and_no_memory() -> None:
    slab = make_slab(slots=2)
    before = slab.arena.free_bytes
    empty = slab.put(packed(Adapter(INFO, {})))
    assert slab.arena.free_bytes == before
    other = slab.put(packed(make_adapter(1)))
    assert other != empty
    slab.remove(empty)
    assert_plays(slab, other, make_adapter(1))
    slab.remove(other)
    assert slab.arena.allocate(before) == 0


def test_a_layers_view_follows_what_comes_and_goes_after_it_was_taken() -> None:
    slab, adapter = make_slab(), make_adapter(1)
    layer = slab.layer("n")
    assert layer.delta(0) is None

    slot = slab.put(packed(adapter))
    delta = layer.delta(slot)
    assert delta is not None
    assert torch.equal(dense(delta, SHAPES["n"]), adapter.modules["n"].dense(torch.float32))

    slab.remove(slot)
    assert layer.delta(slot) is None
    assert (layer.table == 0).all()


def test_compiled_code_sees_at_a_layers_addresses_what_comes_and_goes() -> None:
    slab, adapter = make_slab(), make_adapter(1)
    layer = slab.layer("n")
    table, arena = memory_of(layer)
    slot = slab.put(packed(adapter))
    assert tuple(table[slot]) == tuple(layer.table[slot].tolist())
    delta = layer.delta(slot)
    assert delta is not None
    for offset, array in zip(table[slot][3:], arrays(delta), strict=True):
        seen = arena[offset : offset + array.nbytes]
        assert seen.tobytes() == array.view(torch.uint8).numpy().tobytes()

    slab.remove(slot)
    assert not table.any()


def test_two_adapters_do_not_disturb_each_other() -> None:
    slab, first, second = make_slab(), make_adapter(1), make_adapter(2)
    a = slab.put(packed(first))
    b = slab.put(packed(second))
    assert a != b
    assert_plays(slab, a, first)
    assert_plays(slab, b, second)
    slab.remove(a)
    assert_plays(slab, b, second)


def test_a_removed_adapters_slot_and_memory_are_used_again() -> None:
    adapters = [make_adapter(seed) for seed in range(5)]
    size = max(packed(adapter).nbytes for adapter in adapters)
    slab = Slab(SHAPES, slots=1, budget=size, dtype=torch.float32, device=CPU)
    for adapter in adapters:
        slot = slab.put(packed(adapter))
        assert_plays(slab, slot, adapter)
        slab.remove(slot)


def test_a_reused_slot_forgets_the_layers_of_the_one_before() -> None:
    slab, adapter = make_slab(slots=1), make_adapter(1)
    slab.remove(slab.put(packed(adapter)))
    slot = slab.put(packed(Adapter(INFO, {"n": adapter.modules["n"]})))
    assert slab.layer("m").delta(slot) is None


def test_no_free_slot_is_said_with_their_number() -> None:
    slab = make_slab(slots=2)
    for seed in range(2):
        slab.put(packed(make_adapter(seed)))
    with pytest.raises(ArenaFull, match="free slot, got all 2 in use"):
        slab.put(packed(make_adapter(2)))


def test_an_adapter_that_does_not_fit_takes_neither_slot_nor_memory() -> None:
    large = packed(make_adapter(1))
    slab = Slab(SHAPES, slots=1, budget=large.nbytes - 1, dtype=torch.float32, device=CPU)
    with pytest.raises(ArenaFull, match=f"{large.nbytes} bytes in one piece"):
        slab.put(large)
    assert slab.arena.free_bytes == large.nbytes - ALIGNMENT
    small = Adapter(INFO, {"n": make_adapter(1).modules["n"]})
    assert slab.put(packed(small)) == 0


def test_a_packed_adapters_bytes_are_the_arenas() -> None:
    slab, adapter = make_slab(), packed(make_adapter(1))
    before = slab.arena.free_bytes
    slab.put(adapter)
    assert before - slab.arena.free_bytes == adapter.nbytes == adapter.memory.nbytes


def test_every_array_is_aligned_wherever_in_the_arena_it_lies() -> None:
    slab = make_slab(slots=6, adapters=6)
    small = Adapter(INFO, {"n": make_adapter(1).modules["n"]})
    first = slab.put(packed(small))
    slots = [slab.put(packed(make_adapter(seed))) for seed in range(4)]
    slab.remove(first)
    slots += [slab.put(packed(make_adapter(4)))]
    for slot in slots:
        delta = slab.layer("m").delta(slot)
        assert delta is not None
        assert all(array.data_ptr() % 64 == 0 for array in arrays(delta))


def test_a_resident_delta_is_no_copy() -> None:
    slab, adapter = make_slab(), make_adapter(1)
    layer, slot = slab.layer("m"), slab.put(packed(adapter))
    first, second = layer.delta(slot), layer.delta(slot)
    assert first is not None and second is not None
    first.values.fill_(2.5)
    assert (second.values == 2.5).all()


def test_threads_may_put_and_remove_at_once() -> None:
    slab = make_slab(slots=8, adapters=6)  # sometimes short of memory too
    before = slab.arena.free_bytes

    def churn(seed: int) -> None:
        adapter = make_adapter(seed)
        piece = packed(adapter)
        for _ in range(60):
            try:
                slot = slab.put(piece)
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
    assert slab.arena.free_bytes == before
    assert slab.arena.allocate(before) == 0
    assert not any(slab.layer("m").delta(slot) for slot in range(8))


def test_threads_take_turns_at_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    slab, piece, busy = make_slab(), packed(make_adapter(1)), threading.Lock()

    def alone(work: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*extent: int) -> object:
            assert busy.acquire(blocking=False), "two threads are at the arena at once"
            try:
                time.sleep(1e-3)  # long enough for another to come
                return work(*extent)
            finally:
                busy.release()

        return wrapped

    monkeypatch.setattr(slab.arena, "allocate", alone(slab.arena.allocate))
    monkeypatch.setattr(slab.arena, "free", alone(slab.arena.free))

    def churn(_: int) -> None:
        for _ in range(8):
            slab.remove(slab.put(piece))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(churn, range(4)))


INFO = AdapterInfo(base_model="b", base_fingerprint="f", method="random", density=0.5)


def make_arena(lines: int) -> Arena:
    """Make an arena of so many times ALIGNMENT bytes."""
    return Arena(lines * ALIGNMENT, CPU)


def full_arena(extents: int, lines: int) -> Arena:
    """Make an arena with nothing free, handed out in extents of so many lines."""
    arena = make_arena(extents * lines)
    for _ in range(extents):
        arena.allocate(lines * ALIGNMENT)
    return arena


def give_back(arena: Arena, start: int, length: int) -> None:
    """Free an extent given in lines."""
    arena.free(start * ALIGNMENT, length * ALIGNMENT)


def longest_gap(held: list[tuple[int, int]], size: int) -> int:
    taken = {line for start, length in held for line in range(start, start + length)}
    longest = run = 0
    for line in range(size):
        run = 0 if line in taken else run + 1
        longest = max(longest, run)
    return longest


def make_adapter(seed: int, *, dtype: torch.dtype = torch.float32) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for module, (height, width) in SHAPES.items():
        positions = torch.randperm(height * width, generator=generator)[: height * width // 2]
        values = torch.randn(positions.numel(), generator=generator).to(dtype)
        modules[module] = SparseDelta.from_flat(positions, values, shape=(height, width))
    return Adapter(INFO, modules)


def packed(adapter: Adapter) -> PackedAdapter:
    return pack(adapter, torch.float32)


def make_slab(*, slots: int = 4, adapters: int = 4, dtype: torch.dtype = torch.float32) -> Slab:
    """Make a slab with room for so many adapters, its memory NaN."""
    budget = adapters * max(packed(make_adapter(seed)).nbytes for seed in range(10))
    slab = Slab(SHAPES, slots=slots, budget=budget, dtype=dtype, device=CPU)
    slab.arena.memory.fill_(0xFF)
    return slab


def memory_of(layer: LayerSlab) -> tuple[np.ndarray, np.ndarray]:
    """Return the layer's table [A, FIELDS] int64 and the arena [n] uint8, from their addresses."""
    arena, table = layer.addresses
    raw = (c_char * layer.table.nbytes).from_address(table)
    everything = (c_char * layer.memory.nbytes).from_address(arena)
    return np.frombuffer(raw, np.int64).reshape(-1, FIELDS), np.frombuffer(everything, np.uint8)


def arrays(delta: SlicedDelta) -> list[torch.Tensor]:
    """Return starts, rows, columns and values."""
    return [getattr(delta, field.name) for field in fields(delta)[1:]]


def dense(delta: SlicedDelta, shape: tuple[int, int]) -> torch.Tensor:
    rows, columns, values = delta.entries()
    return torch.zeros(shape).index_put_((rows, columns), values.float(), accumulate=True)


def assert_plays(slab: Slab, slot: int, adapter: Adapter) -> None:
    for module, expected in adapter.modules.items():
        delta = slab.layer(module).delta(slot)
        assert delta is not None
        exact = expected.dense(slab.dtype).float()
        assert torch.equal(dense(delta, slab.layer(module).shape), exact)
