"""What the processes of a data-parallel run have in common."""

import torch
import torch.distributed as dist


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by its mean over all processes, in place; return it."""
    if _several():
        shared = tensor.cuda() if dist.get_backend() == "nccl" else tensor  # it takes no others
        dist.all_reduce(shared)
        tensor.copy_(shared / dist.get_world_size())
    return tensor


def sum_over_ranks(number: int) -> int:
    """Return the sum of all processes' numbers."""
    if not _several():
        return number
    mean = mean_over_ranks(torch.tensor(number, dtype=torch.float64))
    return round(float(mean) * dist.get_world_size())


def is_first_rank() -> bool:
    """Say whether this process speaks for all: it alone writes files and prints."""
    return not _several() or dist.get_rank() == 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
