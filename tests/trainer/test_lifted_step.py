"""What a support can use of a step lifted from low rank, against the dense step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spieldose_kernels import support_product
from spieldose_trainer.updaters.lifted_step import entries_that_matter


@pytest.mark.parametrize("tile", [1, 24, 1 << 20])
def test_entries_at_the_support_and_the_largest_elsewhere_matter(
    monkeypatch: pytest.MonkeyPatch, make_trainable: Callable[..., Any], tile: int
) -> None:
    monkeypatch.setattr(support_product, "TILE", tile)
    shape, held = (6, 8), torch.tensor([0, 9, 10, 47])
    layer = make_trainable(held, shape=shape)
    x, dy = torch.randn(8, 2), torch.randn(6, 2)
    positions, numbers = entries_that_matter(x, dy, layer)
    dense = (dy @ x.t()).flatten()
    elsewhere = dense.index_fill(0, held, 0.0).abs().topk(4).indices
    assert {*held.tolist(), *elsewhere.tolist()} <= set(positions.tolist())
    assert bool((positions.diff() > 0).all())
    torch.testing.assert_close(numbers, dense[positions])


def test_a_support_does_not_hide_what_is_smaller_elsewhere(
    make_trainable: Callable[..., Any],
) -> None:
    layer = make_trainable(torch.tensor([0, 1, 2, 3]), shape=(2, 4))
    layer.values.data.copy_(torch.tensor([-9.0, -8.0, -7.0, -6.0]))  # the change takes them to 0
    x, dy = torch.tensor([[9.0], [8.0], [7.0], [6.0]]), torch.tensor([[1.0], [0.1]])
    positions, _ = entries_that_matter(x, dy, layer)
    assert positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_what_no_delta_would_give_way_to_does_not_matter(
    make_trainable: Callable[..., Any],
) -> None:
    layer = make_trainable(torch.tensor([0, 3, 7]), shape=(2, 4))
    layer.values.data.copy_(torch.tensor([4.0, 5.0, 3.0]))  # 2, 7 and 2.1 after the change
    x, dy = torch.tensor([[1.0], [2.1], [5.0], [-1.0]]), torch.tensor([[-2.0], [0.9]])
    positions, numbers = entries_that_matter(x, dy, layer)
    assert dict(zip(positions.tolist(), numbers.tolist(), strict=True)) == pytest.approx(
        {0: -2.0, 1: -4.2, 2: -10.0, 3: 2.0, 6: 4.5, 7: -0.9}
    )


def test_no_position_matters_twice_when_little_moves(make_trainable: Callable[..., Any]) -> None:
    layer = make_trainable(torch.tensor([0, 1, 2, 3]), shape=(2, 3))
    x, dy = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[0.0], [5.0]])
    positions, numbers = entries_that_matter(x, dy, layer)
    assert positions.tolist() == [0, 1, 2, 3, 5]  # the others do not move
    assert numbers.tolist() == [0.0, 0.0, 0.0, 5.0, 10.0]
