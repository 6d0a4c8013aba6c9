"""Print the Grafana dashboard: `make metrics` writes spieldose.json.

A panel is a title, a unit, what it draws, and queries with their legends. `$i` stands for the
chosen instances, `$r` for the window of rates.
"""

import json
from dataclasses import dataclass
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDE, HEIGHT, PER_ROW = 24, 7, 3  # of Grafana's grid


@dataclass(frozen=True, slots=True)
class Panel:
    """Hold one panel."""

    title: str
    unit: str
    queries: dict[str, str]  # by legend
    stacked: bool = False
    kind: str = "timeseries"


def rate(name: str, by: str = "") -> str:
    """Return the rate of a counter, summed."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate(spieldose_{name}{{$i}}[$r]))"


def quantiles(name: str) -> dict[str, str]:
    """Return a histogram's median and 99th percentile."""
    rates = rate(f"{name}_bucket", "le")
    return {f"p{q}": f"histogram_quantile(0.{q}, {rates})" for q in (50, 99)}


def mean(name: str) -> str:
    """Return the mean of a histogram."""
    return f"{rate(f'{name}_sum')} / {rate(f'{name}_count')}"


def gauge(name: str, by: str = "") -> str:
    """Return a gauge, summed."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (spieldose_{name}{{$i}})"


FAILED = 'sum by (code) (rate(spieldose_requests_total{$i, code!="OK"}[$r]))'
MISSES = 'sum by (kind) (rate(spieldose_leases_total{$i, kind!="device"}[$r]))'
ROWS = {
    "Traffic": (
        Panel(
            "Tokens a second",
            "short",
            {
                "generated": rate("tokens_total"),
                "of prompts": rate("prompt_tokens_total"),
                "of prompts, in the cache": rate("cached_tokens_total"),
            },
        ),
        Panel("Requests a second", "reqps", {"ended": rate("requests_total")}),
        Panel(
            "Requests in the engine and waiting",
            "short",
            {
                "running": gauge("requests_running"),
                "waiting": f"{gauge('requests_accepted')} - {gauge('requests_running')}",
            },
            stacked=True,
        ),
    ),
    "Latency": (
        Panel("Time in the queue", "s", quantiles("queue_seconds")),
        Panel("Time to the first token", "s", quantiles("first_token_seconds")),
        Panel("Time between tokens", "s", quantiles("inter_token_seconds")),
    ),
    "Forward passes": (
        Panel(
            "Mean composition of a forward pass",
            "short",
            {"requests": mean("step_requests"), "adapters": mean("step_adapters")},
        ),
        Panel("Mean tokens of a forward pass", "short", {"tokens": mean("step_tokens")}),
        Panel("Forward passes a second", "short", {"passes": rate("steps_total")}),
    ),
    "Memory": (
        Panel(
            "KV pages",
            "short",
            {"held": gauge("kv_pages_held"), "there are": gauge("kv_pages")},
        ),
        Panel(
            "Adapters' bytes",
            "bytes",
            {
                "{{kind}}": gauge("adapter_bytes", "kind"),
                "{{kind}}, budget": gauge("adapter_budget_bytes", "kind"),
            },
        ),
        Panel(
            "Versions of adapters, by state",
            "short",
            {"{{kind}}": gauge("adapters", "kind")},
            stacked=True,
        ),
    ),
    "Residency": (
        Panel(
            "Adapters needed a second, by where they were",
            "short",
            {"{{kind}}": rate("leases_total", "kind")},
            stacked=True,
        ),
        Panel(
            "Misses and evictions a second",
            "short",
            {"miss, {{kind}}": MISSES, "evictions": rate("evictions_total")},
        ),
        Panel("Time an adapter's load takes", "s", quantiles("load_seconds")),
    ),
    "Adapters": (
        Panel(
            "Tokens a second of the ten busiest adapters",
            "short",
            {"{{adapter}}": f"topk(10, {rate('tokens_total', 'adapter')})"},
        ),
        Panel(
            "Requests a second of the ten busiest adapters",
            "reqps",
            {"{{adapter}}": f"topk(10, {rate('requests_total', 'adapter')})"},
        ),
        Panel("Errors a second, by code", "reqps", {"{{code}}": FAILED}, stacked=True),
    ),
    "Process": (
        Panel(
            "Cores in use",
            "short",
            {"{{instance}}": "rate(process_cpu_seconds_total{$i}[$r])"},
        ),
        Panel("Resident memory", "bytes", {"{{instance}}": "process_resident_memory_bytes{$i}"}),
        Panel(
            "What is served",
            "none",
            {"{{instance}}: {{base}} ({{fingerprint}}), {{version}}": "spieldose_build_info{$i}"},
            kind="stat",
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for heading, row in ROWS.items():
        grid = {"x": 0, "y": y, "w": WIDE, "h": 1}
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": heading,
                "collapsed": False,
                "panels": [],
                "gridPos": grid,
            }
        )
        width = WIDE // PER_ROW
        for column, panel in enumerate(row):
            grid = {"x": column * width, "y": y + 1, "w": width, "h": HEIGHT}
            panels.append(drawn(panel, len(panels) + 1, grid))
        y += 1 + HEIGHT
    return {
        "uid": "spieldose",
        "title": "Spieldose",
        "description": "One 4-bit base, many sparse adapters",
        "tags": ["spieldose"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": variables()},
        "annotations": {"list": []},
        "panels": panels,
    }


def drawn(panel: Panel, number: int, grid: dict[str, int]) -> dict[str, Any]:
    """Return a panel as Grafana has it."""
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": DATASOURCE,
            "expr": query.replace("$i", 'instance=~"$instance"').replace("$r", "$__rate_interval"),
            "legendFormat": legend,
        }
        for i, (legend, query) in enumerate(panel.queries.items())
    ]
    style = {
        "lineWidth": 1,
        "fillOpacity": 30 if panel.stacked else 8,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
    }
    series = panel.kind == "timeseries"
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": DATASOURCE,
        "gridPos": grid,
        "targets": targets,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": style if series else {}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
        if series
        else {"textMode": "name", "colorMode": "none", "reduceOptions": {"calcs": ["lastNotNull"]}},
    }


def variables() -> list[dict[str, Any]]:
    """Return what is chosen at the top of the dashboard."""
    return [
        {
            "name": "datasource",
            "label": "Prometheus",
            "type": "datasource",
            "query": "prometheus",
        },
        {
            "name": "instance",
            "label": "server",
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": "label_values(spieldose_build_info, instance)", "refId": "instance"},
            "definition": "label_values(spieldose_build_info, instance)",
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def page() -> str:
    """Return the file."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(page(), end="")
