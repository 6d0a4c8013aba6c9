"""Sampling against transformers' own filters and against the distribution it promises."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spieldose_server.sampling import gumbel, penalise, perturb

VOCABULARY = 50


def test_temperature_0_keeps_the_logits() -> None:
    logits = torch.randn(3, VOCABULARY)
    assert torch.equal(scores(logits, temperature=0.0, top_k=5, top_p=0.5), logits)


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-45])
def test_a_temperature_next_to_0_takes_the_likeliest_token(temperature: float) -> None:
    logits = torch.randn(3, VOCABULARY) * 30
    got = scores(logits, temperature=temperature, top_k=0, top_p=1.0)
    assert torch.equal(got.argmax(1), logits.argmax(1))


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


@pytest.mark.parametrize("top_p", [1e-30, 1e-46])
def test_a_top_p_next_to_0_takes_the_likeliest_token(top_p: float) -> None:
    logits = torch.randn(3, VOCABULARY) * 3
    got = scores(logits, temperature=1.0, top_k=0, top_p=top_p)
    assert torch.equal(got.argmax(1), logits.argmax(1))


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
    min_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = logits.shape[0]
    return perturb(
        logits,
        temperature=torch.as_tensor(temperature).expand(rows),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        seed=torch.arange(rows) if seed is None else seed,
        position=torch.zeros(rows, dtype=torch.int64),
    )


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("top_k", [0, 7])
def test_min_p_keeps_what_transformers_keeps(min_p: float, top_k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCABULARY) * 2
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    expected = MinPLogitsWarper(min_p)(None, expected)
    got = scores(logits, temperature=0.7, top_k=top_k, min_p=min_p)
    assert torch.equal(got.isfinite(), expected.isfinite())


@pytest.mark.parametrize("repetition", [0.5, 1.0, 1.3])
def test_repetition_is_penalised_as_in_transformers(repetition: float) -> None:
    torch.manual_seed(0)
    logits, prompt, answer = torch.randn(VOCABULARY), [3, 3, 7], [9, 3]
    expected = RepetitionPenaltyLogitsProcessor(repetition)(
        torch.tensor([prompt + answer]), logits[None].clone()
    )
    got = penalised(logits, prompt=prompt, answer=answer, repetition=repetition)
    assert torch.allclose(got, expected[0])


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = torch.randn(VOCABULARY)
    got = penalised(logits, prompt=[1, 2], answer=[2, 5, 5, 5], presence=0.5, frequency=0.25)
    expected = logits.clone()
    expected[2] -= 0.5 + 0.25
    expected[5] -= 0.5 + 3 * 0.25
    assert torch.allclose(got, expected)
    assert torch.equal(penalised(logits, prompt=[1], answer=[], presence=2.0), logits)


def penalised(
    logits: torch.Tensor,
    *,
    prompt: list[int],
    answer: list[int],
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> torch.Tensor:
    return penalise(
        logits,
        prompt=prompt,
        answer=answer,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
    )
