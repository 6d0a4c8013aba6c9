"""Plots of the finished delta: where it is dense, where it is large, how its values spread."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spieldose_trainer.report.magnitudes import Magnitudes
from spieldose_trainer.report.summary import ModuleSummary
from spieldose_trainer.report.svg import INK, MAIN, PAGE, PALE, Plot, percent, svg

ROW = 0.23  # inches per module kind
MOST_TICKS = 16
HIDDEN = 0.001  # share of entries left of the axis: a few stragglers reach decades further down
OUTSIDE = "other"  # the column of modules outside the decoder blocks

Measure = Callable[[Sequence[ModuleSummary]], float]


def place_plot(modules: Mapping[str, ModuleSummary]) -> Plot:
    """Plot density and size of the deltas as heat maps of module kinds by decoder blocks."""
    cells = defaultdict(list)
    for module in modules.values():
        cells[module.place.kind, module.place.block].append(module)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells}, key=lambda b: math.inf if b is None else b)

    def grid(measure: Measure) -> npt.NDArray[np.float64]:
        """Return [kinds, blocks], NaN where there is no module."""
        rows = [[cells.get((kind, block)) for block in blocks] for kind in kinds]
        return np.array([[measure(cell) if cell else math.nan for cell in row] for row in rows])

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True).flat
        bar = _heat(upper, grid(_density), kinds=kinds, from_zero=True)
        bar.set_label("density")
        bar.formatter = percent()
        bar = _heat(lower, grid(_size), kinds=kinds, from_zero=False)
        bar.set_label("RMS of entries")
        bar.formatter = FuncFormatter(lambda size, _: f"{size:g}")
        shown = range(0, len(blocks), math.ceil(len(blocks) / MOST_TICKS))
        names = [OUTSIDE if blocks[i] is None else str(blocks[i]) for i in shown]
        lower.set_xticks([i + 0.5 for i in shown], names)
        lower.set_xlabel("decoder block")

    return Plot(
        title="Where the delta is",
        caption="By module kind and decoder block. Above: entries over weights. Below: root mean "
        "square of the entries, that is where training moved the model most.",
        svg=svg(draw, height=2 * ROW * len(kinds) + 1.2),
    )


def _density(cell: Sequence[ModuleSummary]) -> float:
    return sum(m.entries for m in cell) / sum(math.prod(m.shape) for m in cell)


def _size(cell: Sequence[ModuleSummary]) -> float:
    return math.sqrt(sum(m.norm**2 for m in cell) / max(1, sum(m.entries for m in cell)))


def _heat(
    axis: Axes, grid: npt.NDArray[np.float64], *, kinds: Sequence[str], from_zero: bool
) -> Colorbar:
    low, high = (0.0 if from_zero else np.nanmin(grid)), np.nanmax(grid)
    if high <= 1.1 * np.nanmin(grid):  # one colour from the middle: no contrast without difference
        low, high = 0.0, 2 * high
    cells = np.ma.masked_invalid(grid)
    mesh = axis.pcolormesh(cells, vmin=low, vmax=high or 1.0, edgecolor=PAGE, linewidth=0.6)
    axis.set_yticks(np.arange(len(kinds)) + 0.5, [plain(kind) for kind in kinds])
    axis.invert_yaxis()
    axis.grid(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure = axis.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(mesh, ax=axis, aspect=12, pad=0.01)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4)
    return bar


def magnitude_plot(magnitudes: Mapping[str, Magnitudes], *, all_kinds: Magnitudes) -> Plot | None:
    """Plot the distribution of |δ|, together and by module kind."""
    edges, counts = all_kinds.occupied()
    if not counts:
        return None
    kinds = {kind: part for kind, part in magnitudes.items() if int(part.counts.sum())}

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharex=True).flat
        share = np.array(counts) / sum(counts)
        left.stairs(share, edges, fill=True, color=MAIN)
        left.yaxis.set_major_formatter(percent())
        left.set_ylabel("share of entries")
        left.set_xlabel("|δ|")
        left.set_xlim(left=math.log10(all_kinds.quantile(HIDDEN)))
        left.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        left.xaxis.set_major_formatter(FuncFormatter(lambda power, _: decade(power)))
        _spread(right, kinds)

    hidden = f" The smallest {HIDDEN:.1%} lie further left."
    zeros = f" {all_kinds.zeros:,} entries are exactly 0 and not shown." if all_kinds.zeros else ""
    return Plot(
        title="Size of the entries",
        caption="Left: distribution of |δ|. Right, by module kind: the middle 90% (thin), the "
        f"middle half (thick) and the median.{hidden}{zeros}",
        svg=svg(draw, height=max(2.4, ROW * len(kinds) + 0.6)),
    )


def _spread(axis: Axes, kinds: Mapping[str, Magnitudes]) -> None:
    for row, part in enumerate(kinds.values()):
        low, first, middle, third, high = (
            math.log10(part.quantile(share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95)
        )
        axis.hlines(row, low, high, color=PALE, linewidth=1.5)
        axis.hlines(row, first, third, color=MAIN, linewidth=6)
        axis.plot([middle], [row], marker="|", color=INK, markersize=9, markeredgewidth=1.5)
    axis.set_yticks(range(len(kinds)), [plain(kind) for kind in kinds])
    axis.set_ylim(len(kinds) - 0.5, -0.5)
    axis.grid(False)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("|δ|")


def decade(power: float) -> str:
    """Return 10 to an integer power as text, 10⁻³."""
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return "10" + f"{power:.0f}".translate(digits)


def plain(text: str) -> str:
    """Return text that matplotlib has glyphs for; it warns where it has none."""
    return text.encode("ascii", "backslashreplace").decode()
