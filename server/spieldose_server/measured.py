"""Which numbers of the server's parts are metrics, besides those that are told as things happen."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from prometheus_client import Info, ProcessCollector

from spieldose_kernels.base_spec import BaseSpec
from spieldose_server.admission import Admission
from spieldose_server.config import DIGEST_SHOWN
from spieldose_server.engine import Engine
from spieldose_server.metrics import Metrics, Reading
from spieldose_server.store import AdapterStore


@dataclass(frozen=True, slots=True)
class Parts:
    """Hold the parts that count anyhow."""

    engine: Engine
    store: AdapterStore
    admission: Admission


Read = Callable[[Parts], Reading]

# by name: what it is, and where it is read
GAUGES: dict[str, tuple[str, Read]] = {
    "requests_running": ("Requests in the engine", lambda parts: parts.admission.running),
    "requests_accepted": (
        "Requests in the engine or waiting",
        lambda parts: parts.admission.accepted,
    ),
    "kv_pages_held": ("KV pages of running requests", lambda parts: parts.engine.held_pages),
    "kv_pages": ("KV pages there are", lambda parts: parts.engine.pages),
    "adapter_bytes": (
        "Memory that adapters take, by tier",
        lambda parts: {
            "device": parts.engine.slab.budget - parts.engine.slab.arena.free_bytes,
            "host": parts.store.residency.host_bytes,
        },
    ),
    "adapter_budget_bytes": (
        "Memory there is for adapters, by tier",
        lambda parts: {
            "device": parts.engine.slab.budget,
            "host": parts.store.residency.host_memory,
        },
    ),
    "adapters": ("Versions of adapters, by state", lambda parts: parts.store.states()),
}
COUNTERS: dict[str, tuple[str, Read]] = {
    "leases": ("Adapters needed, by where they were", lambda parts: parts.store.residency.found),
    "evictions": ("Adapters sent off the device", lambda parts: parts.store.residency.evictions),
    "steps": ("Forward passes", lambda parts: parts.engine.record.steps),
    "cached_tokens": (
        "Tokens of prompts found in the KV cache",
        lambda parts: parts.engine.record.cached_tokens,
    ),
}


def measure(metrics: Metrics, engine: Engine, store: AdapterStore, admission: Admission) -> None:
    """Have what the parts count anyhow read by whoever asks for metrics."""
    engine.record.listener = metrics.step
    store.residency.loaded = metrics.load.observe
    parts = Parts(engine, store, admission)
    for name, (what, read) in GAUGES.items():
        metrics.gauge(name, what, partial(read, parts))
    for name, (what, read) in COUNTERS.items():
        metrics.counter(name, what, partial(read, parts))


def introduce(metrics: Metrics, spec: BaseSpec) -> None:
    """Have metrics say what is served by which version, and what the process takes."""
    info = Info(
        "build",
        "What is served, by which version",
        registry=metrics.registry,
        namespace="spieldose",
    )
    info.info(
        {
            "version": version("spieldose"),
            "base": spec.name,
            "fingerprint": spec.fingerprint[:DIGEST_SHOWN],
        }
    )
    ProcessCollector(registry=metrics.registry)
