"""How a run changed its support: the share each reselection replaced, and what stayed of each."""

import itertools
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spieldose_trainer.report.curves import thinned
from spieldose_trainer.report.svg import MAIN, SECOND, Plot, percent, svg
from spieldose_trainer.run_log import Reselection, RunLog

MOST_BARS = 150


def churn_plot(log: RunLog) -> Plot | None:
    """Plot the share of the support replaced by each reselection, and what eviction lost."""
    events = log.reselections
    if not events:
        return None
    lost = [event for event in events if event.lost is not None]
    if not any(event.lost for event in lost):
        lost = []  # a plot of nothing
    total = events[-1].lost_over_run
    heights = [1.8, *([1.3] if lost else [])]

    def draw(figure: Figure) -> None:
        axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False).flat)
        _draw_churn(axes[0], events)
        if lost:
            _draw_lost(axes[1], lost)
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[-1].set_xlabel("update")

    return Plot(
        title="Churn",
        caption="Share of the support that each reselection replaced"
        + ("; below, the share of the deltas' norm that went with what it evicted" if lost else "")
        + (f", {total:.1%} over the whole run" if lost and total is not None else "")
        + ".",
        svg=svg(draw, height=sum(heights) + 0.4),
    )


def _draw_churn(axis: Axes, events: Sequence[Reselection]) -> None:
    shares = [event.replaced / event.entries for event in events]
    width = _draw_events(axis, events, shares, colour=MAIN)
    rest = max(shares[1:], default=0.0)
    if shares[0] > 2 * rest > 0:  # the first replaces a random support: it would flatten the others
        axis.set_ylim(0, 1.35 * rest)
        axis.annotate(
            f"{shares[0]:.0%}",
            (events[0].update + width / 2, 1.35 * rest),
            xytext=(3, -2),
            textcoords="offset points",
            va="top",
        )
    axis.yaxis.set_major_formatter(percent())
    axis.set_ylabel("replaced")


def _draw_lost(axis: Axes, events: Sequence[Reselection]) -> None:
    shares = [event.lost for event in events if event.lost is not None]
    _draw_events(axis, events, shares, colour=SECOND)
    axis.yaxis.set_major_formatter(percent())
    axis.set_ylabel("norm lost")


def _draw_events(
    axis: Axes, events: Sequence[Reselection], shares: Sequence[float], *, colour: str
) -> float:
    """Draw a bar for every reselection, or a line if they are many; return a bar's width."""
    updates = [event.update for event in events]
    axis.set_xlim(left=0, right=updates[-1] + 1)
    if len(events) > MOST_BARS:
        axis.plot(*thinned(updates, shares), color=colour, linewidth=1)
        axis.set_ylim(bottom=0)
        return 0.0
    gaps = [later - earlier for earlier, later in itertools.pairwise(updates)]
    width = 0.5 * min(gaps, default=1)
    axis.bar(updates, shares, width=width, color=colour)
    axis.set_xlim(left=0, right=updates[-1] + width)
    return width


def age_plot(ages: Sequence[float] | None) -> Plot | None:
    """Plot the share of the final support by the reselection at which entries joined it."""
    if ages is None:
        return None

    size = math.ceil(len(ages) / MOST_BARS)  # reselections to a bar
    starts = range(0, len(ages), size)
    together = f", {size} to a bar" if size > 1 else ""

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        shares = [math.fsum(ages[i : i + size]) for i in starts]
        middles = [start + (size - 1) / 2 for start in starts]
        axis.bar(middles, shares, width=0.8 * size, color=MAIN)
        axis.yaxis.set_major_formatter(percent())
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel("share of final support")
        axis.set_xlabel(f"reselection at which the entry joined (0: first support{together})")

    return Plot(
        title="Age of surviving positions",
        caption="When the entries of the finished adapter joined its support, as in Figure 2 of "
        "the SpIEL paper (arXiv 2401.16405).",
        svg=svg(draw, height=2.4),
    )
