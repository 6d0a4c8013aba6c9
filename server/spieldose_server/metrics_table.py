"""Every metric in one table, for people.

`python -m spieldose_server.metrics_table` prints docs/METRICS.md. Names, types and meanings are the
registry's own; what it does not know stands here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from spieldose_kernels.base_spec import BaseSpec
from spieldose_server.measured import COUNTERS, GAUGES, introduce
from spieldose_server.metrics import BASE, MAX_ADAPTERS, NONE, OTHERS, Metrics

ADAPTER, TIERS, PLACES = "`adapter`", "`kind`: device, host", "`kind`: device, host, disk"
STATES = "`kind`: found, validating, on host, loading, resident, draining, rejected"

# by name: its labels besides Prometheus' own, its unit, when it moves
MOVES: dict[str, tuple[str, str, str]] = {
    "spieldose_requests_total": (
        f"{ADAPTER}, `code`",
        "requests",
        "a request for text ends: OK, CANCELLED, or with any other gRPC status, over HTTP too; "
        "or a call is refused for who asks",
    ),
    "spieldose_tokens_total": (ADAPTER, "tokens", "tokens of an answer come from the engine"),
    "spieldose_prompt_tokens_total": (ADAPTER, "tokens", "an answer gets its place in the engine"),
    "spieldose_queue_seconds": (
        "",
        "seconds",
        "the same: waiting for the adapter, for a turn and for a place count",
    ),
    "spieldose_first_token_seconds": ("", "seconds", "an answer's first token comes"),
    "spieldose_inter_token_seconds": (
        "",
        "seconds",
        "every later one comes; of several at once each has its share of the time",
    ),
    "spieldose_load_seconds": (
        "",
        "seconds",
        "an adapter that was needed is on the device; waiting for room counts",
    ),
    "spieldose_step_adapters": ("", "adapters", "every forward pass; the base is none"),
    "spieldose_step_requests": ("", "requests", "every forward pass"),
    "spieldose_step_tokens": (
        "",
        "tokens",
        "every forward pass: one a request that generates, and the prompts' parts",
    ),
    "spieldose_requests_running": ("", "requests", "answers take and leave places in the engine"),
    "spieldose_requests_accepted": ("", "requests", "requests come and end"),
    "spieldose_kv_pages_held": ("", "pages of 64 tokens", "running requests grow and end"),
    "spieldose_kv_pages": ("", "pages of 64 tokens", "never: it is `kv_tokens`"),
    "spieldose_adapter_bytes": (TIERS, "bytes", "adapters are read, loaded, evicted, removed"),
    "spieldose_adapter_budget_bytes": (
        TIERS,
        "bytes",
        "never: it is `adapter_memory` and `host_memory`, or follows what was free at the start",
    ),
    "spieldose_adapters": (STATES, "versions", "files come and go, adapters are used"),
    "spieldose_leases_total": (
        PLACES,
        "adapters",
        "an answer asks for its adapter: device is a hit, the others are misses",
    ),
    "spieldose_evictions_total": ("", "adapters", "one makes room on the device for another"),
    "spieldose_steps_total": ("", "forward passes", "the engine begins one"),
    "spieldose_cached_tokens_total": ("", "tokens", "a prompt begins like one of late"),
    "spieldose_build_info": ("`version`, `base`, `fingerprint`", "", "never: it is always 1"),
    "process_virtual_memory_bytes": ("", "bytes", "the process takes address space"),
    "process_resident_memory_bytes": ("", "bytes", "it takes and gives back memory"),
    "process_start_time_seconds": ("", "seconds since 1970", "the server is started anew"),
    "process_cpu_seconds_total": ("", "seconds", "it computes, on any core"),
    "process_open_fds": ("", "files and sockets", "connections and files open and close"),
    "process_max_fds": ("", "files and sockets", "never while it runs"),
}

PAGE = f"""\
# Metrics

<!-- printed by `make metrics` -->

`spieldose serve --metrics-listen 127.0.0.1:9464` answers `GET /metrics`, in Prometheus' text format
or in OpenMetrics. The port has neither TLS nor tokens: keep it on loopback, or behind something
that has.

| metric | type | labels | unit | what it is | moves when |
|---|---|---|---|---|---|
{{rows}}

A histogram has `_bucket`, `_sum` and `_count`: the mean of a forward pass's requests is
`rate(spieldose_step_requests_sum[1m]) / rate(spieldose_step_requests_count[1m])`.

`adapter` is a name, without version. The first {MAX_ADAPTERS} adapters that are played after the
start have labels of their own for as long as the server runs; whichever come later share
`{OTHERS}`, however busy they are, so that a thousand adapters make no thousand series. The base is
`{BASE}`. A request that is refused before its adapter is known has `{NONE}`, whatever name it asked
for. Other calls are counted only if they are refused for who asks.

Errors are `spieldose_requests_total{{{{code!="OK"}}}}`; CANCELLED says that a client went
away, DEADLINE_EXCEEDED that it did when its time was up.
`spieldose_requests_accepted - spieldose_requests_running` wait, where no request asks for several
answers, each of which takes a place.

[grafana/spieldose.json](grafana/spieldose.json) is a dashboard of these; `spieldose top` shows them
in a terminal.
"""


@dataclass(frozen=True, slots=True)
class Described:
    """Hold what a metric is, but for when it moves."""

    name: str  # as it is scraped, but for a histogram's endings
    type: str
    what: str


def described() -> Iterator[Described]:
    """Yield every metric of a server."""
    metrics = Metrics()
    told = list(metrics.registry.collect())
    yield from map(_of, told)
    for name, (what, _) in GAUGES.items():
        yield Described(f"spieldose_{name}", "gauge", what)
    for name, (what, _) in COUNTERS.items():
        yield Described(f"spieldose_{name}_total", "counter", what)
    introduce(metrics, BaseSpec("", "", {}))
    yield from map(_of, list(metrics.registry.collect())[len(told) :])


def page() -> str:
    """Return docs/METRICS.md."""
    return PAGE.format(rows="\n".join(map(_row, described())))


def _of(family: Metric) -> Described:
    ending = {"counter": "_total", "info": "_info"}.get(family.type, "")
    kind = "gauge" if family.type == "info" else family.type
    return Described(family.name + ending, kind, family.documentation)


def _row(metric: Described) -> str:
    labels, unit, moves = MOVES[metric.name]
    cells = (f"`{metric.name}`", metric.type, labels, unit, metric.what.rstrip("."), moves)
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


if __name__ == "__main__":
    print(page(), end="")
