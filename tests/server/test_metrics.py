"""What Prometheus reads: every metric moves when it should, and labels stay bounded."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import ClientError
from spieldose_server.metrics import MAX_ADAPTERS, OTHERS, Metrics

from ..conftest import Running, eventually
from .test_adapters import Stream

SHORT = pb.SamplingParams(max_tokens=6)
Sample = tuple[str, tuple[tuple[str, str], ...]]


@pytest.fixture
def measured(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Iterator[Running]:
    """A server with the adapters a1 to a3, room for two, and metrics."""
    for seed in range(1, 4):
        write_delta(path := tmp_path / f"a{seed}.safetensors", make_adapter(seed))
        os.utime(path, (1e9, 1e9))  # long settled: only headers are read
    yield from serve_tiny(tmp_path, max_adapters=2, metrics_listen="127.0.0.1:0")


def scraped(running: Running) -> dict[Sample, float]:
    url = f"http://127.0.0.1:{running.server.metrics_port}/metrics"
    text = urlopen(url, timeout=10).read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: dict[Sample, float], name: str, **labels: str) -> float:
    return found[f"spieldose_{name}", tuple(sorted(labels.items()))]


def test_a_request_moves_what_it_should(measured: Running) -> None:
    before = scraped(measured)
    reply = measured.client.generate("hello", adapter="a1", sampling=SHORT)
    eventually(lambda: value(scraped(measured), "requests_accepted") == 0)
    after = scraped(measured)
    count = len(reply.token_ids)
    assert value(after, "requests_total", adapter="a1", code="OK") == 1
    assert value(after, "tokens_total", adapter="a1") == count
    assert value(after, "prompt_tokens_total", adapter="a1") == 5
    assert value(after, "queue_seconds_count") == 1
    assert value(after, "first_token_seconds_count") == 1
    assert value(after, "inter_token_seconds_count") == count - 1
    assert 0 < value(after, "first_token_seconds_sum") < 60
    assert value(after, "load_seconds_count") == 1
    assert value(after, "leases_total", kind="disk") == 1
    steps = value(after, "steps_total") - value(before, "steps_total")
    assert steps >= count
    for what in ("step_adapters", "step_requests", "step_tokens"):
        assert value(after, f"{what}_count") == steps
    assert value(after, "step_adapters_sum") == steps
    assert value(after, "step_tokens_sum") == 5 + count - 1
    assert value(before, "adapters", kind="found") == 3
    assert value(after, "adapters", kind="found") == 2
    assert value(after, "adapters", kind="resident") == 1


def test_what_is_held_shows_while_it_is_held(measured: Running) -> None:
    with Stream(measured, "a1"):
        found = scraped(measured)
        assert value(found, "requests_running") == value(found, "requests_accepted") == 1
        assert 0 < value(found, "kv_pages_held") <= value(found, "kv_pages")
        for tier in ("device", "host"):
            taken = value(found, "adapter_bytes", kind=tier)
            assert 0 < taken < value(found, "adapter_budget_bytes", kind=tier)
    eventually(lambda: value(scraped(measured), "kv_pages_held") == 0)
    assert value(scraped(measured), "requests_total", adapter="a1", code="CANCELLED") == 1


def test_hits_misses_and_evictions_are_told_apart(measured: Running) -> None:
    for name in ("a1", "a1", "a2", "a3", "a1"):  # the last had to leave for a3
        measured.client.generate("hello", adapter=name, sampling=SHORT)
    found = scraped(measured)
    tiers = {tier: value(found, "leases_total", kind=tier) for tier in ("device", "host", "disk")}
    assert tiers == {"device": 1, "host": 1, "disk": 3}
    assert value(found, "evictions_total") == 2


def test_a_prefix_found_in_the_cache_is_counted(measured: Running) -> None:
    for _ in range(2):
        measured.client.generate("x" * 200, sampling=SHORT)
    assert value(scraped(measured), "cached_tokens_total") >= 128


def test_errors_are_counted_by_their_code_and_make_no_labels(measured: Running) -> None:
    for name in ("nobody", "x" * 1000):
        with pytest.raises(ClientError):
            measured.client.generate("hello", adapter=name)
    with pytest.raises(ClientError):
        measured.client.generate("", adapter="a1")
    found = scraped(measured)
    assert value(found, "requests_total", adapter="(none)", code="NOT_FOUND") == 2
    assert value(found, "requests_total", adapter="(none)", code="INVALID_ARGUMENT") == 1
    assert not any("nobody" in str(sample) for sample in found)


def test_a_thousand_adapters_make_no_thousand_labels() -> None:
    metrics = Metrics()
    labels = {metrics.label(f"a{i}") for i in range(1000)}
    assert len(labels) == MAX_ADAPTERS + 1
    assert metrics.label("a0") == "a0"
    assert metrics.label("a999") == OTHERS


def test_without_an_address_there_are_none(running: Running) -> None:
    assert running.server.metrics_port == 0
