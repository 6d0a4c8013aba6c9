"""A matplotlib figure as SVG inside a page: the page's font, and colours of its theme."""

import io
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# drawn in the light theme's colours, then named, so that the page decides
INK: Final = "#1f2430"  # text
FAINT: Final = "#c3c8d1"  # axes and grid
MAIN: Final = "#2f6fb5"  # the first thing to look at
SECOND: Final = "#c8641b"
PALE: Final = "#a9c4e2"  # the same data as MAIN, less important
PAGE: Final = "#fefefd"  # the page behind the figure
THEME: Final = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    MAIN: "var(--main)",
    SECOND: "var(--second)",
    PALE: "var(--pale)",
    PAGE: "var(--page)",
}

WIDTH: Final = 8.6  # inches of every figure; the page scales it

_SETTINGS: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text: a third of the size, and it can be selected
    "svg.hashsalt": "spieldose",  # ids would differ from run to run
    "text.parse_math": False,  # names are what they are
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}
_LOCK = threading.Lock()  # the settings above are matplotlib's, hence the process's


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Hold one figure of the page and what is said of it."""

    title: str
    caption: str  # text, not yet escaped
    svg: str


def svg(draw: Callable[[Figure], None], *, height: float) -> str:
    """Return what `draw` puts on a figure of this height, in inches, as an `<svg>` element."""
    out = io.StringIO()
    with _LOCK, matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _for_page(out.getvalue())


def _for_page(text: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r" width=\"[^\"]+pt\" height=\"[^\"]+pt\"", "", text, count=1)
    text = re.sub(r"<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", text)  # it styles the page
    text = re.sub(r"<g id=\"[^\"]*\">", "<g>", text)  # figures would share them
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    for colour, name in THEME.items():
        text = text.replace(colour, name)
    return re.sub(r"\s*\n\s*", "\n", text)


def percent() -> FuncFormatter:
    """Return a formatter that writes 0.125 as 12.5%; an axis needs one of its own."""
    return FuncFormatter(lambda share, _: f"{100 * share:g}%")
