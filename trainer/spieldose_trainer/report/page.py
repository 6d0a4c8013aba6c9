"""The report as one HTML page: no script, no network, light and dark."""

import math
from collections.abc import Iterable
from html import escape
from pathlib import PurePath

from spieldose_trainer.memory import memory_rows, readable
from spieldose_trainer.report.churn import age_plot, churn_plot
from spieldose_trainer.report.command import command
from spieldose_trainer.report.curves import loss_plot
from spieldose_trainer.report.maps import magnitude_plot, place_plot
from spieldose_trainer.report.numbers import hardware, versions
from spieldose_trainer.report.summary import Summary
from spieldose_trainer.report.svg import Plot

STYLE = """
:root { color-scheme: light dark; --page: #fefefd; --ink: #1f2430; --soft: #5b6372;
  --faint: #c3c8d1; --panel: #f3f4f6; --main: #2f6fb5; --second: #c8641b; --pale: #a9c4e2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181e; --ink: #e4e7ec; --soft: #9aa3b2; --faint: #3a414d; --panel: #1e222a;
    --main: #6aa9ec; --second: #f0954c; --pale: #3f5f82; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .2rem; }
p { margin: .2rem 0 .8rem; color: var(--soft); }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: .6rem; margin: 1.5rem 0 0; }
dl.facts div { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; overflow-x: auto; }
figcaption { color: var(--soft); margin: .2rem 0 .6rem; }
svg { display: block; width: 100%; min-width: 36rem; height: auto; font-family: inherit; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid var(--faint);
  overflow-wrap: anywhere; vertical-align: top; }
th { font-weight: 600; }
.numbers td + td, .numbers th + th { text-align: right; }
.columns { columns: 22rem; column-gap: 2rem; }
.columns table { width: 100%; }
.columns td:first-child { white-space: nowrap; }
pre { background: var(--panel); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
"""


def page(summary: Summary) -> str:
    """Return the whole page."""
    info = summary.adapter.info
    title = info.description or f"{info.method} on {base_name(info.base_model)}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(info.method)} · {info.density:.2%} of the target weights · base "
        f"{escape(base_name(info.base_model))}</p>",
        _facts(summary),
        *(_figure(plot) for plot in plots(summary)),
        _memory(summary),
        "<h2>The same run again</h2>",
        f"<pre><code>{escape(command(summary.settings, processes=summary.processes))}</code></pre>",
        "<h2>Settings</h2>",
        f'<div class="columns">{_table(("setting", "value"), summary.settings.items())}</div>',
        _footer(),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def plots(summary: Summary) -> list[Plot]:
    """Return the plots there is data for."""
    made = (
        loss_plot(summary.log),
        churn_plot(summary.log),
        age_plot(summary.ages),
        place_plot(summary.modules),
        magnitude_plot(summary.magnitudes, all_kinds=summary.all_magnitudes),
    )
    return [plot for plot in made if plot is not None]


def base_name(base: str) -> str:
    """Return the last part of a directory or hub name."""
    return PurePath(base).name or base


def _facts(summary: Summary) -> str:
    log, facts = summary.log, []
    if log.updates:
        loss = math.fsum(u.loss for u in log.updates[-10:]) / len(log.updates[-10:])
        facts.append(("final training loss", f"{loss:.4f}"))
    if log.evaluations:
        last = log.evaluations[-1]
        facts.append(("final evaluation loss", f"{last.loss:.4f}"))
        facts.append(("best evaluation loss", f"{min(e.loss for e in log.evaluations):.4f}"))
        if last.exact_match is not None:
            facts.append(("final exact match", f"{last.exact_match:.1%}"))
    facts.append(("trained values", f"{summary.adapter.nnz:,}"))
    if summary.seconds > 0:
        facts.append(("updates", f"{len(log.updates):,}"))
        facts.append(("time in updates", duration(summary.seconds)))
        facts.append(("tokens per second", f"{summary.tokens / summary.seconds:,.0f}"))
    facts.append(("peak memory", readable(summary.memory.peak)))
    cells = "\n".join(f"<div><dt>{what}</dt><dd>{value}</dd></div>" for what, value in facts)
    return f'<dl class="facts">\n{cells}\n</dl>'


def duration(seconds: float) -> str:
    """Return a time for people, 1 h 05 min or 42 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = math.floor(seconds / 60)
    if minutes < 60:
        return f"{minutes} min {seconds - 60 * minutes:02.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _figure(plot: Plot) -> str:
    label = escape(f"{plot.title}. {plot.caption}")
    picture = plot.svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return (
        f"<h2>{escape(plot.title)}</h2>\n<figure>\n"
        f"<figcaption>{escape(plot.caption)}</figcaption>\n{picture}</figure>"
    )


def _memory(summary: Summary) -> str:
    table = _table(
        ("", "bytes per active value", "total", "the paper's code"), memory_rows(summary.memory)
    )
    return (
        f"<h2>Memory</h2>\n<p>Measured on the tensors of {summary.memory.entries:,} active "
        f"values; the whole run peaked at {readable(summary.memory.peak)}.</p>\n"
        + table.replace("<table>", '<table class="numbers">', 1)
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _footer() -> str:
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    machine = hardware()
    place = machine["gpu"] or f"{machine['processor']}, threads: {machine['threads']}"
    return f"<footer>{escape(software)}<br>{escape(str(place))}</footer>"
