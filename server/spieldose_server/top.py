"""The `spieldose top` command: a server's metrics, live in the terminal."""

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from spieldose_server.client import ClientError
from spieldose_server.config import DEFAULT_ADDRESS
from spieldose_server.errors import ConfigError
from spieldose_server.rates import Played, rates
from spieldose_server.scrape import NoMetrics, Scrape
from spieldose_server.top_view import ROWS, frame

PICTURE_WIDTH = 132  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class TopArguments:
    """Show what a server does, live, from its metrics (`spieldose serve --metrics-listen`)."""

    metrics: str = "http://127.0.0.1:9464/metrics"  # where they are
    server: str = DEFAULT_ADDRESS  # asked for the busiest adapters' states, if it answers
    interval: float = 2.0  # seconds between two scrapes
    once: bool = False  # show one frame and end
    svg: Path | None = None  # draw one frame into this file and end

    def __post_init__(self) -> None:
        if not 0 < self.interval < math.inf:
            raise ConfigError(f"interval: expected seconds above 0, got {self.interval}")


def show(arguments: TopArguments, state: Callable[[str], str]) -> None:
    """Show frames as the arguments say; `state` describes an adapter or raises ClientError.

    Raises NoMetrics where one frame is asked for, ConfigError if its file cannot be written;
    otherwise it tries again, until interrupted.
    """
    watch = Watch(arguments, state)
    if arguments.svg is not None:
        _draw(watch.once(), arguments.svg)
    elif arguments.once:
        Console().print(watch.once())
    else:
        _live(watch.frames())


class Watch:
    """Scrape a server again and again."""

    def __init__(self, arguments: TopArguments, state: Callable[[str], str]) -> None:
        self._arguments = arguments
        self._state = state

    def once(self) -> RenderableType:
        """Return a frame of two scrapes. Raises NoMetrics."""
        before = Scrape.of(self._arguments.metrics)
        time.sleep(self._arguments.interval)
        return self._frame(before, Scrape.of(self._arguments.metrics))

    def frames(self) -> Iterator[RenderableType]:
        """Yield a frame an interval, or a line that says why there is none, for ever."""
        before: Scrape | None = None
        while True:
            try:
                after = Scrape.of(self._arguments.metrics)
            except NoMetrics as error:
                before = None
                yield Text(f"{error}; trying again", "red")
            else:
                if before is not None:
                    yield self._frame(before, after)
                before = after
            time.sleep(self._arguments.interval)

    def _frame(self, before: Scrape, after: Scrape) -> RenderableType:
        found = rates(before, after)
        return frame(found, self._states(found.played[:ROWS]), source=self._arguments.metrics)

    def _states(self, adapters: Iterable[Played]) -> dict[str, str]:
        """Return what is known of adapters' states."""
        states: dict[str, str] = {}
        for played in adapters:
            if played.adapter.startswith("("):  # no adapter's own
                continue
            try:
                states[played.adapter] = self._state(played.adapter)
            except ClientError as error:
                if error.code == grpc.StatusCode.UNAVAILABLE:
                    break
        return states


def _live(frames: Iterator[RenderableType]) -> None:
    console = Console()
    if not console.is_terminal:
        for shown in frames:
            console.print(shown)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for shown in frames:
            live.update(shown, refresh=True)


def _draw(shown: RenderableType, file: Path) -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=PICTURE_WIDTH, file=nowhere, force_terminal=True)
        console.print(shown)
    drawn = console.export_svg(title="spieldose top")
    # a picture asks nobody else for its font; without one it is drawn in any of fixed width
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
    try:
        file.write_text(drawn, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"svg: expected a file to write, got: {error}") from error
