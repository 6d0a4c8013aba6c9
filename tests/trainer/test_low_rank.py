"""Gradients projected to low rank as a dense computation would, and steps brought back."""

import pytest
import torch

from spieldose_trainer.errors import NonFiniteLoss
from spieldose_trainer.updaters.low_rank import LowRank, leading_vectors

SHAPES = [(24, 40), (40, 24), (30, 30)]


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_vectors_are_those_of_a_dense_decomposition(shape: tuple[int, int]) -> None:
    x, dy = decaying(shape)
    found = leading_vectors(dy, x, rank=3)
    expected = torch.linalg.svd((dy @ x.t()).double()).U[:, :3].float()
    signs = (found * expected).sum(0).sign()
    torch.testing.assert_close(found * signs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shorter_side_is_projected(shape: tuple[int, int]) -> None:
    x, dy = decaying(shape)
    low_rank = LowRank.of(x, dy, rank=3)
    assert low_rank.vectors.shape == (min(shape), 3)
    low_x, low_dy = low_rank.project(x, dy)
    low = low_dy @ low_x.t()
    assert low.shape == ((3, shape[1]) if shape[0] <= shape[1] else (shape[0], 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_projected_and_lifted_is_the_best_approximation_of_that_rank(
    shape: tuple[int, int],
) -> None:
    x, dy = decaying(shape)
    low_rank = LowRank.of(x, dy, rank=3)
    low_x, low_dy = low_rank.project(x, dy)
    lifted_x, lifted_dy = low_rank.lift((low_dy @ low_x.t()).flatten())
    u, s, vh = torch.linalg.svd(dy @ x.t())
    best = u[:, :3] * s[:3] @ vh[:3]
    torch.testing.assert_close(lifted_dy @ lifted_x.t(), best, rtol=1e-3, atol=1e-4)


def test_a_rank_above_the_shorter_side_loses_nothing() -> None:
    x, dy = torch.randn(9, 4), torch.randn(5, 4)
    low_rank = LowRank.of(x, dy, rank=64)
    low_x, low_dy = low_rank.project(x, dy)
    lifted_x, lifted_dy = low_rank.lift((low_dy @ low_x.t()).flatten())
    torch.testing.assert_close(lifted_dy @ lifted_x.t(), dy @ x.t(), rtol=1e-4, atol=1e-4)


def test_a_gradient_of_zeros_still_gives_orthonormal_vectors() -> None:
    found = leading_vectors(torch.zeros(6, 2), torch.zeros(9, 2), rank=3)
    torch.testing.assert_close(found.t() @ found, torch.eye(3))


def decaying(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [C, 20] and dy [R, 20] whose product has singular values 1, 0.7, 0.49 …"""
    generator = torch.Generator().manual_seed(6)
    left = torch.linalg.qr(torch.randn(shape[0], 20, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 20, generator=generator)).Q
    return right, left * 0.7 ** torch.arange(20)


def test_gradients_that_are_not_finite_are_said_so() -> None:
    x, dy = torch.randn(6, 5), torch.randn(4, 5)
    dy[0, 0] = torch.nan
    with pytest.raises(NonFiniteLoss, match="expected finite gradients, got NaN or infinity"):
        LowRank.of(x, dy, rank=2)
