"""What the processes of a data-parallel run have in common."""

import torch
import torch.distributed as dist


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by its mean over all processes, in place; return it."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor
