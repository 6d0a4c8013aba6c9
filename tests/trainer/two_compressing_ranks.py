"""One rank of two that see different data; spawned by a test, so it imports little."""

from pathlib import Path

import torch
import torch.distributed as dist

from spieldose_trainer.updaters.chunked_gradient import ChunkedGradient
from spieldose_trainer.updaters.low_rank import LowRank

SHAPE = (14, 20)
RANK = 2  # of the projection

Pass = tuple[torch.Tensor, torch.Tensor]  # x [C, T] and dy [R, T]


def inputs(rank: int) -> list[Pass]:
    """Return the two forward passes of a rank."""
    generator = torch.Generator().manual_seed(rank)
    draws = [torch.randn(sum(SHAPE), 8, generator=generator) for _ in range(2)]
    return [(d[: SHAPE[1]].contiguous(), d[SHAPE[1] :].contiguous()) for d in draws]


def largest(passes: list[Pass]) -> dict[str, torch.Tensor]:
    """Return what is kept of the gradient and of its projection."""
    low_rank = LowRank.of(*passes[0], rank=RANK)
    whole, low = (
        ChunkedGradient(size, chunk=4, count=1, device=torch.device("cpu")) for size in (280, 40)
    )
    for x, dy in passes:
        whole.observe(x, dy)
        low.observe(*low_rank.project(x, dy))
    found = {"vectors": low_rank.vectors}
    for name, gradient in {"whole": whole, "low": low}.items():
        taken = gradient.take()
        assert taken is not None
        found |= {f"{name} positions": taken[0], f"{name} values": taken[1]}
    return found


def gather(rank: int, directory: Path) -> None:
    """Gather one update in a process group of two and save what is kept of it."""
    address = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(largest(inputs(rank)), directory / f"{rank}.pt")
    dist.destroy_process_group()
