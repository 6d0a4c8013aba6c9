"""Choosing tokens: filters, then seeded Gumbel noise, so that the largest score is the sample.

Noise depends on (seed, position, token) alone, so a request draws the same tokens whatever else is
in its batch. Adding Gumbel noise to logits and taking the largest samples from their softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Hold a token's log-probability, and the likeliest tokens' with theirs."""

    logprob: float
    likeliest: tuple[tuple[int, float], ...]


def perturb(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """Return scores whose argmax is the sampled token, [B, V] float32.

    logits is [B, V] float32; temperature (0 keeps the logits: greedy), top_p and min_p are [B]
    float32, top_k (0 keeps all), seed and position [B] int64. Filters apply as in transformers:
    temperature, then top-k, then top-p, then min-p.
    """
    greedy = (temperature == 0)[:, None]
    # any lower, logits would overflow
    scores = logits / torch.where(greedy, 1.0, temperature.clamp(min=MIN_TEMPERATURE)[:, None])
    ranked, order = scores.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    ranked = ranked.masked_fill((rank >= top_k[:, None]) & (top_k > 0)[:, None], -torch.inf)
    before = ranked.softmax(-1).cumsum(-1).roll(1, dims=-1)
    before[:, 0] = 0.0  # mass above each token
    cut = (before >= top_p[:, None]) & (top_p < 1)[:, None]  # rounded mass reaches 1 too early
    cut[:, 0] = False  # also where top_p is so small that it has become 0
    ranked = ranked.masked_fill(cut, -torch.inf)
    # p < min_p · p of the likeliest, whatever the others' mass
    ranked = ranked.masked_fill(ranked - ranked[:, :1] < min_p.log()[:, None], -torch.inf)
    kept = torch.empty_like(scores).scatter_(1, order, ranked)
    return torch.where(greedy, logits, kept + gumbel(seed, position, logits.shape[1]))


def penalise(
    logits: torch.Tensor,
    *,
    prompt: Sequence[int],
    answer: Sequence[int],
    repetition: float,
    presence: float,
    frequency: float,
) -> torch.Tensor:
    """Return one request's logits, [V] float32, made less likely to repeat what was said.

    `repetition` divides positive logits of all tokens so far and multiplies negative ones, as in
    transformers; then those of the answer lose `presence`, and `frequency` for each time they
    occur, as in OpenAI's API.
    """
    logits, device = logits.clone(), logits.device
    if repetition != 1:
        seen = torch.tensor(sorted({*prompt, *answer}), device=device)
        before = logits[seen]
        logits[seen] = torch.where(before < 0, before * repetition, before / repetition)
    if answer and (presence or frequency):
        said, times = torch.tensor(answer, device=device).unique(return_counts=True)
        logits[said] -= presence + frequency * times
    return logits


def gumbel(seed: torch.Tensor, position: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return standard Gumbel noise, [B, V] float32, a pure function of seed, position and token."""
    token = torch.arange(vocabulary, device=seed.device)
    key = _mix(_mix(seed) + position)
    bits = _mix(key[:, None] + token * _GOLDEN)
    uniform = (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log().float()


_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, odd, as int64; splitmix64's increment


def _mix(z: torch.Tensor) -> torch.Tensor:
    """Scramble int64 as splitmix64 does (Steele, Lea, Flood, OOPSLA 2014); overflow wraps."""
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    return z ^ _shift(z, 31)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without carrying the sign in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
