"""`spieldose top`: scrapes become rates, rates a frame; a server that is gone becomes a line."""

import io
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.errors import ConfigError
from spieldose_server.rates import Level, Played, Quantiles, quantile, rates
from spieldose_server.scrape import NoMetrics, Scrape
from spieldose_server.top import TopArguments, Watch

from ..conftest import Running
from .test_process import command

BEFORE = """
# TYPE spieldose_build_info gauge
spieldose_build_info{base="toy",fingerprint="f",version="1.2"} 1
# TYPE spieldose_requests_total counter
spieldose_requests_total{adapter="a1",code="OK"} 10
spieldose_requests_total{adapter="a2",code="OK"} 50
# TYPE spieldose_tokens_total counter
spieldose_tokens_total{adapter="a1"} 100
spieldose_tokens_total{adapter="a2"} 700
# TYPE spieldose_queue_seconds histogram
spieldose_queue_seconds_bucket{le="0.1"} 5
spieldose_queue_seconds_bucket{le="1.0"} 5
spieldose_queue_seconds_bucket{le="+Inf"} 5
# TYPE spieldose_step_requests histogram
spieldose_step_requests_bucket{le="+Inf"} 10
spieldose_step_requests_sum 20
spieldose_step_requests_count 10
# TYPE spieldose_leases_total counter
spieldose_leases_total{kind="device"} 4
spieldose_leases_total{kind="disk"} 1
"""
AFTER = """
# TYPE spieldose_build_info gauge
spieldose_build_info{base="toy",fingerprint="f",version="1.2"} 1
# TYPE spieldose_requests_total counter
spieldose_requests_total{adapter="a1",code="OK"} 14
spieldose_requests_total{adapter="a1",code="CANCELLED"} 2
spieldose_requests_total{adapter="a2",code="OK"} 50
spieldose_requests_total{adapter="(none)",code="NOT_FOUND"} 4
# TYPE spieldose_tokens_total counter
spieldose_tokens_total{adapter="a1"} 180
spieldose_tokens_total{adapter="a2"} 700
spieldose_tokens_total{adapter="a3"} 200
# TYPE spieldose_queue_seconds histogram
spieldose_queue_seconds_bucket{le="0.1"} 9
spieldose_queue_seconds_bucket{le="1.0"} 15
spieldose_queue_seconds_bucket{le="+Inf"} 15
# TYPE spieldose_step_requests histogram
spieldose_step_requests_bucket{le="+Inf"} 14
spieldose_step_requests_sum 40
spieldose_step_requests_count 14
# TYPE spieldose_leases_total counter
spieldose_leases_total{kind="device"} 12
spieldose_leases_total{kind="disk"} 1
# TYPE spieldose_requests_running gauge
spieldose_requests_running 3
# TYPE spieldose_requests_accepted gauge
spieldose_requests_accepted 8
# TYPE spieldose_kv_pages_held gauge
spieldose_kv_pages_held 12
# TYPE spieldose_kv_pages gauge
spieldose_kv_pages 64
# TYPE spieldose_adapter_bytes gauge
spieldose_adapter_bytes{kind="device"} 100
spieldose_adapter_bytes{kind="host"} 300
# TYPE spieldose_adapter_budget_bytes gauge
spieldose_adapter_budget_bytes{kind="device"} 200
spieldose_adapter_budget_bytes{kind="host"} 400
"""


def test_a_scrape_holds_samples_by_their_labels() -> None:
    found = Scrape.parsed(AFTER, at=1.0)
    assert found.value("spieldose_requests_running") == 3
    assert found.value("spieldose_requests_total") == 70
    assert found.by("code", "spieldose_requests_total") == {
        "OK": 64,
        "CANCELLED": 2,
        "NOT_FOUND": 4,
    }
    assert found.value("spieldose_of_a_later_version") == 0


@pytest.mark.parametrize("text", ["", "process_open_fds 3\n", "<html>no</html>\n"])
def test_what_is_no_servers_metrics_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Scrape.parsed(text, at=1.0)


def test_two_scrapes_become_rates() -> None:
    found = rates(Scrape.parsed(BEFORE, at=10.0), Scrape.parsed(AFTER, at=14.0))
    assert (found.base, found.version) == ("toy", "1.2")
    assert (found.tokens, found.requests) == (70, 2.5)
    assert found.errors == {"CANCELLED": 0.5, "NOT_FOUND": 1}
    assert (found.running, found.waiting) == (3, 5)
    assert found.step == {"requests": 5, "adapters": None, "tokens": None}
    # of 10 that came, 4 took up to 0.1 s and 6 up to 1 s: the 5th is a sixth into the second
    assert found.latency["queue"] == Quantiles(pytest.approx(0.25), pytest.approx(0.985))
    assert found.latency["load"] == Quantiles(None, None)
    assert found.kv == Level(12, 64)
    assert found.memory == {"device": Level(100, 200), "host": Level(300, 400)}
    assert found.found == {"device": 2, "disk": 0}
    assert found.played == (
        Played("a3", tokens=50, prompt_tokens=0, requests=0, errors=0),
        Played("a1", tokens=20, prompt_tokens=0, requests=1.5, errors=0.5),
        Played("(none)", tokens=0, prompt_tokens=0, requests=1, errors=1),
    )


