"""What Prometheus reads: every metric moves when it should, and labels stay bounded."""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client, ClientError
from spieldose_server.engine import PAGE_TOKENS
from spieldose_server.metrics import BASE, MAX_ADAPTERS, NONE, OTHERS, Metrics
from spieldose_server.metrics_table import MOVES, described, page

from ..conftest import Running, eventually
from .test_adapters import Stream
from .test_process import free_port, process

CURRENT = Path(__file__).parents[2] / "docs" / "METRICS.md"
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
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposed(running.server.metrics_port))
        for sample in family.samples
    }


def exposed(port: int, *, accept: str = "*/*") -> str:
    url = Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urlopen(url, timeout=10) as answer:
        return answer.read().decode()


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


# by name: what shows that it moved between an idle server, one that generates, and after traffic
GROWS = """
    requests_total tokens_total prompt_tokens_total queue_seconds first_token_seconds
    inter_token_seconds load_seconds step_adapters step_requests step_tokens leases_total
    evictions_total steps_total cached_tokens_total
""".split()
HELD = "requests_running requests_accepted kv_pages_held".split()
CHANGES = "adapter_bytes adapters".split()
STAYS = "kv_pages adapter_budget_bytes build_info".split()


def test_every_metric_moves_or_stays_as_it_should(measured: Running) -> None:
    idle = families(exposed(measured.server.metrics_port))
    with Stream(measured, "a1"):
        playing = families(exposed(measured.server.metrics_port))
    for name in ("a2", "a3"):  # a1 has to leave
        for _ in range(2):
            measured.client.generate("x" * 200, adapter=name, sampling=SHORT)
    eventually(lambda: value(scraped(measured), "requests_accepted") == 0)
    after = families(exposed(measured.server.metrics_port))
    for name in GROWS:
        kinds = set(idle[name]) | set(after[name])
        growth = [after[name][kind] - idle[name].get(kind, 0) for kind in kinds]
        assert min(growth) >= 0 < max(growth), name
    for name in HELD:
        assert idle[name] == after[name] == {(): 0}, name
        assert playing[name][()] > 0, name
    for name in CHANGES:
        assert idle[name] != playing[name] != after[name], name
    for name in STAYS:
        assert idle[name] == playing[name] == after[name], name
    assert after["kv_pages"] == {(): 4096 / PAGE_TOKENS}
    config = measured.server.config
    assert after["adapter_budget_bytes"] == {
        ("device",): config.adapter_memory,
        ("host",): config.host_memory,
    }
    spec = measured.base.spec
    assert after["build_info"] == {
        (spec.name, spec.fingerprint[:12], version("spieldose")): 1,
    }
    process = {name for name in after if name.startswith("process_")}
    assert after["process_cpu_seconds_total"][()] > idle["process_cpu_seconds_total"][()]
    assert all(after[name][()] > 0 for name in process)
    assert set(after) == {*GROWS, *HELD, *CHANGES, *STAYS, *process}


def families(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Return each metric's values by its labels' values; a histogram's are its sums."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix("spieldose_")
        name += "_total" if family.type == "counter" else ""
        found[name] = {
            tuple(label for _, label in sorted(sample.labels.items())): sample.value
            for sample in family.samples
            if not sample.name.endswith(("_bucket", "_count"))
        }
    return found


def test_the_page_in_the_tree_is_current() -> None:
    assert CURRENT.read_text() == page(), "run `make metrics`"
    assert list(MOVES) == [metric.name for metric in described()]


def test_a_process_exposes_what_is_documented_and_nothing_else(
    tiny_directory: Path, tmp_path: Path, make_adapter: Callable[..., Any]
) -> None:
    write_delta(tmp_path / "a1.safetensors", make_adapter(1))
    port = free_port()
    metrics = ("--metrics-listen", f"127.0.0.1:{port}")
    with process(tiny_directory, tmp_path, *metrics) as (_, address), Client(address) as client:
        client.generate("hello", adapter="a1", sampling=SHORT)
        text = exposed(port)
        opened = exposed(port, accept="application/openmetrics-text")
    found = list(text_string_to_metric_families(text))
    documented = list(described())
    assert {(_scraped_name(f), f.type, f.documentation) for f in found} == {
        (metric.name, metric.type, metric.what) for metric in documented
    }
    for family in found:
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels == set(re.findall(r"`(\w+)`", MOVES[_scraped_name(family)][0])), family.name
    names = {sample.name for f in openmetrics_families(opened) for sample in f.samples}
    assert names == {sample.name for family in found for sample in family.samples}


def _scraped_name(family: Any) -> str:
    return str(family.name) + ("_total" if family.type == "counter" else "")


def test_a_thousand_adapters_that_play_make_no_thousand_labels(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> None:
    write_delta(first := tmp_path / "a0.safetensors", make_adapter(1))
    os.utime(first, (1e9, 1e9))
    for i in range(1, 1000):
        os.link(first, tmp_path / f"a{i}.safetensors")
    one = pb.SamplingParams(max_tokens=1)
    for running in serve_tiny(tmp_path, metrics_listen="127.0.0.1:0"):

        def play(adapter: str, client: Client = running.client) -> None:
            client.generate("x", adapter=adapter, sampling=one)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(play, (f"a{i}" for i in range(1000))))
        play("")
        with pytest.raises(ClientError):
            play("nobody")
        found = scraped(running)
    for name in ("requests_total", "tokens_total", "prompt_tokens_total"):
        labels = {dict(ls)["adapter"] for metric, ls in found if metric == f"spieldose_{name}"}
        others = {OTHERS, BASE, NONE} if name == "requests_total" else {OTHERS, BASE}
        assert labels >= others
        assert len(labels - others) == MAX_ADAPTERS
    assert value(found, "requests_total", adapter=OTHERS, code="OK") == 1000 - MAX_ADAPTERS
    assert len(found) < 1000


def test_those_that_have_labels_keep_them() -> None:
    metrics = Metrics()
    for i in range(1000):
        metrics.label(f"a{i}")
    assert metrics.label("a0") == "a0"
    assert metrics.label("a999") == OTHERS


def test_without_an_address_there_are_none(running: Running) -> None:
    assert running.server.metrics_port == 0
