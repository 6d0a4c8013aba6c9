"""What makes a weight worth training: its size, also in a low-rank approximation, its Fisher."""

from collections.abc import Callable, Iterator, Sequence

import torch

from spieldose_kernels.linear import TrainableDelta
from spieldose_kernels.support_product import gradient_tiles
from spieldose_trainer.groups import groups

Loss = Callable[[], torch.Tensor]  # of one sample; every call makes a new graph


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """Return |W|, [R·C], for W [R, C]."""
    return weight.abs().flatten()


def principal(weight: torch.Tensor, *, rank: int) -> torch.Tensor:
    """Return |the best approximation of W of this rank|, [R·C] float32 (arXiv 2506.00772).

    A rank that W cannot exceed leaves W itself.
    """
    height, width = weight.shape
    thin = weight if height <= width else weight.t()
    # the singular vectors of the shorter side, exact in float64, without those of the longer one
    exact = thin.double()
    gram = exact @ exact.t()
    del exact
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].float()
    approximation: torch.Tensor = vectors @ (vectors.t() @ thin.float())
    return (approximation if height <= width else approximation.t()).abs().flatten()


def fisher(
    layers: dict[str, TrainableDelta], losses: Sequence[Loss], *, budget: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each layer's diagonal of the empirical Fisher: the mean of g² over samples, [R·C].

    Sums for as many layers are held at once as `budget` float32 numbers allow, one layer at least;
    more layers take another round over the samples. Adapters' values must be differentiable, the
    layers' own weights need no gradient (arXiv 2406.02913).
    """
    sizes = {name: _size(layer) for name, layer in layers.items()}
    for group in groups(sizes, budget=budget):
        sums = {name: _Squares(layers[name]) for name in group}
        for loss in losses:
            loss().backward()
        for name in group:
            layers[name].probe = None
            yield name, sums.pop(name).total / len(losses)


class _Squares:
    """Sum a layer's squared gradients, one backward pass a sample."""

    def __init__(self, layer: TrainableDelta) -> None:
        self.total = torch.zeros(_size(layer), device=layer.row_starts.device)
        self._width = layer.width
        layer.probe = self._observe

    def _observe(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        for row, tile in gradient_tiles(dy, x):
            first = row * self._width
            self.total[first : first + tile.numel()] += tile.float().flatten().square_()


def _size(layer: TrainableDelta) -> int:
    height, width = layer.shape
    return height * width
