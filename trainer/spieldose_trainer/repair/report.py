"""What a repair mends, for people."""

import math
from collections.abc import Sequence
from functools import partial

from rich.table import Table

from spieldose_trainer.kind_table import kind_table
from spieldose_trainer.repair.repair import Repair


def mended_table(repair: Repair) -> Table:
    """Return a line for every kind of module: entries, and the error of outputs before and after.

    The error is ‖(W − NF4(W))·X‖ / ‖W·X‖, over the examples' tokens.
    """
    headings = "entries", "error in NF4", "repaired"
    return kind_table(headings, list(repair.energies), partial(_cells, repair))


def _cells(repair: Repair, names: Sequence[str]) -> tuple[str, str, str]:
    count = sum(repair.adapter.modules[name].nnz for name in names)
    energies = [repair.energies[name] for name in names]
    output = sum(energy.output for energy in energies)
    before, after = sum(e.before for e in energies), sum(e.after for e in energies)
    return f"{count:,}", f"{math.sqrt(before / output):.2%}", f"{math.sqrt(after / output):.2%}"
