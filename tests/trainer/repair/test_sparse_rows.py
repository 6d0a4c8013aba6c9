"""Few entries stand for dense rows as well as they can, on the inputs a layer sees."""

import pytest
import torch

from spieldose_trainer.repair import sparse_rows as module
from spieldose_trainer.repair.sparse_rows import sparse_rows

ROWS, WIDTH, TOKENS = 12, 40, 300


@pytest.fixture
def inputs() -> torch.Tensor:
    """Correlated inputs [C, T], a few features of which are much larger than the others."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, 6, generator=generator)
    noise = torch.randn(WIDTH, TOKENS, generator=generator)
    scale = torch.ones(WIDTH, 1)
    scale[[3, 17]] = 20
    return scale * (mixing @ torch.randn(6, TOKENS, generator=generator) + 0.3 * noise)


@pytest.fixture
def dense() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def spread(columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    assert all(len(set(row)) == len(row) for row in columns.tolist())
    return torch.zeros(len(columns), WIDTH).scatter_(1, columns, values)


def left(dense: torch.Tensor, delta: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return ((dense - delta) @ inputs).square().sum(1)


def test_one_entry_is_the_best_there_is(
    inputs: torch.Tensor, dense: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RIDGE", 1e-9)
    columns, values = sparse_rows(dense, inputs @ inputs.t(), count=1)
    found = left(dense, spread(columns, values), inputs)
    for column in range(WIDTH):
        x = inputs[column]
        value = (dense @ inputs) @ x / x.square().sum()  # least squares, by this column alone
        other = torch.zeros_like(dense)
        other[:, column] = value
        assert (found <= 1.001 * left(dense, other, inputs)).all()


def test_values_are_the_least_squares_at_their_columns(
    inputs: torch.Tensor, dense: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RIDGE", 1e-9)
    columns, values = sparse_rows(dense, inputs @ inputs.t(), count=5)
    for row in range(ROWS):
        x, y = inputs[columns[row]].double().t(), (dense[row] @ inputs).double()
        exact = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        torch.testing.assert_close(values[row].double(), exact, rtol=1e-2, atol=1e-2)


def test_every_entry_gives_the_rows_themselves(
    inputs: torch.Tensor, dense: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RIDGE", 1e-9)
    delta = spread(*sparse_rows(dense, inputs @ inputs.t(), count=WIDTH))
    assert (left(dense, delta, inputs) < 1e-6 * left(dense, torch.zeros(1), inputs)).all()


@pytest.mark.parametrize("count", [2, 5, 30])
def test_more_is_mended_than_by_putting_the_same_entries_right(
    inputs: torch.Tensor, dense: torch.Tensor, count: int
) -> None:
    """The largest e²·‖x‖², put right one by one, know nothing of what inputs share."""
    columns, values = sparse_rows(dense, inputs @ inputs.t(), count=count)
    assert columns.shape == values.shape == (ROWS, count)
    largest = (dense.square() * inputs.square().sum(1)).topk(count).indices
    plain = spread(largest, dense.gather(1, largest))
    found = left(dense, spread(columns, values), inputs).sum()
    assert found < 0.7 * left(dense, plain, inputs).sum()


def test_blocks_of_rows_find_what_all_rows_find(
    inputs: torch.Tensor, dense: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gram = inputs @ inputs.t()
    whole = spread(*sparse_rows(dense, gram, count=4))
    monkeypatch.setattr(module, "TILE", 5 * WIDTH)
    torch.testing.assert_close(spread(*sparse_rows(dense, gram, count=4)), whole)


def test_inputs_that_are_hardly_ever_there_carry_no_large_corrections(
    inputs: torch.Tensor, dense: torch.Tensor
) -> None:
    inputs[[3, 17]] /= 20
    shared = torch.linalg.svd(inputs).Vh[:6]  # what inputs have in common
    inputs[5:11] = 0.02 * inputs[4].norm() * shared  # say it best, and very faintly
    _, values = sparse_rows(dense, inputs @ inputs.t(), count=6)
    assert values.abs().max() < 10 * dense.abs().max()


def test_inputs_that_are_never_there_do_no_harm(dense: torch.Tensor) -> None:
    inputs = torch.zeros(WIDTH, TOKENS)
    inputs[0] = 1.0
    columns, values = sparse_rows(dense, inputs @ inputs.t(), count=3)
    assert values.isfinite().all()
    delta = spread(columns, values)
    torch.testing.assert_close(delta[:, 0], dense[:, 0], rtol=1e-2, atol=1e-2)
