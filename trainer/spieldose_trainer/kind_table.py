"""A table with a line for every kind of module."""

from collections.abc import Callable, Iterable, Sequence

from rich.table import Table

from spieldose_kernels.errors import one_line
from spieldose_trainer.module_kind import by_kind


def kind_table(
    headings: Iterable[str], names: Sequence[str], cells: Callable[[Sequence[str]], Iterable[str]]
) -> Table:
    """Return the cells of each kind of these modules, then those of all of them."""
    table = Table(box=None)
    table.add_column("module", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for kind, members in by_kind(names).items():
        table.add_row(one_line(kind), *cells(members))
    table.add_row("all", *cells(names))
    return table
