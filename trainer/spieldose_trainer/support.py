"""A layer's support: its entries as flat positions, and their exchange in place."""

from collections.abc import Iterable

import torch

from spieldose_kernels.delta import SparseDelta, entry_rows
from spieldose_kernels.linear import TrainableDelta

LAST_BIRTH = torch.iinfo(torch.int16).max  # changes of support are told apart up to here


def flat_positions(layer: TrainableDelta) -> torch.Tensor:
    """Return a layer's support as flat row-major positions, [Z] int64 ascending."""
    return entry_rows(layer.row_starts) * layer.width + layer.columns.long()


@torch.no_grad()
def exchange(
    layer: TrainableDelta,
    *,
    keep: torch.Tensor,
    grown: torch.Tensor,
    number: int,
    entries: Iterable[torch.Tensor] = (),
) -> torch.Tensor:
    """Replace the entries outside `keep` by zeros at `grown`; return a mask of the newcomers.

    Survivors carry their value, and what else is held per entry: `entries`, each [Z]. The number of
    entries stays. Newcomers are marked as born in reselection `number`.
    """
    positions = torch.cat([flat_positions(layer)[keep], grown])
    order = torch.argsort(positions)
    for tensor in (layer.values.data, layer.born, *entries):
        moved = torch.cat([tensor[keep], tensor.new_zeros(grown.numel())])
        tensor.copy_(moved[order])
    support = SparseDelta.from_flat(positions[order], layer.values.data, shape=layer.shape)
    layer.row_starts.copy_(support.row_starts)
    layer.columns.copy_(support.columns)
    newcomers = order >= int(keep.sum())
    layer.born[newcomers] = min(number, LAST_BIRTH)
    return newcomers
