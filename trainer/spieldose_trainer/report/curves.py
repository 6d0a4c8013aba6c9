"""How a run went: loss, exact match and learning rate over its updates."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spieldose_trainer.report.svg import MAIN, PALE, SECOND, Plot, percent, svg
from spieldose_trainer.run_log import Evaluation, RunLog, Update

MOST_POINTS = 1500  # of one curve; more could not be told apart and would swell the page


def loss_plot(log: RunLog) -> Plot | None:
    """Plot loss, exact match and learning rate over the updates."""
    if not log.updates:
        return None
    matches = [e for e in log.evaluations if e.exact_match is not None]
    heights = [3.0, *([1.2] if matches else []), 1.1]
    span = _span(log.updates)

    def draw(figure: Figure) -> None:
        axes = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights).flat)
        _draw_loss(axes[0], log, span=span)
        if matches:
            _draw_matches(axes[1], matches)
        _draw_rate(axes[-1], log.updates)

    return Plot(
        title="Loss",
        caption=f"Training loss of every update and smoothed over {span} updates"
        + (", evaluation loss" if log.evaluations else "")
        + (", share of completions reproduced exactly" if matches else "")
        + "; below, the learning rate.",
        svg=svg(draw, height=sum(heights) + 0.3),
    )


def _draw_loss(axis: Axes, log: RunLog, *, span: int) -> None:
    numbers = [update.number for update in log.updates]
    losses = [update.loss for update in log.updates]
    axis.plot(*thinned(numbers, losses), color=PALE, linewidth=0.8, label="training")
    smooth = thinned(numbers, smoothed(losses, span=span))
    axis.plot(*smooth, color=MAIN, label="training, smoothed")
    if log.evaluations:
        axis.plot(
            [evaluation.update for evaluation in log.evaluations],
            [evaluation.loss for evaluation in log.evaluations],
            color=SECOND,
            marker="o",
            markersize=3.5,
            label="evaluation",
        )
    axis.set_ylabel("loss")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=3)


def _draw_matches(axis: Axes, evaluations: Sequence[Evaluation]) -> None:
    numbers = [evaluation.update for evaluation in evaluations]
    shares = [evaluation.exact_match or 0.0 for evaluation in evaluations]
    axis.plot(numbers, shares, color=SECOND, marker="o", markersize=3.5)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(3))
    axis.yaxis.set_major_formatter(percent())
    axis.set_ylabel("exact match")


def _draw_rate(axis: Axes, updates: Sequence[Update]) -> None:
    rates = thinned([u.number for u in updates], [u.learning_rate for u in updates])
    axis.plot(*rates, color=MAIN)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(3))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("learning rate")
    axis.set_xlabel("update")


def smoothed(values: Sequence[float], *, span: int) -> list[float]:
    """Return the mean of each value and its neighbours, `span` in all, fewer at the ends.

    What is not finite is passed over; NaN where nothing else is left.
    """
    reach = span // 2
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [_mean([value for value in window if math.isfinite(value)]) for window in windows]


def _span(updates: Sequence[Update]) -> int:
    return max(5, len(updates) // 40 * 2 + 1)  # odd: as many before as after


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the means of as many neighbours as leave at most MOST_POINTS."""
    size = math.ceil(len(x) / MOST_POINTS)
    starts = range(0, len(x), size)
    return [_mean(x[i : i + size]) for i in starts], [_mean(y[i : i + size]) for i in starts]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
