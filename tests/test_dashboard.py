"""The Grafana dashboard draws every metric there is, and none there is not."""

import json
import re
import runpy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from spieldose_server.metrics_table import described

FILE = Path(__file__).parents[1] / "docs" / "grafana" / "spieldose.json"
DASHBOARD = json.loads(FILE.read_text())
ENDINGS = {"histogram": ("_bucket", "_sum", "_count")}
SCRAPED = {  # what is scraped, by the metric it belongs to
    metric.name: {metric.name + ending for ending in ENDINGS.get(metric.type, ("",))}
    for metric in described()
}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def used(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:spieldose|process)_\w+", expression))


def test_the_file_in_the_tree_is_current() -> None:
    page = runpy.run_path(str(FILE.with_name("dashboard.py")))["page"]
    assert FILE.read_text() == page(), "run `make metrics`"


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_draws_metrics_that_exist(panel: dict[str, Any]) -> None:
    known = set().union(*SCRAPED.values())
    for target in panel["targets"]:
        expression = target["expr"]
        assert used(expression), expression
        assert used(expression) <= known, expression
        selectors = re.findall(r"(?:spieldose|process)_\w+(\{[^}]*\})?", expression)
        assert all('instance=~"$instance"' in selector for selector in selectors), expression
        assert (
            target["datasource"]
            == panel["datasource"]
            == {
                "type": "prometheus",
                "uid": "${datasource}",
            }
        )
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing)


def test_a_counter_is_drawn_as_a_rate() -> None:
    counters = {metric.name for metric in described() if metric.type == "counter"}
    for panel in panels():
        for target in panel["targets"]:
            for name in used(target["expr"]) & counters:
                uses = re.findall(rf"(\w+)\({name}\b", target["expr"])
                assert set(uses) == {"rate"}, target["expr"]


def test_every_metric_of_ours_is_drawn() -> None:
    drawn = {name for panel in panels() for t in panel["targets"] for name in used(t["expr"])}
    missing = [name for name, scraped in SCRAPED.items() if not scraped & drawn]
    assert [name for name in missing if name.startswith("spieldose_")] == []


def test_panels_have_a_number_and_a_place_of_their_own() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for one, other in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in DASHBOARD["panels"])


def test_grafana_10_and_later_ask_for_a_source_and_servers() -> None:
    assert DASHBOARD["schemaVersion"] >= 38  # Grafana 10's
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert used(variables["instance"]["definition"]) == {"spieldose_build_info"}
