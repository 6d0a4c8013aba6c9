"""The largest entries of a vector seen in blocks are those of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels.support_product import TILE, gradient_tiles
from spieldose_kernels.top_k import TopK


@settings(deadline=None)
@given(
    st.integers(0, 60), st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(0, 1000)
)
def test_blocks_give_what_the_whole_vector_gives(count: int, lengths: list[int], seed: int) -> None:
    whole = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))
    positions, values = shown(whole, lengths, count)
    expected = whole.abs().topk(min(count, whole.numel())).indices.sort().values
    assert torch.equal(positions, expected)
    assert torch.equal(values, whole[expected])


def test_zeros_are_kept_when_there_is_room_for_all() -> None:
    positions, values = shown(torch.zeros(10), [4, 6], 20)
    assert positions.tolist() == list(range(10))
    assert values.tolist() == [0.0] * 10


@pytest.mark.parametrize("lengths", [[100], [10] * 10, [3] * 33 + [1]])
def test_of_equal_values_the_first_are_taken(lengths: list[int]) -> None:
    positions, _ = shown(torch.ones(100).index_fill(0, torch.tensor([50, 97]), -2.0), lengths, 7)
    assert positions.tolist() == [0, 1, 2, 3, 4, 50, 97]


def test_what_is_not_a_number_is_never_among_the_largest() -> None:
    whole = torch.tensor([1.0, float("nan"), 3.0, float("nan"), 2.0])
    for lengths in ([2, 3], [5]):
        assert shown(whole, lengths, 2)[0].tolist() == [2, 4]


def test_the_tiles_of_a_gradient_make_it_whole_and_stay_small() -> None:
    y, x = torch.randn(5, 3), torch.randn(TILE // 2, 3)
    tiles = dict(gradient_tiles(y, x))
    assert list(tiles) == [0, 2, 4]
    assert max(tile.numel() for tile in tiles.values()) <= TILE
    torch.testing.assert_close(torch.cat(list(tiles.values())), y @ x.t())


def test_a_row_longer_than_a_tile_is_a_tile() -> None:
    y, x = torch.randn(3, 1), torch.randn(TILE + 1, 1)
    assert [tile.shape[0] for _, tile in gradient_tiles(y, x)] == [1, 1, 1]


def shown(whole: torch.Tensor, lengths: list[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    top, first = TopK(count), 0
    for block in whole.split(lengths):
        top.show(block, first=first)
        first += block.numel()
    return top.largest()
