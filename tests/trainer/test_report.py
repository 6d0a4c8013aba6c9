"""The report of a run says what happened, in numbers for programs and on one page for people."""

import dataclasses
import json
import math
import random
import re
import shlex
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
import tyro
from matplotlib._pylab_helpers import Gcf

from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.memory import MemoryTable, PaperBytes
from spieldose_trainer.report.churn import age_plot, churn_plot
from spieldose_trainer.report.command import command
from spieldose_trainer.report.curves import MOST_POINTS, loss_plot, smoothed
from spieldose_trainer.report.magnitudes import BINS_PER_DECADE, Magnitudes
from spieldose_trainer.report.maps import magnitude_plot, place_plot
from spieldose_trainer.report.numbers import as_json
from spieldose_trainer.report.page import page
from spieldose_trainer.report.summary import Summary, summarise
from spieldose_trainer.report.svg import THEME
from spieldose_trainer.report.write import write_report
from spieldose_trainer.run_log import Evaluation, Reselection, RunLog, Update

SHAPES = {
    f"model.layers.{block}.{kind}": shape
    for block in range(2)
    for kind, shape in (("self_attn.q_proj", (16, 16)), ("mlp.up_proj", (24, 16)))
}
NEVER_CHANGED = {name: torch.zeros(20, dtype=torch.int16) for name in SHAPES}  # the support
MEMORY = MemoryTable(
    entries=100,
    value=400,
    position=440,
    gradient=400,
    moments=1200,
    peak=2_500_000_000,
    paper=PaperBytes(total=24),
)
CONFIG = partial(
    TrainConfig, base="models/tiny", data=Path("sums.jsonl"), out=Path("sums.safetensors")
)
PLOTS = ("Loss", "Churn", "Age of surviving positions", "Where the delta is", "Size of the entries")


def adapter_of(shapes: Mapping[str, tuple[int, int]], *, description: str = "") -> Adapter:
    """Make an adapter with 20 entries in every module, of which two are 0."""
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, shape in shapes.items():
        positions = torch.randperm(math.prod(shape), generator=generator)[:20]
        values = torch.randn(20, generator=generator) * 1e-3
        values[:2] = 0
        modules[name] = SparseDelta.from_flat(positions, values, shape=shape)
    info = AdapterInfo(
        base_model="models/tiny",
        base_fingerprint="0" * 64,
        method="spiel-ag",
        density=0.05,
        description=description,
    )
    return Adapter(info, modules)


