"""What the server is doing, for Prometheus.

What has a distribution is told as it happens; the rest is counted where it happens anyhow, and read
when somebody asks. Adapters have labels of their own as long as there are few of them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from spieldose_server.batch import Step

MAX_ADAPTERS = 100  # the first so many to be played have labels of their own
BASE, OTHERS, NONE = "(base)", "(others)", "(none)"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
Reading = float | Mapping[str, float]
COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

disable_created_metrics()  # when each series began: nobody plots that, and it doubles their number


class Metrics:
    """Hold one server's metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._named: set[str] = set()  # adapters with labels of their own
        self._requests = self._make(Counter, "requests", "Requests ended", ("adapter", "code"))
        self._tokens = self._make(Counter, "tokens", "Tokens generated", ("adapter",))
        self._prompts = self._make(Counter, "prompt_tokens", "Tokens of prompts", ("adapter",))
        self.queue = self._seconds("queue_seconds", "From arrival to the engine")
        self.first = self._seconds("first_token_seconds", "From arrival to the first token")
        self.between = self._seconds("inter_token_seconds", "From one token to the next")
        self.load = self._seconds("load_seconds", "From an adapter's need to the device")
        self._adapters = self._counts("step_adapters", "Adapters in a forward pass")
        self._batch = self._counts("step_requests", "Requests in a forward pass")
        self._width = self._counts("step_tokens", "Tokens in a forward pass")

    def step(self, step: Step) -> None:
        """Take note of a forward pass."""
        self._adapters.observe(len(step.slots))
        self._batch.observe(step.requests)
        self._width.observe(step.tokens)

    def request(self, adapter: str, code: str) -> None:
        """Count a request by the label of the adapter it played and by how it ended."""
        self._requests.labels(adapter, code).inc()

    def prompt(self, adapter: str, tokens: int) -> None:
        """Count a prompt."""
        self._prompts.labels(adapter).inc(tokens)

    def answer(self, adapter: str, tokens: int) -> None:
        """Count an answer's tokens."""
        self._tokens.labels(adapter).inc(tokens)

    def label(self, adapter: str) -> str:
        """Return the label of an adapter that is served; there are a bounded number of them."""
        if not adapter:
            return BASE
        if adapter not in self._named and len(self._named) >= MAX_ADAPTERS:
            return OTHERS
        self._named.add(adapter)
        return adapter

    def gauge(self, name: str, what: str, read: Callable[[], Reading]) -> None:
        """Have a number read whenever somebody asks, or one for each of several kinds."""
        self.registry.register(_Read(GaugeMetricFamily, f"spieldose_{name}", what, read))

    def counter(self, name: str, what: str, read: Callable[[], Reading]) -> None:
        """Have a number that only grows read whenever somebody asks, or one for each kind."""
        self.registry.register(_Read(CounterMetricFamily, f"spieldose_{name}", what, read))

    def _make(
        self, kind: Any, name: str, what: str, labels: tuple[str, ...] = (), **more: Any
    ) -> Any:
        return kind(name, what, labels, namespace="spieldose", registry=self.registry, **more)

    def _seconds(self, name: str, what: str) -> Histogram:
        histogram: Histogram = self._make(Histogram, name, what, buckets=SECONDS)
        return histogram

    def _counts(self, name: str, what: str) -> Histogram:
        histogram: Histogram = self._make(Histogram, name, what, buckets=COUNTS)
        return histogram


class _Read(Collector):
    """Read one metric when it is asked for."""

    def __init__(self, family: Any, name: str, what: str, read: Callable[[], Reading]) -> None:
        self._family, self._name, self._what, self._read = family, name, what, read

    def collect(self) -> Iterator[Metric]:
        """Yield the metric as it is now."""
        found = self._read()
        if isinstance(found, Mapping):
            metric = self._family(self._name, self._what, labels=["kind"])
            for kind, value in found.items():
                metric.add_metric([kind], value)
        else:
            metric = self._family(self._name, self._what, value=found)
        yield metric
