"""What an extraction kept of a fine-tune, for people."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Final

from rich.table import Table

from spieldose_trainer.interop.extract import Extraction
from spieldose_trainer.kind_table import kind_table

NAMED: Final = 3  # tensors named in the warning


def kept_table(extraction: Extraction) -> Table:
    """Return a line for every kind of module: entries, ‖ΔW‖, and the share of it that is kept."""
    headings = "entries", "‖ΔW‖", "kept"
    return kind_table(headings, list(extraction.squares), partial(_cells, extraction))


def outside_warning(extraction: Extraction) -> str | None:
    """Return one line about what changed and no delta can carry; None if nothing did."""
    outside = extraction.outside
    if not outside:
        return None
    names = ", ".join(outside[:NAMED]) + (", …" if len(outside) > NAMED else "")
    return f"tensors outside the target layers differ and are left out ({len(outside)}): {names}"


def _cells(extraction: Extraction, names: Sequence[str]) -> tuple[str, str, str]:
    modules = extraction.adapter.modules
    entries = sum(modules[name].nnz for name in names if name in modules)
    kept = extraction.kept(names)
    norm = math.sqrt(sum(extraction.squares[name] for name in names))
    return f"{entries:,}", f"{norm:.3g}", "–" if kept is None else f"{kept:.1%}"