def test_a_server_that_began_anew_counts_from_nothing() -> None:
    found = rates(Scrape.parsed(AFTER, at=10.0), Scrape.parsed(BEFORE, at=12.0))
    assert found.tokens == (100 + 0) / 2  # a2 stands where it stood
    assert found.requests == 10 / 2
    assert found.latency["queue"].p50 == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("counts", "q", "expected"),
    [
        ((0, 0, 0), 0.5, None),
        ((4, 4, 4), 0.5, 0.5),
        ((0, 10, 10), 0.9, 2.8),
        ((1, 1, 10), 0.5, 3.0),  # beyond the last bound
        ((2, 2, 4), 0.5, 1.0),  # an empty bucket in between
    ],
)
def test_quantiles_are_those_of_promql(
    counts: tuple[float, ...], q: float, expected: float | None
) -> None:
    buckets = {
        frozenset({("le", le)}): count for le, count in zip(("1", "3", "+Inf"), counts, strict=True)
    }
    assert quantile(buckets, q) == pytest.approx(expected)


@pytest.fixture
def start(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Callable[[int], Any]:
    """Run a server with the adapter a1 and its metrics on a port."""
    write_delta(path := tmp_path / "a1.safetensors", make_adapter(1))
    os.utime(path, (1e9, 1e9))
    return contextmanager(lambda port: serve_tiny(tmp_path, metrics_listen=f"127.0.0.1:{port}"))


@contextmanager
def traffic(running: Running) -> Iterator[None]:
    """Keep an adapter playing."""
    done = threading.Event()

    def play() -> None:
        while not done.is_set():
            running.client.generate(
                "hello", adapter="a1", sampling=pb.SamplingParams(max_tokens=20)
            )

    thread = threading.Thread(target=play)
    play_first = pb.SamplingParams(max_tokens=1)
    running.client.generate("hello", adapter="a1", sampling=play_first)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def shown(frame: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=132)
    console.print(frame)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_command_shows_a_frame_of_a_server_with_traffic(
    start: Callable[[int], Any], tmp_path: Path
) -> None:
    with start(0) as running, traffic(running):
        urls = ("--metrics", f"http://127.0.0.1:{running.server.metrics_port}/metrics")
        urls += ("--server", f"127.0.0.1:{running.server.port}", "--interval", "1")
        once = command("top", "--once", *urls)
        assert once.returncode == 0, once.stderr
        lines = once.stdout.splitlines()
        [busiest] = [line for line in lines if "a1" in line.split()]
        tokens, prompts, requests, errors = map(float, busiest.replace(",", "").split()[2:6])
        assert tokens > prompts > requests > 0 == errors
        assert "resident" in busiest
        assert any("first token" in line and " ms" in line for line in lines)
        picture = tmp_path / "top.svg"
        assert command("top", "--svg", str(picture), *urls).returncode == 0
        assert picture.read_text().startswith("<svg")
        assert "busiest" in picture.read_text()
        assert re.findall(r"url\(['\"]?http", picture.read_text()) == []  # loads nothing


def test_a_server_that_goes_away_is_a_line_and_comes_back(start: Callable[[int], Any]) -> None:
    with start(0) as running:
        port = running.server.metrics_port
        arguments = TopArguments(metrics=f"http://127.0.0.1:{port}/metrics", interval=0.01)
        frames = Watch(arguments, lambda _: "").frames()
        assert "busiest adapters" in shown(next(frames))
    for _ in range(2):
        gone = shown(next(frames))
        assert f"http://127.0.0.1:{port}/metrics: expected a server's metrics, got: " in gone
        assert "trying again" in gone
        assert "Traceback" not in gone
    with start(port) as running:
        running.client.generate("hello", adapter="a1", sampling=pb.SamplingParams(max_tokens=2))
        back = shown(next(frames))
        assert "busiest adapters" in back
        assert "0 played" in back  # what it did while it was away is no rate


def test_a_frame_without_a_server_is_an_error() -> None:
    done = command("top", "--once", "--metrics", "http://127.0.0.1:9/metrics")
    assert done.returncode == 1
    assert done.stderr.startswith("spieldose top: http://127.0.0.1:9/metrics: expected a server's")
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(NoMetrics):
        Scrape.of("http://127.0.0.1:9/metrics")


@pytest.mark.parametrize("interval", [0, -1, math.nan, math.inf])
def test_an_interval_has_to_be_positive(interval: float) -> None:
    with pytest.raises(ConfigError, match=r"^interval: expected seconds above 0, got "):
        TopArguments(interval=interval)
