"""The rows of a run in batches: blanks that fill an epoch's last, and the tokens of each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate.data_loader import SeedableRandomSampler

from spieldose_trainer.data import Example

Row = Example | list[Example]  # a list where examples are packed
BLANK = Example([0], ())  # nothing in it counts; a row without a token would have no attention


class Rows(list[Row]):
    """Hold a run's rows, then as many blanks as fill up the last of batches of some size.

    Accelerate fills up what several processes are to share with rows of the epoch's beginning,
    which would be trained twice.
    """

    def __init__(self, rows: Sequence[Row], *, batch: int) -> None:
        blank: Row = [BLANK] if isinstance(rows[0], list) else BLANK
        super().__init__([*rows, *[blank] * (-len(rows) % batch)])
        self.real = len(rows)


class BlanksLast(SeedableRandomSampler):  # type: ignore[misc]  # accelerate has no types
    """Shuffle the rows of an epoch as accelerate does; the blanks behind them stay there."""

    def __init__(self, rows: Rows, *, seed: int) -> None:
        super().__init__(range(rows.real), data_seed=seed)
        self._rows = rows

    def __iter__(self) -> Iterator[int]:
        yield from super().__iter__()
        yield from range(self._rows.real, len(self._rows))

    def __len__(self) -> int:
        return len(self._rows)


def collate_counted(
    rows: Sequence[Row], *, collate: Callable[..., dict[str, Any]], pad: int
) -> dict[str, Any]:
    """Return the tensors that `collate` makes of rows, and as `tokens` how many fill them."""
    return collate(rows, pad=pad) | {"tokens": sum(map(_tokens, rows))}


def _tokens(row: Row) -> int:
    examples = row if isinstance(row, list) else [row]
    return sum(len(example.tokens) for example in examples if example.counted)
