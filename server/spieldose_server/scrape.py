"""One reading of a server's metrics, from its metrics port."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Self
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from spieldose_kernels.errors import SpieldoseError

TIMEOUT = 5.0  # seconds
Labels = frozenset[tuple[str, str]]


class NoMetrics(SpieldoseError):
    """There are no metrics where they were looked for."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """Hold every sample of a scrape."""

    at: float  # when, in seconds
    samples: Mapping[str, Mapping[Labels, float]]  # by name, then by labels

    @classmethod
    def of(cls, url: str) -> Self:
        """Read the metrics that are served there. Raises NoMetrics."""
        try:
            with urlopen(url, timeout=TIMEOUT) as answer:
                text = answer.read().decode()
            return cls.parsed(text, at=time.monotonic())
        except (OSError, HTTPException, ValueError) as error:
            raise NoMetrics(f"{url}: expected a server's metrics, got: {error}") from error

    @classmethod
    def parsed(cls, text: str, *, at: float) -> Self:
        """Read Prometheus' text format. Raises ValueError."""
        samples: dict[str, dict[Labels, float]] = defaultdict(dict)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name][frozenset(sample.labels.items())] = sample.value
        if "spieldose_build_info" not in samples:
            raise ValueError("metrics of something else")
        return cls(at, dict(samples))

    def value(self, name: str) -> float:
        """Return the sum over a metric's labels."""
        return sum(self.samples.get(name, {}).values())

    def by(self, label: str, name: str) -> dict[str, float]:
        """Return a metric's values by one of its labels, summed over the others."""
        return summed(self.samples.get(name, {}), label)

    def grown(self, name: str, since: "Scrape") -> dict[Labels, float]:
        """Return how far a counter's samples have come; one that has fallen began anew at 0."""
        before = since.samples.get(name, {})
        return {
            labels: value - start if value >= (start := before.get(labels, 0.0)) else value
            for labels, value in self.samples.get(name, {}).items()
        }


def summed(samples: Mapping[Labels, float], label: str) -> dict[str, float]:
    """Return samples by one of their labels, summed over the others."""
    found: dict[str, float] = defaultdict(float)
    for labels, value in samples.items():
        found[dict(labels)[label]] += value
    return dict(found)
