"""Every command refuses what it does not know in one line."""

import os
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points

import pytest

from spieldose_server.command_line import main

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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generate", "--prompt", "x", "--max-tokens", "-1"), "max_tokens: expected what fits"),
        (("generate", "--prompt", "x", "--seed", str(1 << 70)), "seed: expected what fits"),
        (("generate", "--prompt", "\udcff"), "text: expected what fits"),
        (("generate", "--prompt", "\udcff", "--chat"), "content: expected what fits"),
        (("generate", "--prompt", "x", "--stop", "\udcff"), "stop: expected what fits"),
        (("generate", "--prompt", "x", "--timeout", "nan"), "timeout: expected seconds, got nan"),
        (
            ("generate", "--prompt", "x", "--regex", "x", "--json-schema", "{}"),
            "expected json_schema or regex, got both",
        ),
        (("chat", "--adapter", "\udcff"), "adapter_id: expected what fits"),
        (("adapters", "get", "\udcff"), "adapter_id: expected what fits"),
        (("token", "--days", "0"), "days: expected 1 to 36500, got 0"),
        (("token", "--days", "99999999"), "days: expected 1 to 36500, got 99999999"),
    ],
)
def test_what_nobody_can_be_asked_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    server = () if words[0] == "token" else ("--server", "127.0.0.1:1")
    monkeypatch.setattr(sys, "argv", ["spieldose", *words, *server])
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value.code).startswith(f"spieldose {words[0]}: {said}")
    assert "\n" not in str(ended.value.code)


def test_a_reader_that_has_gone_ends_a_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "spieldose_server", "token"]
    done = subprocess.run(command, stdout=writer, stderr=-1, text=True, timeout=60, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert "Error" not in done.stderr


def test_a_full_disk_ends_a_command_in_one_line() -> None:
    command = [sys.executable, "-m", "spieldose_server", "token"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=-1, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "spieldose: [Errno 28] No space left on device"


def test_what_an_encoding_lacks_is_written_out() -> None:
    code = (
        "from spieldose_server import __main__, command_line\n"
        "command_line.main = lambda: print(chr(0x266b))\n"
        "__main__.main()"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout == b"\\u266b\n"


@pytest.mark.parametrize(("interrupted", "status"), [("import", -signal.SIGINT), ("run", 130)])
def test_ctrl_c_leaves_no_traceback(interrupted: str, status: int) -> None:
    code = {
        "import": "class Press:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.endswith('.command_line'): signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\n",
        "run": "from spieldose_server import command_line\n"
        "command_line.main = lambda: signal.raise_signal(signal.SIGINT)\n",
    }[interrupted]
    code = f"import signal, sys\nfrom spieldose_server import __main__\n{code}__main__.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (status, b"")
