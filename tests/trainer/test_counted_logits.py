"""The loss from the logits that count alone is the loss from all of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from spieldose_kernels.base import Base
from spieldose_trainer.counted_logits import counted_only
from spieldose_trainer.data import IGNORED
from spieldose_trainer.model import SparseModel

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2))


def batch() -> dict[str, torch.Tensor]:
    """Return two rows whose answers begin and end at different places."""
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, IGNORED)
    labels[0, 4:6], labels[1, 5:9] = ids[0, 4:6], ids[1, 5:9]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": 12}], ids=["mean", "sum"])
def test_loss_and_gradient_are_those_of_all_logits(extra: dict[str, Any]) -> None:
    model, found = llama(), []
    for arguments in (batch(), counted_only(model, batch())):
        model.zero_grad()
        loss = model(**arguments, **extra).loss
        loss.backward()
        found.append((loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    for all_logits, counted in zip(*found, strict=True):
        torch.testing.assert_close(counted, all_logits)


def test_only_places_before_a_counted_token_get_logits() -> None:
    model = llama()
    logits = model(**counted_only(model, batch())).logits
    assert logits.shape[1] == 5 + 1  # before tokens 4 to 8, and one that is compared with nothing


def test_a_batch_without_counted_tokens_is_left_alone() -> None:
    nothing = batch() | {"labels": torch.full((2, 9), IGNORED)}
    assert counted_only(llama(), nothing).keys() == nothing.keys()


def test_a_first_token_that_counts_is_no_target() -> None:
    model, given = llama(), batch()
    given["labels"][:, 0] = given["input_ids"][:, 0]  # nothing stands before it
    torch.testing.assert_close(model(**counted_only(model, given)).loss, model(**given).loss)


def test_other_architectures_agree() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    torch.testing.assert_close(model(**counted_only(model, batch())).loss, model(**batch()).loss)


def test_training_makes_no_other_logits(
    tiny_base: Base, make_model: Callable[..., SparseModel]
) -> None:
    model = make_model(tiny_base, density=0.02)
    assert model(**batch()).logits.shape[1] == 5 + 1
