"""The `spieldose train` command."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spieldose_kernels.command_line import parse
from spieldose_trainer.config import TrainConfig

if TYPE_CHECKING:
    from spieldose_trainer.data import Examples
    from spieldose_trainer.trainer import Result


def train(arguments: Sequence[str]) -> None:
    """Fine-tune a sparse set of weights over a frozen 4-bit base and write a delta file."""
    config = parse(TrainConfig, arguments, prog="spieldose train")
    from spieldose_kernels.quiet import quiet_libraries

    quiet_libraries()
    if config.plan:
        _report_idle(config, updates=config.max_steps)
        _print_plan(config)
        return
    from rich.console import Console

    from spieldose_trainer.memory import print_memory
    from spieldose_trainer.ranks import is_first_rank
    from spieldose_trainer.trainer import Trainer

    trainer = Trainer(config)
    if is_first_rank():
        _report_idle(config, updates=trainer.updates)
        _report_too_long(config.data, trainer.examples)
        _report_too_long(config.eval_data, trainer.held_out)
    result = trainer.train()
    trainer.save()
    if is_first_rank():
        size, density = result.file.stat().st_size / 1e6, trainer.adapter().info.density
        print(
            f"{result.file}: {density:.2%} of the target weights, {size:.1f} MB, "
            f"loss {result.losses[-1]:.4f}{_choice(result)}; report: "
            f"{config.folder / 'report.html'}"
        )
        if trainer.memory is not None:
            print_memory(trainer.memory, Console())


def _print_plan(config: TrainConfig) -> None:
    from rich.console import Console

    from spieldose_trainer.plan_table import print_plan
    from spieldose_trainer.planning import make_plan

    print_plan(make_plan(config), Console())


def _choice(result: "Result") -> str:
    """Say which update's deltas were written, if a held-out loss chose them."""
    best = result.log.best
    if best is None:
        return ""
    nothing = ": all zero" if result.model.is_zero() else ""
    return f"; deltas of update {best.update}, whose held-out loss was lowest{nothing}"


def _report_idle(config: TrainConfig, *, updates: int | None) -> None:
    from spieldose_trainer.idle_settings import idle_settings

    for line in idle_settings(config, updates=updates):
        print(line)


def _report_too_long(path: Path | None, examples: "Examples") -> None:
    if examples.truncated or examples.dropped:
        print(
            f"{path}: of {len(examples) + examples.dropped} examples {examples.truncated} were cut "
            f"to {examples.limit} tokens, {examples.dropped} left out"
        )
