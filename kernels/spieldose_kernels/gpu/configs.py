"""How the kernels are launched.

Not tuned on hardware yet: chosen so that nothing spills on sm_80, sm_90 and sm_100.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Hold a launch's sizes, all powers of two."""

    block_vectors: int = 64  # vectors of 16 entries in a tile
    tokens: int = 1  # of one group at once; each program walks every so many
    programs: int  # at most, of all groups and tokens; each walks every so many slices
    warps: int = 4  # of 32 threads, a program
    # at most, a thread; unbounded, the compiler aims at more programs at once and spills a little
    registers: int = 64


# 132 multiprocessors of 65536 registers (H100) hold 1056 such programs at once
ONE_TOKEN: Final = Configuration(programs=1024)
FEW_TOKENS: Final = Configuration(tokens=4, programs=2048)
MANY_TOKENS: Final = Configuration(tokens=16, programs=4096)
SCATTER: Final = Configuration(programs=1024, registers=128)


def gather_configuration(tokens: int, groups: int) -> Configuration:
    """Return how to launch a batch of so many tokens in so many groups."""
    if tokens <= groups:
        return ONE_TOKEN
    return FEW_TOKENS if tokens <= 4 * groups else MANY_TOKENS
