"""The `spieldose convert`, `extract` and `inspect` commands."""

import sys
from collections.abc import Sequence
from pathlib import Path

from spieldose_kernels.command_line import parse
from spieldose_kernels.errors import one_line
from spieldose_trainer.interop.config import ConvertConfig, ExtractConfig, InspectConfig


def convert(arguments: Sequence[str]) -> None:
    """Turn a sparse PEFT adapter into a delta file, or a delta file into a PEFT adapter."""
    config = parse(ConvertConfig, arguments, prog="spieldose convert")
    from spieldose_kernels.quiet import quiet_libraries

    quiet_libraries()
    from spieldose_trainer.interop.convert import convert as run

    adapter = run(config)
    named = adapter.info.settings.get("base_model_name_or_path")  # as PEFT's settings have it
    if named and Path(named).name != Path(config.base).resolve().name:
        said = f"the adapter names {named} as its base and was taken for one of {config.base}"
        print(f"spieldose convert: {one_line(said)}", file=sys.stderr)
    print(
        f"{config.out}: {adapter.nnz:,} entries in {len(adapter.modules)} modules, "
        f"{adapter.info.density:.2%} of the target weights"
    )


def extract(arguments: Sequence[str]) -> None:
    """Make a delta file of the largest changes that a full fine-tune made to its base."""
    config = parse(ExtractConfig, arguments, prog="spieldose extract")
    from rich.console import Console

    from spieldose_kernels.quiet import quiet_libraries

    quiet_libraries()
    from spieldose_trainer.interop.extract import extract as run
    from spieldose_trainer.interop.extraction_report import kept_table, warnings

    extraction = run(config)
    Console(markup=False, highlight=False).print(kept_table(extraction))
    size = config.out.stat().st_size
    density = extraction.adapter.info.density
    print(f"{config.out}: {density:.2%} of the target weights, {size / 1e6:.1f} MB")
    for warning in warnings(extraction):
        print(f"spieldose extract: {warning}", file=sys.stderr)


def inspect(arguments: Sequence[str]) -> None:
    """Check a delta file completely and print what it holds."""
    config = parse(InspectConfig, arguments, prog="spieldose inspect")
    from rich.console import Console

    from spieldose_kernels.quiet import quiet_libraries

    quiet_libraries()
    from spieldose_trainer.interop.inspect import inspect as run

    run(config, Console(markup=False, highlight=False))
