"""What is called idle changes nothing in a run; what is read does."""

from typing import Any

import pytest

from spieldose_trainer import command_line
from spieldose_trainer.idle_settings import idle_settings
from spieldose_trainer.methods import METHODS, SelectorName, UpdaterName

from .configuration import Configure
from .runs import adapter_of, assert_same_deltas, run

pytestmark = pytest.mark.usefixtures("no_report")

OTHERS: dict[str, Any] = {  # values besides those of `configure` and the defaults
    "reselect_every": 3,
    "selection_steps": 1,
    "first_rate": 0.5,
    "initial_rate": 0.9,
    "rate_schedule": "cosine",
    "drop": "least-changed",
    "growth": "correlation",
    "seed_momentum": False,
    "allocation": "global",
    "fisher_samples": 3,
    "rank": 4,
    "sgc_variant": "cesgc",
    "chunk": 512,
    "kept": 2,
    "epsilon": 1e-2,
    "epochs": 2.0,
    "eval_every": 5,
}
PAIRS = [
    *((method.selector, method.updater) for method in METHODS.values()),
    ("gradients", "sm3"),
    ("random", "zeroth-order"),
    ("principal", "sm3"),
]
READ_BY = {  # one pair of those that read it
    **dict.fromkeys(OTHERS, ("gradients", "adamw")),
    "allocation": ("magnitude", "adamw"),
    "fisher_samples": ("fisher", "adamw"),
    "rank": ("principal", "adamw"),
    "sgc_variant": ("largest", "compressed-adam"),
    "chunk": ("largest", "compressed-adam"),
    "kept": ("largest", "compressed-adam"),
    "epsilon": ("random", "zeroth-order"),
}


def is_idle(configure: Configure, name: str, **changes: Any) -> bool:
    lines = idle_settings(configure(**{name: OTHERS[name]}, **changes), updates=100)
    return any(line.startswith(f"{name} has no effect: ") for line in lines)


@pytest.mark.parametrize(("selector", "updater"), PAIRS)
def test_idle_settings_change_nothing(
    configure: Configure, selector: SelectorName, updater: UpdaterName
) -> None:
    pair = {"selector": selector, "updater": updater}
    idle = {name: value for name, value in OTHERS.items() if is_idle(configure, name, **pair)}
    assert {"epochs", "eval_every"} < idle.keys()
    assert_same_deltas(
        adapter_of(run(configure(**pair))), adapter_of(run(configure(**pair, **idle)))
    )


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("epochs", "eval_every")])
def test_settings_that_are_read_change_the_run(configure: Configure, name: str) -> None:
    pair = dict(zip(("selector", "updater"), READ_BY[name], strict=True))
    assert not is_idle(configure, name, **pair)
    plain, other = (
        adapter_of(run(configure(**pair, **changes))) for changes in ({}, {name: OTHERS[name]})
    )
    with pytest.raises(AssertionError):
        assert_same_deltas(plain, other)


def test_rank_is_read_by_one_of_the_two_compressions(configure: Configure) -> None:
    assert is_idle(configure, "rank", method="sgc")
    assert not is_idle(configure, "rank", method="sgc", sgc_variant="cesgc")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("spiel-ag", "does not last: selector gradients replaces"),
        ("spiel-ma", "does not last: selector momentum replaces"),
        ("lift", "does not last: selector principal replaces"),
        ("sgc", "keeps the support nearly as it is: selector largest evicts"),
        ("magnitude", None),
    ],
)
def test_it_is_said_what_becomes_of_residuals(
    configure: Configure, method: str, said: str | None
) -> None:
    lines = idle_settings(configure(method=method, start="residual"), updates=100)
    found = [line for line in lines if line.startswith("start=residual")]
    assert len(found) == (said is not None)
    assert all(line.startswith(f"start=residual {said}") for line in found)


@pytest.mark.parametrize(
    ("method", "longest"), [("spiel-ag", 2), ("spiel-ma", 2), ("lift", 4), ("random", 0)]
)
def test_it_is_said_that_a_run_is_too_short_for_its_selector(
    configure: Configure, method: str, longest: int
) -> None:
    config = configure(method=method)
    for updates in (1, 2, 3, 4, 5, None):
        lines = idle_settings(config, updates=updates)
        said = any("keeps its first support" in line for line in lines)
        assert said == (updates is not None and updates <= longest)


def test_length_and_evaluation_are_read_where_nothing_else_says_them(configure: Configure) -> None:
    assert not is_idle(configure, "epochs", max_steps=None)
    assert not is_idle(configure, "eval_every", eval_data=configure().data)


def test_the_command_says_what_has_no_effect(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure()
    words = f"--base {config.base} --data {config.data} --out {config.out} --device cpu"
    words += " --method spiel-ma --growth correlation --max-steps 1"
    said = "growth has no effect: selector gradients would read it, momentum does not"
    for ending in (" --plan", ""):
        command_line.train((words + ending).split())
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == said
        assert not any("has no effect" in line for line in lines[1:])
