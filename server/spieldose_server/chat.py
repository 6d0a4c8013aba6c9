"""The `spieldose chat` command: a conversation in the terminal."""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from io import TextIOWrapper

from spieldose_kernels.command_line import parse
from spieldose_kernels.terminal import say
from spieldose_proto import inference_pb2 as pb
from spieldose_server.ask_arguments import AskArguments
from spieldose_server.client import AsyncClient, ClientError
from spieldose_server.client.requests import message
from spieldose_server.connect import connect_loop

HELP = """\
/adapter NAME  go on with this adapter; without a name, with the base
/reset         forget what was said
/help          show this
Ctrl-C stops an answer, which is then as long as it is; Ctrl-D leaves.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatArguments(AskArguments):
    """Talk with a model or an adapter; /help says how."""

    system: str = ""  # a message that goes before all others


def chat(arguments: Sequence[str]) -> None:
    """Talk with a model or an adapter in the terminal."""
    asked = parse(ChatArguments, arguments, prog="spieldose chat")
    with asyncio.Runner() as runner:
        client = runner.run(connect_loop(asked.server))
        try:
            Chat(runner, client, asked).run()
        finally:
            runner.run(client.close())


class Chat:
    """Hold a conversation.

    Calls are tasks of an event loop, where Ctrl-C cancels the task; elsewhere it is raised at any
    line, also under the locks of gRPC.
    """

    def __init__(
        self, runner: asyncio.Runner, client: AsyncClient, arguments: ChatArguments
    ) -> None:
        self._runner = runner
        self._client = client
        self._arguments = arguments
        self._adapter = ""
        self._history: list[pb.ChatMessage] = []
        self._at_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Answer line by line until there are no more.

        Raises ClientError if there is no server, or no such adapter, to begin with.
        """
        self._switch(self._arguments.adapter)
        self._reset()
        self._greet(self._runner.run(self._client.model()).model)
        while (line := self._read()) is not None:
            try:
                self._obey(line) if line.startswith("/") else self._turn(line)
            except ClientError as error:
                _complain(str(error))
            except KeyboardInterrupt:  # a little late: the answer is there
                print()
        if self._at_terminal:
            print()

    def _greet(self, model: str) -> None:
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # half a character ends no conversation
        if self._at_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # input() edits with it
            say(f"{model}; /help says how\n")

    def _read(self) -> str | None:
        """Return the next line that says something, or None after the last."""
        while True:
            try:
                line = input(f"{self._adapter}> " if self._at_terminal else "")
            except EOFError:
                return None
            except KeyboardInterrupt:  # drops the line, as shells do
                print()
                continue
            if line.strip():
                return line

    def _obey(self, line: str) -> None:
        match line.split():
            case ["/adapter", *names] if len(names) < 2:
                self._switch("".join(names))
            case ["/reset"]:
                self._reset()
            case ["/help"]:
                say(HELP)
            case _:
                _complain(f"expected /adapter, /reset or /help, got {line!r}")

    def _switch(self, adapter: str) -> None:
        if adapter:
            self._runner.run(self._client.adapter(adapter))  # raises ClientError if there is none
        self._adapter = adapter

    def _reset(self) -> None:
        system = self._arguments.system
        self._history = [message(pb.ChatMessage, role="system", content=system)] if system else []

    def _turn(self, line: str) -> None:
        """Stream an answer; one that was stopped counts as far as it got, one that failed does not.

        Raises ClientError.
        """
        asked = [*self._history, message(pb.ChatMessage, role="user", content=line)]
        said: list[str] = []
        try:
            with suppress(KeyboardInterrupt):
                self._runner.run(self._answer(asked, said))
        finally:
            if said:
                say("\n")
        if said:
            answer = message(pb.ChatMessage, role="assistant", content="".join(said))
            self._history = [*asked, answer]

    async def _answer(self, asked: list[pb.ChatMessage], said: list[str]) -> None:
        """Show an answer as it comes, and append it, text by text. Raises ClientError."""
        stream = self._client.stream(
            asked,
            adapter=self._adapter,
            sampling=self._arguments.sampling(),
            timeout=self._arguments.timeout,
        )
        async with aclosing(stream):
            async for text in stream:
                said.append(text)
                say(text)


def _complain(problem: str) -> None:
    print(f"spieldose chat: {problem}", file=sys.stderr, flush=True)
