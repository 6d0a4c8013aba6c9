"""Gradients cut into chunks whatever the tiles, and the largest of a whole update kept."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from spieldose_kernels import support_product
from spieldose_trainer.updaters.chunked_gradient import ChunkedGradient, gradient_chunks

CPU = torch.device("cpu")


@pytest.mark.parametrize("tile", [1, 20, 60, 1 << 20])
@pytest.mark.parametrize("chunk", [4, 10, 16, 1000])
def test_chunks_are_cut_row_major_and_padded_whatever_the_tiles(
    monkeypatch: pytest.MonkeyPatch, tile: int, chunk: int
) -> None:
    monkeypatch.setattr(support_product, "TILE", tile)
    x, dy = torch.randn(10, 3), torch.randn(7, 3)
    blocks = list(gradient_chunks(dy, x, chunk=chunk))
    dense = (dy @ x.t()).flatten()
    expected = F.pad(dense, (0, -dense.numel() % chunk)).view(-1, chunk)
    torch.testing.assert_close(torch.cat([block for _, block in blocks]), expected)
    starts = [first for first, _ in blocks]
    assert starts == [sum(len(b) for _, b in blocks[:i]) for i in range(len(blocks))]


def test_no_block_is_larger_than_a_tile_and_what_was_left_of_the_last() -> None:
    x, dy = torch.ones(600, 1), torch.ones(3000, 1)
    blocks = [block.numel() for _, block in gradient_chunks(dy, x, chunk=1024)]
    assert len(blocks) > 1
    assert max(blocks) < support_product.TILE + 1024


@pytest.mark.parametrize("passes", [1, 3])
def test_the_largest_of_an_updates_whole_gradient_are_taken(passes: int) -> None:
    gradient = ChunkedGradient(70, chunk=8, count=2, device=CPU)
    x, dy = torch.randn(10, 6), torch.randn(7, 6)
    for x_part, dy_part in zip(x.chunk(passes, 1), dy.chunk(passes, 1), strict=True):
        gradient.observe(x_part, dy_part)
    positions, values = taken(gradient)
    dense = F.pad((dy @ x.t()).flatten(), (0, 2)).view(-1, 8)
    expected = dense.abs().topk(2).indices
    assert torch.equal(positions.sort().values, expected.sort().values)
    torch.testing.assert_close(values, dense.gather(1, positions))


def test_an_entry_small_in_each_pass_is_taken_if_its_sum_is_large() -> None:
    gradient = ChunkedGradient(6, chunk=6, count=1, device=CPU)
    for number in range(3):  # position 5 has 2 in every pass; 0, 1 and 2 have 3 in one each
        row = torch.zeros(1, 6)
        row[0, number], row[0, 5] = 3.0, 2.0
        gradient.observe(row.t(), torch.ones(1, 1))
    positions, values = taken(gradient)
    assert (positions.item(), values.item()) == (5, 6.0)


def test_taking_begins_a_new_update() -> None:
    gradient = ChunkedGradient(4, chunk=4, count=1, device=CPU)
    gradient.observe(torch.tensor([[9.0], [0.0], [0.0], [0.0]]), torch.ones(1, 1))
    gradient.take()
    assert gradient.take() is None
    gradient.observe(torch.tensor([[1.0], [0.0], [0.0], [0.0]]), torch.ones(1, 1))
    assert taken(gradient)[1].item() == 1.0


def test_two_ranks_keep_what_one_process_with_both_batches_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)  # where the ranks find their module too
    ranks = importlib.import_module("two_compressing_ranks")
    torch.multiprocessing.spawn(ranks.gather, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    passes = [
        (torch.cat([x, other_x], 1), torch.cat([dy, other_dy], 1) / 2)
        for (x, dy), (other_x, other_dy) in zip(ranks.inputs(0), ranks.inputs(1), strict=True)
    ]
    for name, expected in ranks.largest(passes).items():
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(first[name], second[name])


def taken(gradient: ChunkedGradient) -> tuple[torch.Tensor, torch.Tensor]:
    found = gradient.take()
    assert found is not None
    return found
