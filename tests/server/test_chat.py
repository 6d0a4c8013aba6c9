"""A conversation by `spieldose chat`, as a process of its own."""

import os
import pty
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from select import select
from typing import Any

import grpc
import pytest

from spieldose_kernels.terminal import harmless
from spieldose_proto import inference_pb2 as pb
from spieldose_server.chat import chat
from spieldose_server.client import NotFound, Unavailable

from ..conftest import Running, eventually
from .fake_server import FakeServer, fails, hangs, says

CHAT = "import sys; from spieldose_server.chat import chat; chat(sys.argv[1:])"
COMMAND = "import sys; from spieldose_server.command_line import main; main()"
UNKNOWN = grpc.StatusCode.NOT_FOUND


def talk(address: str, *lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
    """Return what a conversation by pipes prints, and its complaints."""
    done = subprocess.run(
        [sys.executable, "-c", CHAT, "--server", address, *options],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


def asked(fake: FakeServer) -> list[list[tuple[str, str]]]:
    """Return the messages of each request for an answer."""
    requests = [each.request for each in fake.attempts]
    return [
        [(m.role, m.content) for m in request.messages.messages]
        for request in requests
        if isinstance(request, pb.GenerateRequest)
    ]


def test_it_says_what_the_model_says(running: Running) -> None:
    address = f"127.0.0.1:{running.server.port}"
    sampling = pb.SamplingParams(max_tokens=8, temperature=0.7, seed=5)
    messages, texts = [pb.ChatMessage(role="system", content="Be brief.")], []
    for line in ("hello", "and you?"):
        messages.append(pb.ChatMessage(role="user", content=line))
        texts.append(running.client.generate(messages, adapter="a1", sampling=sampling).text)
        messages.append(pb.ChatMessage(role="assistant", content=texts[-1]))
    options = ("--adapter", "a1", "--system", "Be brief.", "--max-tokens", "8")
    options += ("--temperature", "0.7", "--seed", "5")
    said, complaints = talk(address, "hello", "", "and you?", options=options)
    assert said == "".join(f"{text}\n" for text in texts)
    assert not complaints


def test_what_was_said_goes_along_until_it_is_forgotten(fake: FakeServer) -> None:
    fake.plan = [says("tiny"), says("one", " two"), says("three"), says("four")]
    lines = ("a", "b", "/reset", "c")
    assert talk(fake.address, *lines, options=("--system", "S")) == ("one two\nthree\nfour\n", "")
    assert asked(fake) == [
        [("system", "S"), ("user", "a")],
        [("system", "S"), ("user", "a"), ("assistant", "one two"), ("user", "b")],
        [("system", "S"), ("user", "c")],
    ]


def test_another_adapter_goes_on(fake: FakeServer) -> None:
    fake.plan = [says("tiny"), says("1"), says(), says("2"), fails(UNKNOWN), says("3"), says("4")]
    said, complaints = talk(
        fake.address, "a", "/adapter verse", "b", "/adapter nobody", "c", "/adapter", "d"
    )
    assert said == "1\n2\n3\n4\n"
    assert complaints == "spieldose chat: NOT_FOUND: as planned\n"
    requests = [each.request for each in fake.attempts]
    played = [each.adapter_id for each in requests if isinstance(each, pb.GenerateRequest)]
    assert played == ["", "verse", "verse", ""]
    assert len(asked(fake)[-1]) == 7


def test_a_turn_that_fails_is_one_line_and_forgotten(fake: FakeServer) -> None:
    bad = fails(grpc.StatusCode.INVALID_ARGUMENT)
    fake.plan = [says("tiny"), bad, fails(grpc.StatusCode.INTERNAL, "half"), says("ok")]
    said, complaints = talk(fake.address, "a", "b", "/what", "c")
    assert said == "half\nok\n"
    assert complaints.splitlines() == [
        "spieldose chat: INVALID_ARGUMENT: as planned",
        "spieldose chat: INTERNAL: as planned",
        "spieldose chat: expected /adapter, /reset or /help, got '/what'",
    ]
    assert asked(fake)[-1] == [("user", "c")]


def test_it_says_how(fake: FakeServer) -> None:
    said, _ = talk(fake.address, "/help")
    for word in ("/adapter", "/reset", "/help", "Ctrl-C", "Ctrl-D"):
        assert word in said


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is_of_it(fake: FakeServer) -> None:
    over: list[None] = []

    def begins(context: Any) -> Iterator[str]:
        context.add_callback(lambda: over.append(None))  # the iteration may be dropped at a yield
        yield "half an "
        yield from hangs(context)

    fake.plan = [says("tiny"), begins, says("ok")]
    command = [sys.executable, "-c", CHAT, "--server", fake.address]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("a\n")
        process.stdin.flush()
        assert process.stdout.read(8) == "half an "
        process.send_signal(signal.SIGINT)
        eventually(lambda: over)  # the server knows
        process.stdin.write("b\n")
        process.stdin.close()
        assert process.stdout.read() == "\nok\n"
        assert process.stderr.read() == ""
        assert process.wait(20) == 0
    assert asked(fake)[-1] == [("user", "a"), ("assistant", "half an "), ("user", "b")]


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, process: subprocess.Popen[bytes], end: int) -> None:
        self.process = process
        self._end = end
        self._unread = ""

    def read_until(self, text: str) -> str:
        """Return what is shown up to a text, and that."""
        while text not in self._unread:
            self._unread += os.read(self._end, 1 << 16).decode()
        before, _, self._unread = self._unread.partition(text)
        return before + text

    def press(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def interrupt(self) -> None:
        """Send SIGINT until something is shown: input() loses one that comes while it begins."""
        self.process.send_signal(signal.SIGINT)
        while not select([self._end], [], [], 1)[0]:
            self.process.send_signal(signal.SIGINT)


@contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    end, other = pty.openpty()
    ends = {"stdin": other, "stdout": other, "stderr": other, "start_new_session": True}
    with subprocess.Popen(command, env=os.environ | {"TERM": "dumb"}, **ends) as process:
        os.close(other)
        try:
            yield Terminal(process, end)
        finally:
            process.kill()
            os.close(end)


def test_at_a_terminal_it_prompts_and_ctrl_d_leaves(fake: FakeServer) -> None:
    fake.plan = [says(), says("tiny"), says("evil\x1b]0;x\x07"), says("ok")]
    with terminal(
        sys.executable, "-c", CHAT, "--server", fake.address, "--adapter", "verse"
    ) as shown:
        shown.read_until("tiny; /help says how")
        shown.read_until("verse> ")
        shown.press("hello\n")
        said = shown.read_until("\\x1b]0;x\\x07")
        assert "\x1b" not in said and "\x07" not in said
        shown.read_until("verse> ")
        shown.interrupt()
        shown.read_until("verse> ")
        shown.press("again\n")
        shown.read_until("ok")
        shown.read_until("verse> ")
        shown.press("\x04")
        assert shown.process.wait(20) == 0


@pytest.mark.parametrize("at_terminal", [True, False])
def test_control_characters_reach_a_file_and_no_terminal(
    running: Running, at_terminal: bool
) -> None:
    address = f"127.0.0.1:{running.server.port}"
    command = [sys.executable, "-c", COMMAND, "generate", "--server", address, "--prompt", "x"]
    command += ["--regex", "a\x1b\\[31mb"]
    if at_terminal:
        with terminal(*command) as shown:
            assert shown.read_until("mb") == "a\\x1b[31mb"
            assert shown.process.wait(20) == 0
    else:
        assert subprocess.check_output(command, timeout=120) == b"a\x1b[31mb\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Grüße,\n\tdie 🎵 👩‍👩‍👧", "Grüße,\n\tdie 🎵 👩‍👩‍👧"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\rb\b\x00\x7f", "a\\rb\\x08\\x00\\x7f"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),  # C1: some terminals take one for ESC [
    ],
)
def test_only_control_characters_are_written_out(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_without_a_server_or_the_adapter_it_does_not_begin(fake: FakeServer) -> None:
    fake.plan = [fails(UNKNOWN)]
    with pytest.raises(NotFound):
        chat(["--server", fake.address, "--adapter", "nobody"])
    with pytest.raises(Unavailable):
        chat(["--server", "127.0.0.1:1"])


def test_the_command_is_known() -> None:
    settings = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    entry = tomllib.loads(settings)["project"]["entry-points"]["spieldose.commands"]["chat"]
    assert EntryPoint("chat", entry, "spieldose.commands").load() is chat
