"""Packed rows: every example as if it stood alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM

from spieldose_trainer.data import IGNORED, Example, collate
from spieldose_trainer.errors import ConfigError, DataError
from spieldose_trainer.packing import check_separation, collate_packed, pack

PAD = 9
LENGTHS = [11, 9, 8, 5, 4, 2]
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@ATTENTION
def test_a_packed_example_has_the_logits_it_has_alone(tiny_directory: Path, attention: str) -> None:
    model, rows = load(tiny_directory, attention), two_rows()
    batch = collate_packed(rows, pad=PAD)
    packed = model(**batch, use_cache=False).logits
    for row, examples in enumerate(rows):
        start = 0
        for example in examples:
            stop = start + len(example.tokens)
            alone = model(input_ids=torch.tensor([example.tokens])).logits[0]
            torch.testing.assert_close(packed[row, start:stop], alone, rtol=1e-4, atol=1e-4)
            start = stop


@ATTENTION
def test_loss_and_gradient_of_packed_rows_are_those_of_the_padded_examples(
    tiny_directory: Path, attention: str
) -> None:
    model, rows = load(tiny_directory, attention).requires_grad_(True), two_rows()
    padded = collate([example for row in rows for example in row], pad=PAD)
    expected, found = (both(model, batch) for batch in (padded, collate_packed(rows, pad=PAD)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_last_token_of_one_example_never_predicts_the_first_of_the_next() -> None:
    everything = [Example([1, 2, 3], (range(3),)), Example([4, 5], (range(2),))]
    batch = collate_packed([everything], pad=PAD)
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 5]]


def test_positions_begin_again_with_every_example_and_with_the_padding() -> None:
    one, two = Example([1, 2, 3], (range(1, 3),)), Example([4, 5], (range(1, 2),))
    batch = {
        name: rows.tolist() for name, rows in collate_packed([[one, two], [two]], pad=9).items()
    }
    assert batch["input_ids"] == [[1, 2, 3, 4, 5], [4, 5, 9, 9, 9]]
    assert batch["position_ids"] == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"][1] == [IGNORED, 5, IGNORED, IGNORED, IGNORED]


def test_the_longest_go_first_and_the_others_fill_the_gaps() -> None:
    rows = pack(some(LENGTHS), max_length=20, seed=0)
    assert [[len(example.tokens) for example in row] for row in rows] == [[11, 9], [8, 5, 4, 2]]


def test_every_example_is_in_one_row_and_no_row_is_too_long() -> None:
    lengths = torch.randint(2, 65, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    examples = some(lengths)
    rows = pack(examples, max_length=64, seed=0)
    assert Counter(id(e) for row in rows for e in row) == Counter(map(id, examples))
    assert max(sum(len(e.tokens) for e in row) for row in rows) <= 64
    assert sum(lengths) / (64 * len(rows)) > 0.95


def test_neighbours_in_the_file_are_spread_over_the_rows() -> None:
    examples = some([4] * 1000)
    places = {id(example): place for place, example in enumerate(examples)}
    row, *_ = pack(examples, max_length=40, seed=0)
    found = [places[id(example)] for example in row]
    assert max(found) - min(found) > 100


def test_the_seed_alone_decides_which_examples_share_a_row() -> None:
    examples = some([4] * 50)
    torch.manual_seed(1)
    first = pack(examples, max_length=8, seed=0)
    before = torch.get_rng_state()
    assert pack(examples, max_length=8, seed=0) == first
    assert pack(examples, max_length=8, seed=1) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(DataError, match="expected examples of at most 10 tokens, got 11"):
        pack(some(LENGTHS), max_length=10, seed=0)


@ATTENTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_masks_by_position_may_be_packed(
    tiny_directory: Path, attention: str, dtype: torch.dtype
) -> None:
    model = load(tiny_directory, attention).to(dtype).train()
    check_separation(model)
    assert model.training


def test_a_base_in_which_examples_see_each_other_is_refused(tiny_directory: Path) -> None:
    with pytest.raises(
        ConfigError, match="keeps packed examples apart, got Mixing, which does not"
    ):
        check_separation(Mixing.from_pretrained(tiny_directory))


def test_a_base_that_knows_no_position_ids_is_refused() -> None:
    model = BloomForCausalLM(
        BloomConfig(vocab_size=32, hidden_size=16, n_head=2, initializer_range=0.2)
    )
    with pytest.raises(ConfigError, match=r"packing: expected .* got BloomForCausalLM"):
        check_separation(model)


class Mixing(LlamaForCausalLM):
    """Take no notice of positions."""

    def forward(self, *, position_ids: Any = None, **inputs: Any) -> Any:
        return super().forward(**inputs)


def load(directory: Path, attention: str) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(directory, attn_implementation=attention)
    return model.requires_grad_(False)


def some(lengths: list[int]) -> list[Example]:
    """Make random examples of given lengths, different in what they count."""
    draw = torch.Generator().manual_seed(0)
    return [
        Example(torch.randint(256, (n,), generator=draw).tolist(), (range(1 + n // 3, n),))
        for n in lengths
    ]


def two_rows() -> list[list[Example]]:
    """Return two rows of several examples, the second shorter than the first."""
    examples = some([7, 6, 3, 5, 4])
    return [examples[:3], examples[3:]]


def both(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """Return loss and a gradient."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad
    assert gradient is not None
    return loss.detach(), gradient.clone()
