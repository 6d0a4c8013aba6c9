"""The largest numbers of many rows at once are those that sorting every row finds."""

import pytest
import torch

from spieldose_trainer.updaters.largest_in_rows import largest_in_rows


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("width", [1024, 256, 128, 40, 33, 16])
def test_the_largest_are_found_wherever_they_are(width: int, count: int) -> None:
    x = torch.randn(500, width, generator=torch.Generator().manual_seed(width + count))

    found = largest_in_rows(x, count)

    assert found.shape == (500, count)
    expected = x.sort(dim=1, descending=True).values[:, :count]
    assert torch.equal(x.gather(1, found).sort(dim=1, descending=True).values, expected)


@pytest.mark.parametrize("count", [1, 16])
def test_equal_numbers_are_found_once_each(count: int) -> None:
    found = largest_in_rows(torch.zeros(50, 1024), count)

    assert all(len(set(row)) == count for row in found.tolist())


def test_a_row_whose_largest_share_a_group_keeps_them_all() -> None:
    x = torch.zeros(1, 1024)
    together = torch.arange(8) * 128 + 5
    x[0, together] = torch.arange(1.0, 9.0)

    found = largest_in_rows(x, 8)

    assert sorted(found[0].tolist()) == together.tolist()
