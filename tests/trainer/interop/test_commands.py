"""The shared `spieldose` command finds these commands by the names in pyproject.toml."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from spieldose_trainer.interop import command_line

ENTRIES = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
    "entry-points"
]["spieldose.commands"]


@pytest.mark.parametrize("name", ["convert", "extract", "inspect"])
def test_the_command_is_found_by_its_name(name: str) -> None:
    entry = EntryPoint(name, ENTRIES[name], "spieldose.commands")
    assert entry.load() is getattr(command_line, name)


@pytest.mark.parametrize("name", ["convert", "extract", "inspect"])
def test_the_command_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        getattr(command_line, name)(["--help"])
    assert ended.value.code == 0
    assert f"usage: spieldose {name}" in capsys.readouterr().out
