"""Products of training with one adapter's support, on the CPU."""

from spieldose_kernels.cpu.team import compiled


@compiled
def product(x, y, row_starts, columns, values):
    """Write y = Δ · x, [R, T] from [C, T]."""
    for row in range(y.shape[0]):
        out = y[row]
        out[:] = 0
        for j in range(row_starts[row], row_starts[row + 1]):
            value, source = values[j], x[columns[j]]
            for t in range(out.shape[0]):
                out[t] += value * source[t]


@compiled
def transposed_product(y, x, row_starts, columns, values):
    """Write x = Δᵀ · y, [C, T] from [R, T]."""
    x[:] = 0
    for row in range(y.shape[0]):
        source = y[row]
        for j in range(row_starts[row], row_starts[row + 1]):
            value, out = values[j], x[columns[j]]
            for t in range(out.shape[0]):
                out[t] += value * source[t]


@compiled
def sampled_product(y, x, out, row_starts, columns):
    """Write out[j] = Σ_t y[row of j, t] · x[column of j, t], [Z], from [R, T] and [C, T]."""
    for row in range(y.shape[0]):
        left = y[row]
        for j in range(row_starts[row], row_starts[row + 1]):
            total = out.dtype.type(0)
            right = x[columns[j]]
            for t in range(left.shape[0]):
                total += left[t] * right[t]
            out[j] = total
