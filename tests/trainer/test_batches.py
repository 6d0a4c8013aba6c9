"""An epoch in batches that several processes share: the last is filled up with blanks."""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from spieldose_trainer.batches import BlanksLast, Row, Rows, collate_counted
from spieldose_trainer.data import IGNORED, Example, collate
from spieldose_trainer.packing import collate_packed

EXAMPLE = Example([1, 2, 3], (range(1, 3),))


def test_every_epoch_is_shuffled_as_accelerate_does_and_blanks_come_last() -> None:
    order = BlanksLast(Rows([EXAMPLE] * 10, batch=8), seed=7)
    expected = SeedableRandomSampler(range(10), data_seed=7)
    assert len(order) == 16
    for _ in range(2):
        assert list(order) == [*expected, *range(10, 16)]


@pytest.mark.parametrize("count", [8, 16])
def test_full_batches_need_no_blanks(count: int) -> None:
    assert len(Rows([EXAMPLE] * count, batch=8)) == count


@pytest.mark.parametrize(("row", "make"), [(EXAMPLE, collate), ([EXAMPLE], collate_packed)])
def test_a_blank_counts_neither_tokens_nor_labels(row: Row, make: object) -> None:
    _, blank = Rows([row], batch=2)
    batch = collate_counted([row, blank], collate=make, pad=9)
    assert batch["tokens"] == 3
    assert torch.equal(batch["labels"][1], torch.full((3,), IGNORED))
    assert collate_counted([blank], collate=make, pad=9)["tokens"] == 0
