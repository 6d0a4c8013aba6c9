"""What a server did between two scrapes of its metrics."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from spieldose_server.scrape import Labels, Scrape, summed


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Hold the median and the 99th percentile, in seconds; None: there was nothing."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Level:
    """Hold how much is taken of what there is."""

    held: float
    whole: float


@dataclass(frozen=True, slots=True)
class Played:
    """Hold what one adapter did, a second."""

    adapter: str  # its label
    tokens: float
    prompt_tokens: float
    requests: float
    errors: float  # requests that did not end OK


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Hold what a server did between two scrapes, a second, and what it held at the second."""

    base: str
    version: str
    tokens: float
    prompt_tokens: float
    cached_tokens: float
    requests: float
    errors: Mapping[str, float]  # by code, those that are not 0
    running: float
    waiting: float
    steps: float
    step: Mapping[str, float | None]  # mean of a forward pass: requests, adapters, tokens
    latency: Mapping[str, Quantiles]  # in the queue, to the first token, between tokens, of loads
    kv: Level  # pages
    memory: Mapping[str, Level]  # adapters' bytes, by tier
    found: Mapping[str, float]  # adapters needed, by where they were
    loads: float
    evictions: float
    states: Mapping[str, float]  # versions of adapters, by state
    processor: float  # cores in use
    resident: float  # bytes of the process
    played: tuple[Played, ...]  # the busiest first


def rates(before: Scrape, after: Scrape) -> Rates:
    """Compare two scrapes of one server, the older first."""
    seconds = max(after.at - before.at, 1e-9)

    def total(name: str) -> float:
        return sum(after.grown(name, before).values()) / seconds

    def by(label: str, name: str) -> dict[str, float]:
        grown = summed(after.grown(name, before), label)
        return {kind: value / seconds for kind, value in grown.items()}

    def mean(name: str) -> float | None:
        count = total(f"{name}_count")
        return total(f"{name}_sum") / count if count else None

    def quantiles(name: str) -> Quantiles:
        grown = after.grown(f"{name}_bucket", before)
        return Quantiles(quantile(grown, 0.5), quantile(grown, 0.99))

    def level(held: str, whole: str) -> Level:
        return Level(after.value(held), after.value(whole))

    [info] = map(dict, after.samples["spieldose_build_info"])
    running = after.value("spieldose_requests_running")
    codes = by("code", "spieldose_requests_total")
    held = after.by("kind", "spieldose_adapter_bytes")
    budgets = after.by("kind", "spieldose_adapter_budget_bytes")
    return Rates(
        base=info["base"],
        version=info["version"],
        tokens=total("spieldose_tokens_total"),
        prompt_tokens=total("spieldose_prompt_tokens_total"),
        cached_tokens=total("spieldose_cached_tokens_total"),
        requests=sum(codes.values()),
        errors={code: rate for code, rate in codes.items() if code != "OK" and rate},
        running=running,
        waiting=max(0.0, after.value("spieldose_requests_accepted") - running),
        steps=total("spieldose_steps_total"),
        step={what: mean(f"spieldose_step_{what}") for what in ("requests", "adapters", "tokens")},
        latency={
            what: quantiles(f"spieldose_{what}_seconds")
            for what in ("queue", "first_token", "inter_token", "load")
        },
        kv=level("spieldose_kv_pages_held", "spieldose_kv_pages"),
        memory={tier: Level(held.get(tier, 0.0), budgets[tier]) for tier in budgets},
        found=by("kind", "spieldose_leases_total"),
        loads=total("spieldose_load_seconds_count"),
        evictions=total("spieldose_evictions_total"),
        states=after.by("kind", "spieldose_adapters"),
        processor=total("process_cpu_seconds_total"),
        resident=after.value("process_resident_memory_bytes"),
        played=_played(before, after, seconds),
    )


def quantile(buckets: Mapping[Labels, float], q: float) -> float | None:
    """Return a histogram's quantile as PromQL's histogram_quantile does.

    The buckets are cumulative, by their upper bound `le`. Within one the values are taken to be
    evenly spread; of the last, without a bound, the lower one is returned. None: it is empty.
    """
    bounds = sorted((float(le), count) for le, count in summed(buckets, "le").items())
    if not bounds or not bounds[-1][1]:
        return None
    rank = q * bounds[-1][1]
    for (low, below), (high, count) in pairwise([(0.0, 0.0), *bounds]):
        if count >= rank:
            return (
                low if math.isinf(high) else low + (high - low) * (rank - below) / (count - below)
            )
    raise AssertionError("the last bucket holds all")


def _played(before: Scrape, after: Scrape, seconds: float) -> tuple[Played, ...]:
    def by(name: str, *, failed: bool = False) -> dict[str, float]:
        grown = after.grown(f"spieldose_{name}_total", before)
        return summed(
            {k: v for k, v in grown.items() if not failed or ("code", "OK") not in k}, "adapter"
        )

    tokens, prompts, requests = by("tokens"), by("prompt_tokens"), by("requests")
    errors = by("requests", failed=True)
    found = [
        Played(
            adapter,
            *(part.get(adapter, 0.0) / seconds for part in (tokens, prompts, requests, errors)),
        )
        for adapter in {*tokens, *prompts, *requests}
    ]
    busy = [played for played in found if played.tokens or played.prompt_tokens or played.requests]
    return tuple(
        sorted(busy, key=lambda played: (-played.tokens, -played.requests, played.adapter))
    )
