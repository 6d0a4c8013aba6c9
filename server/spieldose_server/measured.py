"""Which numbers of the server's parts are metrics, besides those that are told as things happen."""

from spieldose_server.admission import Admission
from spieldose_server.engine import Engine
from spieldose_server.metrics import Metrics
from spieldose_server.store import AdapterStore


def measure(metrics: Metrics, engine: Engine, store: AdapterStore, admission: Admission) -> None:
    """Have what the parts count anyhow read by whoever asks for metrics."""
    record, slab, residency = engine.record, engine.slab, store.residency
    record.listener = metrics.step
    residency.loaded = metrics.load.observe
    metrics.gauge("requests_running", "Requests in the engine", lambda: admission.running)
    metrics.gauge("requests_accepted", "Those, and waiting ones", lambda: admission.accepted)
    metrics.gauge("kv_pages_held", "KV pages of running requests", lambda: engine.held_pages)
    metrics.gauge("kv_pages", "KV pages there are", lambda: engine.pages)
    metrics.gauge(
        "adapter_bytes",
        "Memory that adapters take, by tier",
        lambda: {
            "device": slab.budget - slab.arena.free_bytes,
            "host": residency.host_bytes,
        },
    )
    metrics.gauge(
        "adapter_budget_bytes",
        "Memory there is for adapters, by tier",
        lambda: {"device": slab.budget, "host": residency.host_memory},
    )
    metrics.gauge("adapters", "Versions of adapters, by state", store.states)
    metrics.counter("leases", "Adapters needed, by where they were", lambda: residency.found)
    metrics.counter("evictions", "Adapters sent off the device", lambda: residency.evictions)
    metrics.counter("steps", "Forward passes", lambda: record.steps)
    metrics.counter(
        "cached_tokens", "Tokens of prompts found in the KV cache", lambda: record.cached_tokens
    )
