"""The `spieldose train` command."""

from collections.abc import Sequence

import tyro

from spieldose_trainer.config import TrainConfig


def train(arguments: Sequence[str]) -> None:
    """Fine-tune a sparse set of weights over a frozen 4-bit base and write a delta file."""
    config = tyro.cli(TrainConfig, prog="spieldose train", args=arguments)
    from spieldose_kernels.quiet import quiet_libraries

    quiet_libraries()
    from spieldose_trainer.trainer import train as run

    result = run(config)
    size = result.file.stat().st_size
    loss = f", loss {result.losses[-1]:.4f}" if result.losses else ""  # none: all was done before
    print(
        f"{result.file}: {result.model.density:.2%} of the target weights, "
        f"{size / 1e6:.1f} MB{loss}"
    )
