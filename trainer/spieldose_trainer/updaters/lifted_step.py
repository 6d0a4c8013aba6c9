"""What of a step lifted from low rank can come to count in a support."""

import torch

from spieldose_kernels.linear import TrainableDelta
from spieldose_kernels.support_product import gradient_tiles, sampled_product
from spieldose_kernels.top_k import TopK
from spieldose_trainer.support import flat_positions


def entries_that_matter(
    x: torch.Tensor, dy: torch.Tensor, layer: TrainableDelta
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions, flat and ascending, and numbers of the change dy·xᵀ that can come to count.

    Those are the ones at the layer's support, and of the largest elsewhere, as many as it has room
    for or more, what exceeds its smallest delta after the change. The product exists a tile at a
    time, without the rows and columns that are zero: a sparse step at rank r touches about r·s/d of
    them.
    """
    active = flat_positions(layer)
    inside = sampled_product(dy, x, row_starts=layer.row_starts, columns=layer.columns)
    rows, columns = (side.any(dim=1).nonzero().flatten() for side in (dy, x))
    largest = TopK(2 * active.numel())  # no more than half of them are at the support
    for row, tile in gradient_tiles(dy[rows], x[columns]):
        largest.show(tile.flatten(), first=row * columns.numel())
    found, numbers = largest.largest()
    found = rows[found // columns.numel()] * layer.width + columns[found % columns.numel()]
    least = (layer.values.detach() + inside).abs().min()
    elsewhere = torch.isin(found, active, invert=True) & (numbers.abs() > least)
    positions = torch.cat([active, found[elsewhere]])
    order = torch.argsort(positions)
    return positions[order], torch.cat([inside, numbers[elsewhere]])[order]
