"""The largest entries of an outer product that is never built."""

import torch


def largest_products(
    row: torch.Tensor, column: torch.Tensor, *, count: int, excluded: torch.Tensor
) -> torch.Tensor:
    """Return where row[i]·column[j] is largest and positive, flat row-major, [≤ count] ascending.

    row is [R], column [C], neither negative; `excluded` [E] are positions that do not count,
    ascending. Exact: float32 products are exact in float64; of equal ones the first positions win,
    and there are many where an entry's gradient is the largest of both its row and its column.
    Holds O(R + C + count + E) numbers.
    """
    wanted = min(count + excluded.numel(), row.numel() * column.numel())
    rows = row.double()
    columns, column_order = column.double().sort(descending=True, stable=True)
    if not count or not wanted or not rows.max() * columns[0] > 0:
        return excluded.new_empty(0)
    least = _threshold(rows, columns, wanted)
    above = _prefix(rows, columns, least, strict=True)
    equal = _prefix(rows, columns, least, strict=False) - above
    room = wanted - int(above.sum())
    equal = (equal.cumsum(0).clamp(max=room)).diff(prepend=equal.new_zeros(1))
    length = above + equal  # of each row, how many of its largest columns are among the wanted
    i = torch.repeat_interleave(torch.arange(rows.numel(), device=row.device), length)
    j = torch.arange(i.numel(), device=row.device) - (length.cumsum(0) - length)[i]
    positions, order = (i * column.numel() + column_order[j]).sort()
    free = ~torch.isin(positions, excluded)
    positions, products = positions[free], (rows[i] * columns[j])[order][free]
    best = products.sort(descending=True, stable=True).indices[:count]
    return positions[best].sort().values


def _threshold(rows: torch.Tensor, columns: torch.Tensor, wanted: int) -> float:
    """Return the `wanted`-th largest product, or the smallest positive one if there are fewer.

    Bisects over the bits of float64: positive floats are ordered as their bits are.
    """
    low, high = 1, int((rows.max() * columns[0]).view(torch.int64))
    while low < high:
        middle = low + (high - low + 1) // 2
        if int(_prefix(rows, columns, _float(middle), strict=False).sum()) >= wanted:
            low = middle
        else:
            high = middle - 1
    return _float(low)


def _prefix(
    rows: torch.Tensor, columns: torch.Tensor, least: float, *, strict: bool
) -> torch.Tensor:
    """Return for every row how many of the sorted columns give at least (or above) `least`, [R]."""
    bound = rows.new_tensor(least) / rows  # a float over it would be times its reciprocal
    # the quotient is rounded, and a column may equal it: the product, exact there, decides
    product = rows * bound
    if strict:
        bound = bound.where(product <= least, bound.nextafter(bound.new_tensor(-torch.inf)))
    else:
        bound = bound.where(product >= least, bound.nextafter(bound.new_tensor(torch.inf)))
    return columns.numel() - torch.searchsorted(columns.flip(0), bound, right=strict)


def _float(bits: int) -> float:
    return float(torch.tensor(bits).view(torch.float64))
