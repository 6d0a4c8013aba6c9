"""The sparse rows that stand for dense ones best, on the inputs a layer sees."""

import torch

from spieldose_kernels.support_product import TILE

# added to the Gram matrix's diagonal, as a share of its mean: as a share of each entry it would let
# inputs that are hardly ever there carry corrections as large as they are faint
RIDGE = 0.01
ROUNDS = 16  # in which a row's entries are found; fewer entries are found one by one


def sparse_rows(
    dense: torch.Tensor, gram: torch.Tensor, *, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return columns and values, [R, count], of the Δ that is nearest to E on the inputs X.

    Near is ‖(E − Δ)·X‖ for E [R, C] and gram = X·Xᵀ [C, C], float32. Orthogonal matching pursuit in
    the metric of X: the columns that would take most off what is left, then least-squares values at
    all columns so far. As inputs are correlated, a few entries make up for the error of many.
    """
    ridge = RIDGE * gram.diagonal().mean()
    gram = gram + ridge * torch.eye(len(gram), device=gram.device)
    height = max(1, TILE // max(dense.shape[1], count**2))
    blocks = [_pursue(rows @ gram, gram, count=count) for rows in dense.split(height)]
    columns, values = zip(*blocks, strict=True)
    return torch.cat(columns), torch.cat(values)


def _pursue(
    target: torch.Tensor, gram: torch.Tensor, *, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return columns and values for E·X·Xᵀ [n, C] of a block of rows."""
    step = -(-count // ROUNDS)
    lengths = gram.diagonal()
    columns = torch.empty(len(target), 0, dtype=torch.int64, device=target.device)
    values = target.new_empty(len(target), 0)
    rest = target
    while columns.shape[1] < count:
        gain = rest.square() / lengths
        gain.scatter_(1, columns, -1.0)  # rounding must not find them again
        found = gain.topk(min(step, count - columns.shape[1]), sorted=False).indices
        columns = torch.cat([columns, found], dim=1)
        among = gram[columns[:, :, None], columns[:, None, :]]
        right = target.gather(1, columns)[:, :, None]
        values = torch.linalg.solve(among, right)[:, :, 0]
        delta = torch.zeros_like(target).scatter_(1, columns, values)
        rest = target - delta @ gram
    return columns, values
