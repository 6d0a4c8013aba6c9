"""How many bytes a run's parts take, from shapes alone: R rows, C columns, Z entries."""

import math
from collections.abc import Mapping

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from spieldose_kernels.delta import index_dtype
from spieldose_trainer.methods import UpdaterName
from spieldose_trainer.selectors.accumulated_gradients import CANDIDATE_FACTOR, FLOOR, SPARE
from spieldose_trainer.updaters.chunked_gradient import CANDIDATE_FACTOR as GATHERED
from spieldose_trainer.updaters.compression import Compression

Shape = tuple[int, int]

# NF4 with double quantisation: a nibble per weight, a byte per 64, a float32 per 256 of those
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
NF4_TABLES = 4 * (16 + 256 + 1)  # bytes per layer: both code books and the mean scale
SUM_BYTES = 8 + 4 + 1  # a candidate's position, its gradient in the running update, if it is late
CANDIDATE_BYTES = SUM_BYTES + 2 * 4  # and Σ g and Σ g², once there are any; its column besides
HEADER_BYTES = 265  # about a module in a delta file, beside four times its name


def moment_bytes(
    updater: UpdaterName,
    height: int,
    width: int,
    entries: int,
    *,
    compression: Compression | None = None,
) -> int:
    """Return what an updater keeps from one update to the next for a layer of R, C and Z.

    Compressed Adam is told how it compresses; its own matrix, one for all layers, is left out.
    """
    match updater:
        case "adamw":  # two moments and an age
            return 3 * 4 * entries
        case "sm3":  # an accumulator per row and column
            return 4 * (height + width)
        case "zeroth-order":
            return 0
        case "compressed-adam":  # two moments of every chunk's projection
            assert compression is not None
            chunks = math.ceil(compression.size((height, width)) / compression.chunk)
            short = min(height, width)
            space = 0 if compression.rank is None else 4 * short * min(compression.rank, short)
            return 2 * 4 * compression.width * chunks + space


def candidate_bytes(
    height: int, width: int, entries: int, *, passes: int, normalised: bool = False
) -> int:
    """Return the most a selection phase of accumulated gradients keeps for a layer of R, C and Z.

    That is in its first update, or in those after it; `passes` are the forward passes of one.
    """
    norms = 8 * (height + width) if normalised else 0  # float64
    weights = height * width
    count = min(CANDIDATE_FACTOR * entries, weights)
    room = count if passes == 1 else max(SPARE * count, FLOOR)
    first = SUM_BYTES * min(room, weights)
    later = count * (CANDIDATE_BYTES + index_dtype(width).itemsize) + 4 * (height + 1)
    return norms + max(first, later)


def gathered_bytes(height: int, width: int, compression: Compression) -> int:
    """Return what compressed Adam gathers of a layer's gradient during an update."""
    chunks = math.ceil(compression.size((height, width)) / compression.chunk)
    return chunks * min(GATHERED * compression.kept, compression.chunk) * (4 + 4)


def file_bytes(name: str, height: int, width: int, entries: int, *, dtype: torch.dtype) -> int:
    """Return about what a module of R, C and Z takes in a delta file with values of `dtype`."""
    stored = 4 * (height + 1) + entries * (index_dtype(width).itemsize + dtype.itemsize)
    return stored + HEADER_BYTES + 4 * len(name)


def base_bytes(
    config: PretrainedConfig, shapes: Mapping[str, Shape], *, dtype: torch.dtype, quantised: bool
) -> int:
    """Return a base's bytes: the layers of `shapes` in NF4 if quantised, the rest in `dtype`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    if not quantised:
        return int(weights * dtype.itemsize)
    packed = sum(height * width for height, width in shapes.values())
    return int((weights - packed) * dtype.itemsize + packed * NF4_BYTES + len(shapes) * NF4_TABLES)
