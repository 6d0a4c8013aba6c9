"""How much of a gradient a compressed optimizer keeps."""

import math
from dataclasses import dataclass

from spieldose_trainer.errors import ConfigError

LARGEST_CHUNK = 1 << 14  # projected to as many numbers at most, by a matrix of 1 GiB then


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """Cut a gradient into chunks, keep the largest entries of each, project them to few numbers."""

    chunk: int = 1024  # weights of a chunk (d)
    kept: int = 4  # entries of a chunk's gradient that count, and that move (s)
    measurements: int | None = None  # numbers a chunk is projected to (k); None: 4·s·ln(d/s)
    seed: int = 0  # of the projection
    rank: int | None = None  # of a low-rank projection that comes first (CESGC); None: MESGC
    refresh: int = 200  # updates a low-rank projection serves for

    def __post_init__(self) -> None:
        if not 2 <= self.chunk <= LARGEST_CHUNK:
            raise ConfigError(f"chunk must be between 2 and {LARGEST_CHUNK}, got {self.chunk}")
        if not 1 <= self.kept < self.chunk:
            raise ConfigError(
                f"kept must be at least 1 and below the chunk's {self.chunk} weights, "
                f"got {self.kept}"
            )
        if self.measurements is not None and not self.kept <= self.measurements <= self.chunk:
            raise ConfigError(
                f"measurements must be between kept ({self.kept}) and chunk ({self.chunk}), "
                f"got {self.measurements}"
            )
        for name in ("rank", "refresh"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")

    def size(self, shape: tuple[int, int]) -> int:
        """Return how many numbers of a layer's gradient are compressed."""
        if self.rank is None:
            return shape[0] * shape[1]
        return min(self.rank, *shape) * max(shape)

    @property
    def width(self) -> int:
        """Return k, the numbers a chunk is projected to.

        Of 8,000 chunks with `kept` entries of equal size, the hardest case, 4·s·ln(d/s) numbers
        recover 100 % at s = 4, d = 1024; 99.9 % at s = 2, d = 1024 and at s = 4, d = 256. The
        constants 2, 2.5 and 3 recover 89.4, 98.1 and 99.6 % at s = 4, d = 1024.
        """
        if self.measurements is not None:
            return self.measurements
        enough = math.ceil(4 * self.kept * math.log(self.chunk / self.kept))
        return min(self.chunk, max(self.kept, enough))
