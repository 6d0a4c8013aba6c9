"""Projections of chunks, and how surely sparse chunks come back from them."""

import numpy as np
import pytest
import torch

from spieldose_trainer.errors import ConfigError
from spieldose_trainer.updaters.compression import Compression
from spieldose_trainer.updaters.sketch import Sketch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kept", "chunk"), [(1, 1024), (2, 1024), (4, 1024), (8, 1024), (4, 256), (4, 4096)]
)
def test_sparse_chunks_come_back_at_the_default_width(kept: int, chunk: int) -> None:
    width = Compression(kept=kept, chunk=chunk).width
    assert recovered(kept, chunk, width, equal=False) == 1.0
    assert recovered(kept, chunk, width, equal=True) >= 0.997  # hardest: entries of equal size


@pytest.mark.parametrize(("kept", "chunk"), [(4, 16), (4, 8), (32, 64)])
def test_chunks_that_are_not_compressed_all_come_back(kept: int, chunk: int) -> None:
    assert Compression(kept=kept, chunk=chunk).width == chunk
    assert recovered(kept, chunk, chunk, equal=True) == 1.0


def test_half_the_default_width_does_not_recover_entries_of_equal_size() -> None:
    width = Compression().width // 2  # 2·s·ln(d/s), as PAPERS has it
    assert recovered(4, 1024, width, equal=True) < 0.95


def test_the_default_width_is_what_its_formula_says() -> None:
    assert Compression().width == 89
    assert Compression(measurements=50).width == 50
    assert Compression(chunk=8, kept=4).width == 8  # never more numbers than weights


def test_pursuit_finds_what_an_explicit_one_finds_in_chunks_that_are_not_sparse() -> None:
    sketch = Sketch(64, 24, seed=0, device=CPU)
    chunks = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    projected = chunks @ sketch.matrix.t()
    support = sketch.find(projected, count=5)
    for number, p in enumerate(projected.double().numpy()):
        positions, numbers = pursue(sketch.matrix.double().numpy(), p, count=5)
        assert support.positions[number].tolist() == positions
        found = support.solve(projected)[number].numpy()
        np.testing.assert_allclose(found, numbers, rtol=1e-4, atol=1e-5)


def test_other_numbers_are_solved_at_the_same_positions() -> None:
    sketch = Sketch(64, 24, seed=0, device=CPU)
    p, q = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))
    support = sketch.find(p, count=4)
    for number in range(3):
        columns = sketch.matrix[:, support.positions[number]].double().numpy()
        expected = np.linalg.lstsq(columns, q[number].double().numpy())[0]
        np.testing.assert_allclose(support.solve(q)[number].numpy(), expected, atol=1e-5)


def test_a_chunk_of_zeros_comes_back_as_zeros_at_different_positions() -> None:
    sketch = Sketch(64, 24, seed=0, device=CPU)
    support = sketch.find(torch.zeros(2, 24), count=4)
    assert support.solve(torch.zeros(2, 24)).tolist() == [[0.0] * 4] * 2
    assert all(len(set(row)) == 4 for row in support.positions.tolist())


def test_pursuit_never_finds_a_position_twice_when_nothing_is_left() -> None:
    sketch = Sketch(64, 24, seed=0, device=CPU)
    p = sketch.project(torch.tensor([[7]]), torch.tensor([[3.0]]))  # one entry, four asked for
    positions = sketch.find(p, count=4).positions[0].tolist()
    assert positions[0] == 7
    assert len(set(positions)) == 4


def test_a_projection_is_the_product_with_the_matrix() -> None:
    sketch = Sketch(32, 10, seed=3, device=CPU)
    positions, values = torch.tensor([[4, 9], [31, 0]]), torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    dense = torch.zeros(2, 32).scatter_(1, positions, values)
    torch.testing.assert_close(sketch.project(positions, values), dense @ sketch.matrix.t())


def test_the_matrix_follows_from_its_seed() -> None:
    matrices = [Sketch(32, 10, seed=seed, device=CPU).matrix for seed in (3, 3, 4)]
    assert torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0], matrices[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kept": 0}, "kept must be at least 1 and below the chunk's 1024 weights, got 0"),
        ({"chunk": 4}, "kept must be at least 1 and below the chunk's 4 weights, got 4"),
        ({"chunk": 0}, "chunk must be between 2 and 16384, got 0"),
        ({"chunk": 999999999999}, "chunk must be between 2 and 16384, got 999999999999"),
        ({"measurements": 3}, r"measurements must be between kept \(4\) and chunk \(1024\), got 3"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"refresh": 0}, "refresh must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Compression(**settings)


def recovered(kept: int, chunk: int, width: int, *, equal: bool) -> float:
    """Return the share of 1,000 random sparse chunks whose every position and number comes back."""
    generator = torch.Generator().manual_seed(5)
    sketch = Sketch(chunk, width, seed=0, device=CPU)
    good = 0
    for _ in range(10):
        positions = torch.rand(100, chunk, generator=generator).topk(kept).indices
        values = torch.randn(100, kept, generator=generator)
        values = values.sign() if equal else values
        projected = sketch.project(positions, values)
        support = sketch.find(projected, count=kept)
        dense = torch.zeros(100, chunk).scatter_(1, positions, values)
        back = torch.zeros(100, chunk).scatter_(1, support.positions, support.solve(projected))
        good += int(((back - dense).abs().amax(1) < 1e-4).sum())
    return good / 1000


def pursue(matrix: np.ndarray, p: np.ndarray, *, count: int) -> tuple[list[int], np.ndarray]:
    """Do orthogonal matching pursuit the slow way."""
    positions: list[int] = []
    rest = p
    numbers = np.zeros(0)
    for _ in range(count):
        positions.append(int(np.abs(matrix.T @ rest).argmax()))
        numbers = np.linalg.lstsq(matrix[:, positions], p)[0]
        rest = p - matrix[:, positions] @ numbers
    return positions, numbers
