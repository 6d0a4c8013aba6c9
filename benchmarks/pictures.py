"""Draw what an operator sees, from a real run: docs/top.svg and docs/dashboard.png.

`python benchmarks/pictures.py`. A server plays many adapters over room for some; Prometheus scrapes
it and evaluates the dashboard's own queries, whose panels are drawn here: no Grafana runs. Needs
`prometheus` on the PATH (Debian's package of that name).
"""

import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import grpc
import grpc.aio
import matplotlib.dates
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
from PIL import Image

from demo_base import demo_base
from neighbours import Neighbours
from spieldose_kernels.checkpoint import checkpoint_spec
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server.client import Client
from traffic import Discs

ROOT = Path(__file__).parents[1]
COMMAND = str(Path(sys.executable).with_name("spieldose"))
NAMES = """
    orders dates emails summaries haiku legal-de triage sql python-fix titles medical-codes intents
    support-fr support-de invoices keywords recipes headlines grading rhymes briefs alt-text
    changelog commits
""".split()
SCRAPE, WINDOW = 1, 10  # seconds between two scrapes, and of a rate
COLUMN, ROW = 0.5, 0.27  # inches of a unit of Grafana's grid
LEGENDS = 10  # of a panel
PAPER, INK, FAINT = "#181b1f", "#ccccdc", "#34373d"
CAPTION = """\
Drawn by matplotlib, not by Grafana, from the dashboard's own panels and queries, which Prometheus
evaluated over a recorded run of {seconds:.0f} s: {clients} clients, {adapters} random adapters,
room for {room}; OMP_NUM_THREADS={threads} on {cores} CPU cores, of which others used {others:.0%}.
"""
COLOURS = "#73bf69 #f2cc0c #5794f2 #ff9830 #f2495c #b877d9 #8ab8ff #ffa6b0 #96d98d #fade2a".split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Draw what an operator sees, from a real run."""

    base: Path | None = None  # its directory; none takes the demo's
    seconds: float = 90.0  # of traffic
    clients: int = 12
    threads: int = 1  # of the server's products
    density: float = 0.003  # of adapters
    room: int = 8  # adapters on the device at once
    out: Path = ROOT / "docs"


def main() -> None:
    """Play, then draw."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if shutil.which("prometheus") is None:
        sys.exit("expected `prometheus` on the PATH, got none: apt-get install prometheus")
    base = arguments.base or demo_base()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        root = Path(scratch)
        discs = Discs(checkpoint_spec(base), root)
        (root / "adapters").mkdir()
        for name in NAMES:
            discs.add(root / "adapters", name, arguments.density)
        listen, metrics, prometheus = (f"127.0.0.1:{free_port()}" for _ in range(3))
        serve = [COMMAND, "serve", "--base", base.name, "--adapters", str(root / "adapters")]
        serve += ["--listen", listen, "--metrics-listen", metrics]
        serve += ["--max-adapters", str(arguments.room), "--kv-tokens", "8192"]
        serve += ["--adapter-memory", str(16 << 20), "--host-memory", str(32 << 20)]
        serve += ["--max-batch-requests", "8"]
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        server = stack.enter_context(running(serve, cwd=base.parent, env=environment))
        with Client(listen) as client:
            client.wait(120)
        stack.enter_context(running(recorder(root, metrics, prometheus)))
        began = time.time()
        others = Neighbours([server])
        asyncio.run(traffic(arguments, listen, metrics))
        ended = time.time()
        caption = CAPTION.format(
            seconds=ended - began,
            clients=arguments.clients,
            adapters=len(NAMES),
            room=arguments.room,
            threads=arguments.threads,
            cores=os.cpu_count(),
            others=others.share(),
        )
        draw(prometheus, (began, ended), caption, arguments.out)


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], **settings: Any) -> Iterator[int]:
    """Run a process while the block runs; yield its id."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **settings) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


def recorder(root: Path, metrics: str, listen: str) -> list[str]:
    """Return the command of a Prometheus that scrapes the server."""
    job = {"job_name": "spieldose", "static_configs": [{"targets": [metrics]}]}
    settings = {"global": {"scrape_interval": f"{SCRAPE}s"}, "scrape_configs": [job]}
    (root / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
    places = [f"--config.file={root / 'prometheus.yml'}", f"--storage.tsdb.path={root / 'data'}"]
    return ["prometheus", *places, f"--web.listen-address={listen}"]


async def traffic(arguments: Arguments, address: str, metrics: str) -> None:
    """Have clients ask adapters after Zipf's law; draw `spieldose top` in the midst of it."""
    async with grpc.aio.insecure_channel(address) as channel:
        inference = rpc.InferenceStub(channel)
        end = time.monotonic() + arguments.seconds
        clients = [client(inference, i, end) for i in range(arguments.clients)]
        await asyncio.gather(*clients, top(arguments, address, metrics))


