"""A fixed random projection of chunks of a gradient, and the way back to sparse ones."""

from dataclasses import dataclass

import torch

from spieldose_trainer.updaters.largest_in_rows import largest_in_rows


@dataclass(frozen=True, slots=True)
class Support:
    """Say which entries of every chunk matching pursuit found, and solve for numbers at them."""

    positions: torch.Tensor  # [n, s] int64, in the order found
    basis: torch.Tensor  # [n, s, k] orthonormal, spans A's columns at the positions
    triangle: torch.Tensor  # [n, s, s] upper; A's columns at the positions = basisᵀ·triangle

    def solve(self, projected: torch.Tensor) -> torch.Tensor:
        """Return the least-squares numbers at the positions, [n, s], of projections [n, k]."""
        right = self.basis @ projected[:, :, None]
        numbers: torch.Tensor = torch.linalg.solve_triangular(self.triangle, right, upper=True)
        return numbers[:, :, 0]


class Sketch:
    """Project chunks of d numbers to k by A [k, d], Gaussian with columns of length 1.

    Where k is d there is nothing to compress, and A is the identity. A follows from the seed and is
    the same for every chunk: it is never saved. Columns of unequal length would make matching
    pursuit prefer the long ones.
    """

    def __init__(self, chunk: int, measurements: int, *, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)  # on the CPU: one A for every device
        matrix = (
            torch.randn(measurements, chunk, generator=generator)
            if measurements < chunk
            else torch.eye(chunk)
        )
        self.matrix = (matrix / matrix.norm(dim=0)).to(device)  # [k, d] float32
        self._columns = self.matrix.t().contiguous()  # [d, k]

    def project(self, positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return A·g, [n, k], for chunks g that are zero but for values [n, s] at positions."""
        return torch.bmm(values[:, None, :], self._columns[positions])[:, 0]

    def find(self, projected: torch.Tensor, *, count: int) -> Support:
        """Find the `count` entries that explain projections [n, k] best, one after the other.

        Orthogonal matching pursuit: the column most correlated with what is left, then the rest of
        the columns found so far is projected out. Works in n·d numbers; the caller bounds n.
        """
        n, measurements = projected.shape
        positions = torch.zeros(n, count, dtype=torch.int64, device=projected.device)
        basis = projected.new_zeros(n, count, measurements)
        triangle = projected.new_zeros(n, count, count)
        rest = projected.clone()
        for found in range(count):
            correlation = (rest @ self.matrix).abs_()
            # nothing is left of those found, but rounding must not find them again
            correlation.scatter_(1, positions[:, :found], -1.0)
            positions[:, found] = largest_in_rows(correlation, 1)[:, 0]
            column = self._columns[positions[:, found]]
            overlap = (basis[:, :found] @ column[:, :, None])[:, :, 0]
            column -= (overlap[:, None, :] @ basis[:, :found])[:, 0]
            length = column.norm(dim=1)
            basis[:, found] = column / length[:, None]
            triangle[:, :found, found] = overlap
            triangle[:, found, found] = length
            rest -= (basis[:, found] * rest).sum(1, keepdim=True) * basis[:, found]
        return Support(positions, basis, triangle)
