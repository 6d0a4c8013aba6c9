"""One layer's gradient in chunks, of which the largest entries are kept."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from spieldose_kernels.support_product import gradient_tiles
from spieldose_trainer.ranks import mean_over_ranks
from spieldose_trainer.updaters.largest_in_rows import largest_in_rows

# Entries kept per entry wanted while an update gathers. Four passes through SmolLM2-135M end with
# at least 99.6 % of the squared norm of the exact largest at 4, 98.9 % at 2, 94.8 % at 1.
CANDIDATE_FACTOR = 4


class ChunkedGradient:
    """Gather the largest |dW| of every chunk over the backward passes of one update.

    dW is cut row-major into chunks of d weights and exists a tile at a time. As long as an update
    gathers, a chunk keeps more entries than are wanted: the sums kept are added to each pass's dW
    before the largest are kept again. Under data parallelism every rank sees the mean gradient.
    """

    def __init__(self, size: int, *, chunk: int, count: int, device: torch.device) -> None:
        self.chunk = chunk
        self.count = count
        self.empty = True  # no pass of the running update was observed yet
        kept = math.ceil(size / chunk), min(CANDIDATE_FACTOR * count, chunk)
        # allocated once: made anew between tiles that come and go, these 20 MB of the demo's base
        # fragmented the heap by 250 MB
        self._positions = torch.zeros(kept, dtype=torch.int32, device=device)  # within the chunk
        self._values = torch.zeros(kept, device=device)  # float32

    @torch.no_grad()
    def observe(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Take in one backward pass, x [C, T] and dy [R, T]."""
        for first, block in gradient_chunks(dy, x, chunk=self.chunk):
            gradient = mean_over_ranks(block)
            here = slice(first, first + block.shape[0])
            if not self.empty:
                gradient.scatter_add_(1, self._positions[here].long(), self._values[here])
            largest = largest_in_rows(gradient.abs(), self._values.shape[1])
            self._positions[here] = largest
            self._values[here] = gradient.gather(1, largest)
        self.empty = False

    def take(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return positions within the chunk and values, [n, s] of the update's largest.

        The next pass begins a new update. None: no pass was observed.
        """
        if self.empty:
            return None
        self.empty = True
        largest = largest_in_rows(self._values.abs(), self.count)
        return self._positions.gather(1, largest).long(), self._values.gather(1, largest)


def gradient_chunks(
    y: torch.Tensor, x: torch.Tensor, *, chunk: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield y·xᵀ, [R, C] from [R, T] and [C, T], in blocks of chunks, with the first's number.

    Blocks are [n, d] float32, cut row-major without regard to tiles; the last chunk is padded with
    zeros.
    """
    rest = torch.empty(0, device=x.device)
    first = 0
    for _, tile in gradient_tiles(y, x):
        flat = tile.float().flatten()
        if rest.numel():
            flat = torch.cat([rest, flat])
        whole = flat.numel() // chunk
        if whole:
            yield first, flat[: whole * chunk].view(whole, chunk)
        first += whole
        rest = flat[whole * chunk :].clone()  # a view would keep the tile
    if rest.numel():
        yield first, F.pad(rest, (0, chunk - rest.numel())).view(1, chunk)