async def client(inference: rpc.InferenceStub, number: int, end: float) -> None:
    """Ask again and again, now and then for what there is not, and at times go away."""
    draw = random.Random(number)
    weights = [1 / (1 + i) for i in range(len(NAMES))]
    await asyncio.sleep(number)  # they come one after the other
    while time.monotonic() < end:
        [name] = draw.choices(NAMES, weights)
        chance = draw.random()
        name = "unheard-of" if chance < 0.06 else "" if chance < 0.15 else name
        request = pb.GenerateRequest(
            text="The same words begin every prompt of this kind. " * draw.choice((1, 1, 4, 8)),
            adapter_id=name,
            sampling_params=pb.SamplingParams(max_tokens=draw.randint(8, 40), temperature=1.0),
        )
        patience = 1.0 if draw.random() < 0.06 else None
        with suppress(grpc.aio.AioRpcError):
            async for _ in inference.Generate(request, timeout=patience):
                pass
        await asyncio.sleep(draw.expovariate(2))


async def top(arguments: Arguments, address: str, metrics: str) -> None:
    """Draw a frame of `spieldose top`."""
    await asyncio.sleep(arguments.seconds * 2 / 3)
    process = await asyncio.create_subprocess_exec(
        COMMAND, "top", "--metrics", f"http://{metrics}/metrics", "--server", address,
        "--interval", "10", "--svg", str(arguments.out / "top.svg"),
    )  # fmt: skip
    assert await process.wait() == 0


def draw(prometheus: str, span: tuple[float, float], caption: str, out: Path) -> None:
    """Draw the dashboard's panels where they stand in its grid."""
    panels = json.loads((ROOT / "docs" / "grafana" / "spieldose.json").read_text())["panels"]
    grids = [panel["gridPos"] for panel in panels]
    columns = max(grid["x"] + grid["w"] for grid in grids)
    rows = 3 + max(grid["y"] + grid["h"] for grid in grids)  # three for the caption
    plt.rcParams.update({"font.size": 7, "font.family": "DejaVu Sans", "text.color": INK})
    figure = plt.figure(figsize=(columns * COLUMN, rows * ROW), facecolor="#111217")
    for panel in panels:
        grid = panel["gridPos"]
        x, y = grid["x"] / columns, 1 - grid["y"] / rows
        if panel["type"] == "row":
            figure.text(x + 0.006, y - 0.7 / rows, f"⌄ {panel['title']}", size=9, weight="bold")
            continue
        left, top = 1.1 / columns, 1.1 / rows  # room for the labels of the axes and the title
        width, height = (grid["w"] - 1.5) / columns, (grid["h"] - 3.1) / rows
        card = (x + 0.1 / columns, y - (grid["h"] - 0.1) / rows)
        size = ((grid["w"] - 0.2) / columns, (grid["h"] - 0.2) / rows)
        figure.add_artist(plt.Rectangle(card, *size, color=PAPER, zorder=-1))
        axes = figure.add_axes((x + left, y - top - height, width, height), facecolor=PAPER)
        axes.set_title(panel["title"], loc="left", size=8, x=-0.09, pad=5)
        series = evaluated(panel, prometheus, span)
        if panel["type"] == "stat":
            stat(axes, series)
        else:
            plot(axes, panel, series, span)
    figure.text(0.006, 0.4 / rows, caption, size=8, style="italic")
    figure.savefig(drawn := BytesIO(), dpi=110)
    few = Image.open(drawn).convert("RGB").quantize(96)  # colours: a third of the bytes
    few.save(out / "dashboard.png", optimize=True)


