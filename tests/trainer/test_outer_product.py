"""The largest products of two vectors, found without the matrix, are those of the matrix."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_trainer.selectors.outer_product import largest_products

# few distinct values make ties, the tiny ones products that float32 cannot hold
VECTORS = st.lists(st.sampled_from([0.0, 1e-38, 0.1, 0.3, 1.0, 7.0]), min_size=1, max_size=8)


@settings(deadline=None, max_examples=300)
@given(VECTORS, VECTORS, st.integers(0, 70), st.integers(0, 999))
def test_they_are_the_largest_of_the_matrix_that_are_not_excluded(
    row: list[float], column: list[float], count: int, seed: int
) -> None:
    check(torch.tensor(row), torch.tensor(column), count, seed)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 400), st.integers(0, 999))
def test_so_it_is_for_vectors_without_ties(height: int, width: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    row, column = (torch.rand(size, generator=generator) for size in (height, width))
    check(row, column, count, seed)


def test_two_vectors_of_the_same_numbers_tie_in_pairs() -> None:
    """As SM3's accumulators do where one entry's gradient is the largest of its row and column."""
    for seed in range(140):
        draw = torch.Generator().manual_seed(seed)
        row, _ = (torch.rand(12, generator=draw) for _ in range(2))
        row = row.square()
        matrix = torch.outer(row.double(), row.flip(0).double()).flatten()
        draw.manual_seed(seed)
        count = int(torch.randint(1, 140, (), generator=draw))
        found = largest_products(row, row.flip(0), count=count, excluded=nothing())
        best = matrix.sort(descending=True, stable=True).indices[:count]
        assert torch.equal(found, best.sort().values)


def test_among_equal_products_there_are_no_more_than_asked_for() -> None:
    found = largest_products(torch.ones(1000), torch.ones(1000), count=5, excluded=nothing())
    assert found.unique().numel() == 5


def test_a_product_of_zero_is_never_among_them() -> None:
    row, column = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0, 1.0])
    assert largest_products(row, column, count=6, excluded=nothing()).tolist() == [3, 5]
    assert largest_products(torch.zeros(3), column, count=2, excluded=nothing()).numel() == 0


def check(row: torch.Tensor, column: torch.Tensor, count: int, seed: int) -> None:
    matrix = torch.outer(row.double(), column.double()).flatten()
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(0, matrix.numel() + 1, (), generator=generator))
    excluded = torch.randperm(matrix.numel(), generator=generator)[:size].sort().values
    found = largest_products(row, column, count=count, excluded=excluded)
    free = matrix.index_fill(0, excluded, 0.0)
    best = free.sort(descending=True, stable=True).indices[: min(count, int((free > 0).sum()))]
    assert torch.equal(found, best.sort().values)  # of equal ones the first


def nothing() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)
