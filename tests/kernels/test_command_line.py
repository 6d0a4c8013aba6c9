"""Wrong command lines end in one line that names the option, what it takes and what it got."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from spieldose_kernels.command_line import parse, run_subcommand


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Show what kinds of settings there are."""

    base: str
    out: Path | None = None
    steps: int = 1
    rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    method: Literal["spiel-ag", "sgc"] = "sgc"
    quantised: bool = True


def refused(capsys: pytest.CaptureFixture[str], run: Callable[[], Any]) -> str:
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_right_command_line_is_taken() -> None:
    words = "--base b --rate 0.5 --betas 0.5 0.9 --no-quantised".split()
    assert parse(Settings, words, prog="x") == Settings(
        base="b", rate=0.5, betas=(0.5, 0.9), quantised=False
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "x: expected --base, got none"),
        ("--bse b", "x: expected --base, got --bse b; did you mean '--base'?"),
        ("--base b --steps many", "x: expected --steps INT, got 'many'"),
        ("--base b --steps=1.5", "x: expected --steps INT, got '1.5'"),
        ("--base b --rate high", "x: expected --rate {None}|FLOAT, got 'high'"),
        ("--base b --betas 0.9 high", "x: expected --betas FLOAT FLOAT, got 'high'"),
        (
            "--base b --betas 0.9 0.9 --betas=0.5 0.5",
            "x: expected --betas once, with all its values, got it again",
        ),
        ("--base b --betas 0.9", "x: expected --betas FLOAT FLOAT, got no value"),
        ("--base b --steps", "x: expected --steps INT, got no value"),
        (
            "--base b --method spiel",
            "x: expected --method to be one of spiel-ag, sgc, got 'spiel'; "
            "did you mean 'spiel-ag'?",
        ),
        (
            "--base b --setps 3",
            "x: expected what --help names, got --setps 3; did you mean '--steps'?",
        ),
        ("--base b more", "x: expected what --help names, got more"),
    ],
)
def test_a_wrong_one_ends_in_one_line(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, lambda: parse(Settings, words.split(), prog="x")) == line


def test_the_line_stays_one_whatever_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base", "b", "--steps", "1\n2\x1b[31m"]
    line = refused(capsys, lambda: parse(Settings, words, prog="x"))
    assert line.startswith("x: expected --steps INT") and line.isprintable()


def test_a_command_that_is_not_there_is_named_beside_those_that_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = {"list": lambda: None, "load": lambda: None}

    def run(*words: str) -> Callable[[], None]:
        return lambda: run_subcommand(commands, words, prog="x")

    assert refused(capsys, run()) == "x: expected one of list, load, got none"
    assert "got lst; did you mean 'list'?" in refused(capsys, run("lst"))
