"""Sampling against transformers' own filters and against the distribution it promises."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from spieldose_server.sampling import gumbel, perturb

VOCABULARY = 50


def test_temperature_0_keeps_the_logits() -> None:
    logits = torch.randn(3, VOCABULARY)
    assert torch.equal(scores(logits, temperature=0.0, top_k=5, top_p=0.5), logits)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, VOCABULARY, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_the_tokens_kept_are_those_transformers_keeps(
    temperature: float, top_k: int, top_p: float
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCABULARY) * 2
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = scores(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(got.isfinite(), expected.isfinite())


def test_draws_follow_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(8)
    draws = 20_000
    picked = scores(logits.expand(draws, 8), temperature=1.0, seed=torch.arange(draws)).argmax(-1)
    expected = logits.softmax(-1) * draws
    chi_square = ((picked.bincount(minlength=8) - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 99.9 % quantile at 7 degrees of freedom


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    seeds, positions = torch.tensor([5, -5, 5]), torch.tensor([3, 3, 4])
    together = gumbel(seeds, positions, VOCABULARY)
    alone = [gumbel(s[None], p[None], VOCABULARY)[0] for s, p in zip(seeds, positions, strict=True)]
    assert torch.equal(together, torch.stack(alone))
    assert len({tuple(row.tolist()) for row in together}) == 3
    assert together.isfinite().all()


def test_a_mixed_batch_keeps_greedy_rows_greedy() -> None:
    logits = torch.randn(2, VOCABULARY)
    got = scores(logits, temperature=torch.tensor([0.0, 2.0]))
    assert torch.equal(got[0], logits[0])
    assert not torch.equal(got[1], logits[1])


def scores(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = logits.shape[0]
    return perturb(
        logits,
        temperature=torch.as_tensor(temperature).expand(rows),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p),
        seed=torch.arange(rows) if seed is None else seed,
        position=torch.zeros(rows, dtype=torch.int64),
    )
