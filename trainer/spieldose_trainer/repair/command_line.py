"""The `spieldose repair` command."""

from collections.abc import Sequence

from spieldose_kernels.command_line import parse
from spieldose_trainer.repair.config import RepairConfig


def repair(arguments: Sequence[str]) -> None:
    """Make a delta file that gives a base back most of what its rounding to NF4 took."""
    config = parse(RepairConfig, arguments, prog="spieldose repair")
    from rich.console import Console

    from spieldose_kernels.quiet import quiet_libraries

    quiet_libraries()
    from spieldose_trainer.repair.repair import repair as run
    from spieldose_trainer.repair.report import mended_table

    made = run(config)
    Console(markup=False, highlight=False).print(mended_table(made))
    size, density = config.out.stat().st_size, made.adapter.info.density
    print(f"{config.out}: {density:.2%} of the target weights, {size / 1e6:.1f} MB")
