"""One rank of two that see different data; spawned by test_faults, so it imports little."""

from pathlib import Path

import torch
import torch.distributed as dist

from spieldose_trainer.selectors.candidates import Candidates

SHAPE = (5, 6)
COUNT = 8  # candidates


def inputs(rank: int, update: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return x [C, 4] and dy [R, 4] of a rank's forward passes: one, then two in later updates."""
    generator = torch.Generator().manual_seed(10 * update + rank)
    draws = [torch.randn(sum(SHAPE), 4, generator=generator) for _ in range(min(update + 1, 2))]
    return [(d[: SHAPE[1]].contiguous(), d[SHAPE[1] :].contiguous()) for d in draws]


def gradient(rank: int, update: int) -> torch.Tensor:
    """Return a rank's whole dW of an update, [R·C]."""
    return torch.stack([dy @ x.t() for x, dy in inputs(rank, update)]).sum(0).flatten()


def accumulate(rank: int, directory: Path) -> None:
    """Accumulate two updates in a process group of two and save what the candidates hold."""
    address = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    candidates = Candidates(SHAPE, count=COUNT)
    for update in range(2):
        for x, dy in inputs(rank, update):
            candidates.observe(x, dy)
        candidates.finish_update()
    torch.save(candidates.state_dict(), directory / f"{rank}.pt")
    dist.destroy_process_group()
