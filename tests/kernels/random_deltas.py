"""Random numbers and deltas that are the same in every run."""

import torch

from spieldose_kernels.delta import SparseDelta


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_delta(height: int, width: int, *, density: float) -> SparseDelta:
    generator = torch.Generator().manual_seed(0)
    count = round(density * height * width)
    positions = torch.randperm(height * width, generator=generator)[:count]
    return SparseDelta.from_flat(positions, random(count), shape=(height, width))