def log_of(updates: int) -> RunLog:
    """Make a run with reselections after updates 5, 15, … and evaluations after 10, 20, …."""
    log = RunLog()
    for i in range(1, updates + 1):
        log.append(Update(number=i, loss=3 / i, learning_rate=1e-3, seconds=0.5, tokens=100))
        if i % 10 == 5:
            log.append(
                Reselection(update=i, replaced=80 // i, entries=80, lost=None, lost_over_run=None)
            )
        if i % 10 == 0:
            log.append(Evaluation(update=i, loss=3.1 / i, exact_match=i / updates))
    return log


def run(**changes: Any) -> dict[str, Any]:
    """Return what a report of an ordinary run is made from, but for what is given."""
    adapter = changes.get("adapter", adapter_of(SHAPES))
    return {
        "adapter": adapter,
        "log": log_of(30),
        "born": {name: torch.arange(20, dtype=torch.int16) % 4 for name in adapter.modules},
        "settings": CONFIG(density=0.05).settings(),
        "processes": 1,
        "memory": MEMORY,
    } | changes


def summary_of(**changes: Any) -> Summary:
    arguments = run(**changes)
    return summarise(arguments.pop("adapter"), arguments.pop("log"), **arguments)


def strict(text: str) -> dict[str, Any]:
    """Read JSON as everybody else does, without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    data: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return data


def numbers_of(**changes: Any) -> dict[str, Any]:
    return strict(json.dumps(as_json(summary_of(**changes))))


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an ordinary run's report."""
    torch.set_num_threads(1)  # as in the tests, and reports name it
    folder = tmp_path_factory.mktemp("ordinary")
    write_report(folder, **run())
    return folder


def html(folder: Path) -> str:
    return (folder / "report.html").read_text()


def pictures(text: str) -> list[ElementTree.Element]:
    found = re.findall("<svg.*?</svg>", text, flags=re.DOTALL)
    return [ElementTree.fromstring(picture) for picture in found]


def source(element: ElementTree.Element) -> str:
    return ElementTree.tostring(element, encoding="unicode")


def test_the_page_shows_every_plot_there_is_data_for(ordinary: Path) -> None:
    assert re.findall("<h2>(.*?)</h2>", html(ordinary))[: len(PLOTS)] == list(PLOTS)
    assert len(pictures(html(ordinary))) == len(PLOTS)


def test_the_page_of_a_run_without_updates_shows_the_delta_alone() -> None:
    shown = page(summary_of(log=RunLog(), born=NEVER_CHANGED))
    assert re.findall("<h2>(.*?)</h2>", shown)[:2] == list(PLOTS[-2:])


def test_a_plot_without_data_is_not_made() -> None:
    nothing = Magnitudes.of([torch.zeros(20)])
    assert loss_plot(RunLog()) is None
    assert churn_plot(RunLog()) is None
    assert age_plot(None) is None
    assert magnitude_plot({"q_proj": nothing}, all_kinds=nothing) is None


def test_a_support_that_never_changed_has_no_ages() -> None:
    assert summary_of(born=NEVER_CHANGED).ages is None


def test_curves_without_data_are_left_out_of_the_loss_plot() -> None:
    log = log_of(30)
    log.evaluations = [dataclasses.replace(e, exact_match=None) for e in log.evaluations]
    plot = loss_plot(log)
    assert plot is not None and "evaluation</text>" in plot.svg
    assert "exact match" not in plot.svg + plot.caption
    log.evaluations = []
    plot = loss_plot(log)
    assert plot is not None and "evaluation" not in plot.svg + plot.caption


@pytest.mark.parametrize("lost", [None, 0.0])
def test_the_norm_lost_to_eviction_is_left_out_where_there_was_none(lost: float | None) -> None:
    log = log_of(30)
    log.reselections = [dataclasses.replace(r, lost=lost) for r in log.reselections]
    plot = churn_plot(log)
    assert plot is not None and "norm lost" not in plot.svg


def test_the_norm_lost_over_the_run_is_said_where_it_was_counted() -> None:
    log = log_of(30)
    log.reselections = [
        dataclasses.replace(r, lost=0.01, lost_over_run=r.update / 100) for r in log.reselections
    ]
    assert "went with what it evicted, 25.0% over the whole run." in page(summary_of(log=log))
    assert numbers_of(log=log)["log"]["reselections"]["lost_over_run"] == [0.05, 0.15, 0.25]


def test_the_norm_lost_to_eviction_is_plotted() -> None:
    log = log_of(30)
    log.reselections = [dataclasses.replace(r, lost=0.01) for r in log.reselections]
    plot = churn_plot(log)
    assert plot is not None and "norm lost" in plot.svg


def test_the_numbers_are_written_beside_the_page(ordinary: Path) -> None:
    assert strict((ordinary / "report.json").read_text()) == numbers_of()


def test_the_numbers_hold_the_whole_log() -> None:
    log, again = log_of(30), RunLog()
    again.load_state_dict(numbers_of(log=log)["log"])
    assert again.updates == log.updates
    assert again.reselections == log.reselections
    assert again.evaluations == log.evaluations


def test_the_numbers_hold_every_module() -> None:
    adapter = adapter_of(SHAPES)
    modules = numbers_of(adapter=adapter)["modules"]
    assert modules.keys() == adapter.modules.keys()
    for name, module in modules.items():
        assert module["density"] == pytest.approx(20 / math.prod(SHAPES[name]))
        norm = float(adapter.modules[name].dense(torch.float64).norm())
        assert module["norm"] == pytest.approx(norm)


def test_ages_are_shares_of_all_entries() -> None:
    born = {name: zeros.clone() for name, zeros in NEVER_CHANGED.items()}
    born["model.layers.1.mlp.up_proj"][:] = 3
    born["model.layers.0.mlp.up_proj"][:5] = 1
    assert numbers_of(born=born)["ages"] == pytest.approx([55 / 80, 5 / 80, 0.0, 20 / 80])


def test_speed_is_tokens_over_the_time_of_updates() -> None:
    expected = {"seconds": 15.0, "tokens": 3000, "tokens_per_second": 200.0, "updates": 30}
    assert numbers_of()["time"] == expected


def test_the_numbers_say_with_what_and_on_what_it_ran() -> None:
    found = numbers_of()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"].keys() >= {"spieldose", "transformers", "python"}
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["memory"]["total"] == 2440 and found["memory"]["paper"]["total"] == 24


def test_a_loss_that_is_not_finite_is_null_and_does_not_spoil_the_plot() -> None:
    log = log_of(30)
    log.append(dataclasses.replace(log.updates[-1], number=31, loss=math.nan))
    assert numbers_of(log=log)["log"]["updates"]["loss"][-1] is None
    plot = loss_plot(log)
    assert plot is not None and "nan" not in plot.svg.lower()


def test_text_of_users_is_escaped_everywhere() -> None:
    evil = "<script>alert(\"1\")</script> & 'more'"
    settings = CONFIG(base=evil, description=evil).settings()
    summary = summary_of(adapter=adapter_of(SHAPES, description=evil), settings=settings)
    text = page(summary)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert as_json(summary)["adapter"]["description"] == evil


def test_the_page_needs_nothing_from_elsewhere(ordinary: Path) -> None:
    elements = [element for picture in pictures(html(ordinary)) for element in picture.iter()]
    links = {v for e in elements for name, v in e.attrib.items() if name.endswith("href")}
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"<(script|link|img|iframe|object)|\bsrc=|@import|url\(h", html(ordinary))


