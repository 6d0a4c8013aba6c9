"""The support a run starts with: the weights of the largest score, or random ones."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch

from spieldose_kernels.support_product import TILE
from spieldose_kernels.top_k import TopK

Allocation = Literal["layer", "global"]
Shapes = Mapping[str, tuple[int, int]]
Positions = dict[str, torch.Tensor]  # flat row-major, [Z] int64 ascending, by layer


def random_support(shapes: Shapes, density: float, *, seed: int) -> Positions:
    """Return uniformly random positions, the same share of every layer."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (height, width) in shapes.items():
        count = entries(density, height * width)
        found[name] = torch.randperm(height * width, generator=generator)[:count].sort().values
    return found


def best_support(
    shapes: Shapes,
    density: float,
    *,
    allocation: Allocation,
    scores: Iterable[tuple[str, torch.Tensor]],
) -> Positions:
    """Return the positions of the largest scores, [R·C] per layer, layers in any order.

    "layer" takes the same share of every layer; "global" compares all layers' scores, so that some
    get more and some nothing.
    """
    if allocation == "layer":
        return {
            name: score.topk(entries(density, score.numel())).indices.sort().values
            for name, score in scores
        }
    sizes = {name: height * width for name, (height, width) in shapes.items()}
    firsts, total = {}, 0
    for name, size in sizes.items():
        firsts[name], total = total, total + size
    largest = TopK(entries(density, total))
    for name, score in scores:
        for at in range(0, score.numel(), TILE):
            largest.show(score[at : at + TILE], first=firsts[name] + at)
    positions, _ = largest.largest()
    return {
        name: positions[(positions >= first) & (positions < first + sizes[name])] - first
        for name, first in firsts.items()
    }


def row_support(
    shapes: Shapes, density: float, *, weights: Callable[[str], torch.Tensor]
) -> Positions:
    """Return every row's largest |weights|, equally many in each (NeuroAda)."""
    found = {}
    for name, (height, width) in shapes.items():
        columns = weights(name).abs().topk(entries(density, width), dim=1).indices
        rows = torch.arange(height, device=columns.device)[:, None]
        found[name] = (rows * width + columns).flatten().sort().values
    return found


def entries(density: float, weights: int) -> int:
    """Return how many of so many weights a support of this density holds; at least one."""
    return max(1, int(density * weights))
