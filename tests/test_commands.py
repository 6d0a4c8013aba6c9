"""Every command refuses what it does not know in one line."""

from importlib.metadata import EntryPoint, entry_points

import pytest

COMMANDS = sorted(entry_points(group="spieldose.commands"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_an_unknown_option_ends_in_one_line(
    command: EntryPoint, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.load()(["--nothing", "7"])

    assert ended.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"spieldose {command.name}: expected ")
    assert ", got --nothing 7" in line or line.endswith(", got no value")  # of what goes first
    assert not printed.out