def test_what_plots_refer_to_is_there(ordinary: Path) -> None:
    for picture in pictures(html(ordinary)):
        ids = {element.get("id") for element in picture.iter()}
        assert set(re.findall(r"url\(#(.*?)\)", source(picture))) <= ids
        assert set(re.findall(r"href=\"#(.*?)\"", source(picture))) <= ids


def test_plots_take_their_colours_from_the_pages_theme(ordinary: Path) -> None:
    drawn = "".join(source(picture) for picture in pictures(html(ordinary)))
    light, _, rest = html(ordinary).partition("@media (prefers-color-scheme: dark)")
    for colour, name in THEME.items():
        assert colour not in drawn and name in drawn
        variable = name[len("var(") : -1] + ":"
        assert variable in light and variable in rest.partition("* {")[0]


def test_the_same_run_gives_the_same_report_twice(ordinary: Path, tmp_path: Path) -> None:
    write_report(tmp_path, **run())
    assert html(tmp_path) == html(ordinary)
    assert (tmp_path / "report.json").read_bytes() == (ordinary / "report.json").read_bytes()


def test_a_report_can_be_written_in_threads_and_leaves_matplotlib_as_it_was(
    ordinary: Path, tmp_path: Path
) -> None:
    before = dict(matplotlib.rcParams)
    threads = [
        threading.Thread(target=write_report, args=(tmp_path / name,), kwargs=run())
        for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert html(tmp_path / "a") == html(tmp_path / "b") == html(ordinary)
    assert dict(matplotlib.rcParams) == before
    assert Gcf.get_num_fig_managers() == 0  # pyplot's figures


def test_a_long_run_of_a_deep_model_stays_below_a_megabyte() -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    shapes = {f"model.layers.{block}.{kind}": (8, 8) for block in range(80) for kind in kinds}
    text = page(summary_of(adapter=adapter_of(shapes), log=log_of(6000)))
    assert len(text.encode()) < 1_000_000


def test_a_support_that_changes_with_every_update_is_drawn_in_few_shapes() -> None:
    log = RunLog()
    for i in range(1, 5001):
        lost = {"lost": i % 7 / 100, "lost_over_run": None}
        log.append(Reselection(update=i, replaced=i % 9, entries=80, **lost))
    churn, ages = churn_plot(log), age_plot([1 / 5001] * 5001)
    assert churn is not None and len(churn.svg) < 100_000
    assert ages is not None and len(ages.svg) < 100_000
    assert "34 to a bar" in ages.svg


def test_modules_outside_the_blocks_are_shown_too() -> None:
    summary = summary_of(adapter=adapter_of(SHAPES | {"lm_head": (32, 16)}))
    plot = place_plot(summary.modules)
    assert "lm_head</" in plot.svg
    assert re.findall(r">(0|1|other)</text>", plot.svg) == ["0", "1", "other"]
    assert as_json(summary)["modules"]["lm_head"]["block"] is None


def test_names_are_drawn_as_they_are_and_without_warnings() -> None:
    adapter = adapter_of({"a.0.$x_1$<b>": (8, 8), "a.0.重み": (8, 8)})
    plot = place_plot(summary_of(adapter=adapter).modules)
    assert "$x_1$&lt;b&gt;</" in plot.svg


@pytest.mark.parametrize("broken", ["report.json", "report.html"])
def test_a_report_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    for name in ("report.json", "report.html"):
        (tmp_path / name).write_text("before")

    def full(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text.encode()[:10])
        if broken in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, **run())
    assert (tmp_path / broken).read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 7, "schedule": "cosine", "resume": True, "description": 'a "b" $c'},
        {"method": "zo", "updater": "adamw", "density": 0.001, "allocation": "global"},
        {"modules": ("q_proj", "mlp.up_proj"), "quantised": False, "packing": True},
        {"selector": "fisher", "learning_rate": 3e-5, "data": Path("it's data.jsonl")},
        {"description": "(beta) orders", "data": Path("(old).jsonl")},
        {"description": "(1)", "modules": ("(odd",)},
        {"description": "True", "base": "-x"},
        {"description": "-x", "over": Path("--over")},
    ],
)
def test_the_command_makes_the_same_settings_again(changes: dict[str, Any]) -> None:
    config = CONFIG(**changes)
    words = shlex.split(command(config.settings(), processes=1))
    assert words[:2] == ["spieldose", "train"]
    again = tyro.cli(TrainConfig, args=words[2:])
    assert again.settings() == config.settings() | {"resume": "False"}


