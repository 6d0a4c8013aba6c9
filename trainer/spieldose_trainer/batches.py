"""The rows of a run in batches: what a batch holds beside its tensors, and how many go together."""

from collections.abc import Callable, Sequence
from typing import Any

from spieldose_trainer.data import Example

Row = Example | list[Example]  # a list where examples are packed


def collate_counted(
    rows: Sequence[Row], *, collate: Callable[..., dict[str, Any]], pad: int
) -> dict[str, Any]:
    """Return the tensors that `collate` makes of rows, and as `tokens` how many fill them."""
    return collate(rows, pad=pad) | {"tokens": sum(map(_tokens, rows))}


def _tokens(row: Row) -> int:
    return sum(len(example.tokens) for example in (row if isinstance(row, list) else [row]))
