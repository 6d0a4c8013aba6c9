"""A layer's gradient projected to low rank, and steps mapped back from there."""

from dataclasses import dataclass

import torch

from spieldose_trainer.errors import NonFiniteLoss
from spieldose_trainer.ranks import mean_over_ranks

OVERSAMPLING = 8  # columns beyond the rank while the space is sought
ITERATIONS = 3  # of dW·dWᵀ


@dataclass(frozen=True, slots=True)
class LowRank:
    """Project dW [R, C] = dy·xᵀ on its shorter side, by P [R, r] if R ≤ C, else by P [C, r].

    As GaLore does (arXiv 2403.03507). Projecting dy or x gives the gradient of low rank, [r, C] or
    [R, r], without the whole one, at a fraction of its cost.
    """

    vectors: torch.Tensor  # P, orthonormal columns
    on_rows: bool  # R ≤ C

    @classmethod
    def of(cls, x: torch.Tensor, dy: torch.Tensor, *, rank: int) -> "LowRank":
        """Project on dW's leading singular vectors: `rank` of them, or all there are."""
        on_rows = dy.shape[0] <= x.shape[0]
        pair = (dy, x) if on_rows else (x, dy)
        return cls(leading_vectors(*pair, rank=rank), on_rows)

    def project(self, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x and dy whose product dy·xᵀ is the projected gradient."""
        if self.on_rows:
            return x, self.vectors.t() @ dy
        return self.vectors.t() @ x, dy

    def lift(self, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x [C, r] and dy [R, r] whose product dy·xᵀ is `low`, flat, mapped back."""
        if self.on_rows:
            return low.view(self.vectors.shape[1], -1).t().contiguous(), self.vectors
        return self.vectors, low.view(-1, self.vectors.shape[1])


def leading_vectors(y: torch.Tensor, x: torch.Tensor, *, rank: int) -> torch.Tensor:
    """Return the leading left singular vectors of y·xᵀ, [R, rank] from [R, T] and [C, T].

    Randomised subspace iteration (arXiv 0909.4061), without ever building the product. All ranks of
    a data-parallel run get the vectors of their mean product.
    """
    count = min(rank + OVERSAMPLING, y.shape[0], x.shape[0])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(x.shape[0], count, generator=generator).to(x)
    space = _orthonormal(mean_over_ranks(y @ (x.t() @ start)))
    for _ in range(ITERATIONS):
        right = _orthonormal(mean_over_ranks(x @ (y.t() @ space)))
        space = _orthonormal(mean_over_ranks(y @ (x.t() @ right)))
    inside = mean_over_ranks(x @ (y.t() @ space))
    if not inside.isfinite().all():
        raise NonFiniteLoss(
            "expected finite gradients, got NaN or infinity; try a lower learning_rate"
        )
    rotation = torch.linalg.svd(inside, full_matrices=False).Vh.t()
    return torch.mm(space, rotation[:, :rank])


def _orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    space: torch.Tensor = torch.linalg.qr(vectors).Q
    return space