def test_the_command_leaves_out_what_is_default() -> None:
    words = "spieldose train --base models/tiny --data sums.jsonl --out sums.safetensors"
    assert command(CONFIG(seed=0, method="spiel-ag").settings(), processes=1) == words
    assert command(CONFIG(method="zo").settings(), processes=1) == f"{words} --method zo"


def test_the_command_of_several_processes_starts_as_many() -> None:
    settings = CONFIG().settings()
    one, two = (command(settings, processes=processes) for processes in (1, 2))
    assert two == f"torchrun --nproc-per-node=2 --no-python {one}"
    assert as_json(summary_of(processes=2))["command"].startswith("torchrun --nproc-per-node=2 ")


def test_magnitudes_do_not_depend_on_how_the_values_are_cut() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole, parts = Magnitudes.of([values]), Magnitudes.of(values.split(300))
    assert torch.equal(whole.counts, parts.counts)
    assert int(whole.counts.sum()) == 1000


def test_magnitudes_count_zeros_apart_and_strays_in_the_last_bin() -> None:
    values = torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e-3], dtype=torch.bfloat16)
    found = Magnitudes.of([values])
    assert found.zeros == 2
    assert int(found.counts.sum()) == 3
    assert found.counts[0] == found.counts[-1] == 1


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_quantiles_of_magnitudes_are_right_to_one_bin(share: float) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    exact = np.quantile(values.abs().numpy(), share)
    found = Magnitudes.of([values, torch.zeros(500)]).quantile(share)
    assert abs(math.log10(found / exact)) <= 1 / BINS_PER_DECADE


def test_a_smoothed_curve_lags_nowhere() -> None:
    line = [float(i) for i in range(50)]
    assert smoothed(line, span=7)[3:-3] == pytest.approx(line[3:-3])


def test_smoothing_passes_over_what_is_not_finite() -> None:
    assert smoothed([1.0, math.nan, 3.0], span=3) == [1.0, 2.0, 3.0]


def test_a_long_curve_is_drawn_by_the_means_of_neighbours() -> None:
    log = log_of(3 * MOST_POINTS)
    noise = random.Random(0)
    log.updates = [dataclasses.replace(u, loss=noise.gauss(2, 0.3)) for u in log.updates]
    plot = loss_plot(log)
    assert plot is not None
    longest = max(re.findall(r" d=\"(.*?)\"", plot.svg, flags=re.DOTALL), key=len)
    assert longest.count("L ") <= MOST_POINTS
