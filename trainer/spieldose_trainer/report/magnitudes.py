"""How large a delta's values are: a histogram of |δ| over decades, of bounded size."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

LOWEST = -12  # decades of |δ| told apart, from 1e-12 ...
HIGHEST = 4  # ... to 1e4; what lies outside counts in the last bin
BINS_PER_DECADE = 20  # a bin is 12 % wide


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """Count values by the logarithm of their size."""

    counts: torch.Tensor  # [BINS_PER_DECADE * (HIGHEST - LOWEST)] int64
    zeros: int  # values that are exactly 0, in no bin

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> "Magnitudes":
        """Count the values of all tensors."""
        bins = BINS_PER_DECADE * (HIGHEST - LOWEST)
        counts, zeros = torch.zeros(bins, dtype=torch.int64), 0
        for values in tensors:
            size = values.detach().float().abs()
            size = size[size > 0]
            zeros += values.numel() - size.numel()
            place = ((size.log10() - LOWEST) * BINS_PER_DECADE).long().clamp_(0, bins - 1)
            counts += torch.bincount(place.cpu(), minlength=bins)
        return cls(counts, zeros)

    def occupied(self) -> tuple[list[float], list[int]]:
        """Return log10 of the edges, [n + 1], and counts, [n], from the first value to the last."""
        filled = self.counts.nonzero().flatten().tolist()
        if not filled:
            return [], []
        first, last = filled[0], filled[-1] + 1
        edges = [LOWEST + i / BINS_PER_DECADE for i in range(first, last + 1)]
        return edges, self.counts[first:last].tolist()

    def quantile(self, share: float) -> float:
        """Return the |δ| that `share` of the non-zero values stay below, exact to one bin."""
        edges, counts = self.occupied()
        wanted = share * sum(counts)
        for low, count in zip(edges, counts, strict=False):
            if count >= wanted:
                return math.pow(10, low + wanted / count / BINS_PER_DECADE)
            wanted -= count
        return math.nan
