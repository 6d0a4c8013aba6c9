"""How `spieldose top` looks: a frame of what a server did between two scrapes."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spieldose_server.rates import Level, Quantiles, Rates

ROWS = 12  # adapters shown
LINES = 5  # of each panel above them
LATENCIES = {
    "queue": "in the queue",
    "first_token": "first token",
    "inter_token": "between tokens",
    "load": "adapter loads",
}
STEP = {"requests": "requests", "adapters": "adapters", "tokens": "tokens"}
FOUND = {"device": "hits: on the device", "host": "misses: on the host", "disk": "misses: on disk"}


def frame(rates: Rates, where: Mapping[str, str], *, source: str) -> RenderableType:
    """Draw a frame; `where` says of adapters, by label, in which state they are."""
    title = Text.assemble(
        ("spieldose ", "bold"), rates.version, "  ", (rates.base, "cyan"), f"  {source}"
    )
    upper = _side_by_side(
        _panel("traffic", _traffic(rates), lines=LINES),
        _panel("latency", _latency(rates.latency), lines=LINES),
        _panel("a forward pass", _steps(rates), lines=LINES),
    )
    lower = _side_by_side(
        _panel("memory", _memory(rates), lines=LINES),
        _panel("adapters a second", _adapters(rates), lines=LINES),
        _panel("errors a second", _errors(rates.errors), lines=LINES),
    )
    return Group(title, upper, lower, _panel("busiest adapters", _busiest(rates, where)))


def _side_by_side(*panels: RenderableType) -> Table:
    grid = Table.grid(expand=True)
    for _ in panels:
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    return grid


def _panel(title: str, content: RenderableType, *, lines: int | None = None) -> Panel:
    height = None if lines is None else lines + 2
    return Panel(content, title=title, title_align="left", border_style="blue", height=height)


def _rows(*rows: tuple[str, str]) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def _traffic(rates: Rates) -> Table:
    return _rows(
        ("tokens / s", _number(rates.tokens)),
        ("prompt tokens / s", _number(rates.prompt_tokens)),
        ("of them in the cache / s", _number(rates.cached_tokens)),
        ("requests / s", _number(rates.requests)),
        ("running, waiting", f"{rates.running:.0f}, {rates.waiting:.0f}"),
    )


def _latency(latency: Mapping[str, Quantiles]) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    for _ in range(2):
        grid.add_column(justify="right", no_wrap=True)
    grid.add_row("", Text("p50", "dim"), Text("p99", "dim"))
    for name, shown in LATENCIES.items():
        grid.add_row(shown, _seconds(latency[name].p50), _seconds(latency[name].p99))
    return grid


def _steps(rates: Rates) -> Table:
    return _rows(
        *((f"{shown}, mean", _number(rates.step[name])) for name, shown in STEP.items()),
        ("passes / s", _number(rates.steps)),
        ("cores in use", _number(rates.processor)),
    )


def _memory(rates: Rates) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row("KV pages", _bar(rates.kv), f"{rates.kv.held:.0f} / {rates.kv.whole:.0f}")
    for tier, level in rates.memory.items():
        shown = f"{_bytes(level.held)} / {_bytes(level.whole)}"
        grid.add_row(tier, _bar(level), shown)
    grid.add_row("process", "", _bytes(rates.resident))
    return grid


def _bar(level: Level) -> ProgressBar:
    full = level.held > 0.9 * level.whole
    return ProgressBar(
        total=max(level.whole, 1.0),
        completed=level.held,
        complete_style="red" if full else "green",
        finished_style="red",
    )


def _adapters(rates: Rates) -> Table:
    return _rows(
        *((shown, _number(rates.found.get(tier, 0.0))) for tier, shown in FOUND.items()),
        ("loads", _number(rates.loads)),
        ("evictions", _number(rates.evictions)),
    )


def _errors(errors: Mapping[str, float]) -> Table:
    most = sorted(errors.items(), key=lambda error: (-error[1], error[0]))[:LINES]
    return _rows(*((code, _number(rate)) for code, rate in most or [("none", 0.0)]))


def _busiest(rates: Rates, where: Mapping[str, str]) -> Group:
    table = Table(box=None, expand=True, header_style="dim")
    table.add_column("adapter", no_wrap=True, ratio=2)
    for heading in ("tokens / s", "prompt tokens / s", "requests / s", "errors / s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True, ratio=1)
    for played in rates.played[:ROWS]:
        numbers = (played.tokens, played.prompt_tokens, played.requests, played.errors)
        state = where.get(played.adapter, "")
        table.add_row(Text(played.adapter), *map(_number, numbers), Text(state))
    states = "  ".join(f"{state} {n:.0f}" for state, n in rates.states.items() if n)
    return Group(table, Text(f"{len(rates.played)} played   versions: {states or 'none'}", "dim"))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    decimals = 0 if value >= 100 or not value else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
