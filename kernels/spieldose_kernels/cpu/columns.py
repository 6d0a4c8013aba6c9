"""Check the columns of a delta where they lie, on the CPU."""

import numpy as np

from spieldose_kernels.cpu.team import compiled


@compiled
def misplaced(row_starts, first, before, columns, width):
    """Return where in `columns` the first lies that is none of its row's, their number if none.

    `columns` are the delta's from entry `first` on, `before` is the one before them.
    """
    row = np.searchsorted(row_starts, first, "right") - 1
    if row_starts[row] == first:
        before = -1
    for i in range(columns.size):
        while row_starts[row + 1] == first + i:
            row += 1
            before = -1
        column = np.int64(columns[i])
        if not before < column < width:
            return i
        before = column
    return columns.size