Series = dict[str, tuple[list[datetime], list[float]]]  # by legend


def evaluated(panel: dict[str, Any], prometheus: str, span: tuple[float, float]) -> Series:
    """Return what a panel's queries give."""
    found: Series = {}
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", f"{WINDOW}s").replace("$instance", ".*")
        asked = urlencode({"query": query, "start": span[0], "end": span[1], "step": SCRAPE})
        results = answer(f"http://{prometheus}/api/v1/query_range?{asked}")
        for result in sorted(
            results, key=lambda result: -sum(float(v) for _, v in result["values"])
        ):
            legend = target["legendFormat"]
            for label, value in result["metric"].items():
                legend = legend.replace(f"{{{{{label}}}}}", value)
            points = [(datetime.fromtimestamp(t), float(v)) for t, v in result["values"]]
            found[legend] = ([t for t, _ in points], [v for _, v in points])
    return found


def answer(url: str) -> list[dict[str, Any]]:
    """Return the series that Prometheus answers with."""
    with urlopen(url, timeout=30) as response:
        found: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return found


def plot(axes: Axes, panel: dict[str, Any], series: Series, span: tuple[float, float]) -> None:
    """Draw lines, one on the other where the panel stacks them."""
    stacks = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    if stacks:
        times = sorted({t for ts, _ in series.values() for t in ts})
        rows = [dict(zip(*points, strict=True)) for points in series.values()]
        heights = [[row.get(t, 0.0) for t in times] for row in rows]
        axes.stackplot(times, heights, labels=list(series), colors=COLOURS, alpha=0.6, lw=0)
    else:
        for (legend, (times, values)), colour in zip(series.items(), COLOURS * 2, strict=False):
            axes.plot(times, values, lw=1, color=colour, label=legend)
            axes.fill_between(times, values, alpha=0.06, color=colour, lw=0)
    if not series:
        axes.text(0.5, 0.5, "No data", transform=axes.transAxes, ha="center")
    axes.set_ylim(bottom=0)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    binary = 2.0 ** np.ceil(np.log2(axes.get_ylim()[1] / 4))
    axes.yaxis.set_major_locator(MultipleLocator(binary) if unit == "bytes" else MaxNLocator(4))
    axes.yaxis.set_major_formatter(formatter(unit))
    axes.set_xlim(*map(datetime.fromtimestamp, span))
    axes.xaxis.set_major_locator(matplotlib.dates.AutoDateLocator(maxticks=5))
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M:%S"))
    axes.tick_params(colors=INK, labelsize=6, length=0)
    axes.grid(color=FAINT, lw=0.5)
    axes.spines[:].set_visible(False)
    axes.legend(
        handles=axes.get_legend_handles_labels()[0][:LEGENDS],
        loc="upper left", bbox_to_anchor=(-0.1, -0.12), ncols=5, fontsize=5.5, frameon=False,
        labelcolor=INK, handlelength=1, columnspacing=1, borderaxespad=0.2, labelspacing=0.2,
    )  # fmt: skip


def stat(axes: Axes, series: Series) -> None:
    """Draw the names of series."""
    axes.axis("off")
    for i, legend in enumerate(series):
        axes.text(0.0, 0.7 - 0.2 * i, legend.replace(": ", "\n"), size=8, va="top", wrap=True)


def formatter(unit: str) -> FuncFormatter:
    """Return how values are written in a Grafana unit."""
    if unit == "bytes":
        return FuncFormatter(lambda value, _: f"{value / (1 << 20):.0f} MiB")
    if unit == "s":
        return FuncFormatter(lambda v, _: f"{v * 1000:.0f} ms" if v < 1 else f"{v:.1f} s")
    ending = " req/s" if unit == "reqps" else ""
    return FuncFormatter(lambda value, _: f"{value:g}{ending}")


if __name__ == "__main__":
    main()
