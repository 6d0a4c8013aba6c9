"""What an extraction kept of a fine-tune, for people."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Final

from rich.table import Table

from spieldose_kernels.errors import one_line
from spieldose_trainer.interop.extract import Extraction
from spieldose_trainer.kind_table import kind_table
from spieldose_trainer.module_kind import by_kind

NAMED: Final = 5  # kinds of tensors named in a warning


def kept_table(extraction: Extraction) -> Table:
    """Return a line for every kind of module: entries, ‖ΔW‖, and the share of it that is kept."""
    headings = "entries", "‖ΔW‖", "kept"
    return kind_table(headings, list(extraction.squares), partial(_cells, extraction))


def warnings(extraction: Extraction) -> list[str]:
    """Say in a line each what changed and no delta can carry, and what only seems to have."""
    said = []
    if outside := extraction.outside:
        kinds = list(by_kind(outside))
        names = ", ".join(kinds[:NAMED]) + (", …" if len(kinds) > NAMED else "")
        said.append(
            f"tensors outside the target layers differ and are left out ({len(outside)}): {names}"
        )
    if settings := extraction.settings:
        said.append(
            f"the configurations differ, and a delta plays by the base's: {', '.join(settings)}"
        )
    if extraction.narrowed is not None:
        before, after = extraction.narrowed
        said.append(
            f"the base is stored in {before}, the fine-tune in {after}: what that rounds counts as "
            "change; a base stored alike tells more"
        )
    return [one_line(line) for line in said]


def _cells(extraction: Extraction, names: Sequence[str]) -> tuple[str, str, str]:
    modules = extraction.adapter.modules
    entries = sum(modules[name].nnz for name in names if name in modules)
    kept = extraction.kept(names)
    norm = math.sqrt(sum(extraction.squares[name] for name in names))
    return f"{entries:,}", f"{norm:.3g}", "–" if kept is None else f"{kept:.1%}"
