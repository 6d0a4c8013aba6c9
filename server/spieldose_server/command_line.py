"""The `spieldose` command, and its `serve`, `generate`, `adapters` and `token`.

Commands are found by entry point, so that `spieldose train` works without this package importing
the trainer. Heavy imports wait until a command's arguments are known to be right.
"""

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from importlib.metadata import entry_points
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from spieldose_kernels.command_line import parse, run_subcommand
from spieldose_kernels.errors import SpieldoseError
from spieldose_kernels.terminal import say
from spieldose_proto import inference_pb2 as pb
from spieldose_server.ask_arguments import AskArguments
from spieldose_server.client.requests import message
from spieldose_server.config import DEFAULT_ADDRESS, DIGEST_SHOWN
from spieldose_server.config_file import ServeArguments, checked, with_file
from spieldose_server.connect import connect
from spieldose_server.errors import ConfigError

Command = Callable[[Sequence[str]], None]

MOST_DAYS = 36_500  # of a token: a century


def main() -> None:
    """Run the command named by the first argument."""
    commands = {entry.name: entry for entry in entry_points(group="spieldose.commands")}
    match sys.argv[1:]:
        case [name, *arguments] if name in commands:
            command: Command = commands[name].load()
            try:
                command(arguments)
            except SpieldoseError as error:
                sys.exit(f"spieldose {name}: {error}")
        case asked:
            width = max(map(len, commands))
            print("usage: spieldose COMMAND [--help]\n")
            for name, entry in sorted(commands.items()):
                print(f"  {name:{width}}  {(entry.load().__doc__ or '').splitlines()[0]}")
            sys.exit(0 if asked in (["--help"], ["-h"]) else 2)


def serve(arguments: Sequence[str]) -> None:
    """Serve a base model and a directory of adapters over gRPC."""
    config = parse(ServeArguments, with_file(arguments), prog="spieldose serve")
    from spieldose_kernels.quiet import quiet_libraries

    quiet_libraries()
    if config.check:
        print(checked(config))
        return
    from spieldose_server import server
    from spieldose_server.log_format import set_up_logging

    set_up_logging(config.log_format)
    asyncio.run(server.serve(config))


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateArguments(AskArguments):
    """Generate text with an adapter and stream it to the terminal."""

    prompt: str  # taken as it is, as `prompt` in training data is
    chat: bool = False  # put the prompt through the model's chat template, as a user's message


def generate(arguments: Sequence[str]) -> None:
    """Generate text with an adapter and stream it to the terminal."""
    asked = parse(GenerateArguments, arguments, prog="spieldose generate")
    prompt = (
        [message(pb.ChatMessage, role="user", content=asked.prompt)] if asked.chat else asked.prompt
    )
    with connect(asked.server) as client:
        for text in client.stream(
            prompt, adapter=asked.adapter, sampling=asked.sampling(), timeout=asked.timeout
        ):
            say(text)
        print()


def adapters(arguments: Sequence[str]) -> None:
    """List, show, watch, load, unload or pin a server's adapters."""
    commands: dict[str, Callable[..., Any]] = {
        "list": _list,
        "get": _get,
        "watch": _watch,
        "load": _load,
        "unload": _unload,
        "pin": _pin,
        "unpin": _unpin,
    }
    run_subcommand(commands, arguments, prog="spieldose adapters")


def token(arguments: Sequence[str]) -> None:
    """Make a tenant's token, and the line of the access file that lets it in."""
    parse(_make_token, arguments, prog="spieldose token")


def _make_token(*, days: int = 90) -> None:
    """Make a tenant's token, and the line of the access file that lets it in for some days."""
    from spieldose_server.access import hashed, make_token

    if not 1 <= days <= MOST_DAYS:
        raise ConfigError(f"days: expected 1 to {MOST_DAYS}, got {days}")
    expires = date.today() + timedelta(days=days)
    made = make_token()
    print(made)
    print(f'tokens = [{{ sha256 = "{hashed(made)}", expires = {expires} }}]', file=sys.stderr)


def top(arguments: Sequence[str]) -> None:
    """Show what a server does, live in the terminal."""
    from spieldose_server.top import TopArguments, show

    asked = parse(TopArguments, arguments, prog="spieldose top")
    with connect(asked.server, retries=0) as client:  # the next frame asks again

        def state(name: str) -> str:
            adapter = client.adapter(name)
            return f"{_state(adapter.state)}, {adapter.memory_bytes / 1e6:.1f} MB"

        show(asked, state)


def _list(*, server: str = DEFAULT_ADDRESS) -> None:
    """List every adapter version the server knows."""
    table = Table(box=None)
    for heading in ("name", "version", "state", "density", "MB", "running"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what", overflow="fold")
    with connect(server) as client:
        for adapter in client.adapters():
            table.add_row(
                adapter.name,
                adapter.digest[:DIGEST_SHOWN],
                _state(adapter.state),
                f"{adapter.density:.2%}",
                f"{adapter.memory_bytes / 1e6:.1f}",
                str(adapter.running),
                adapter.reason or adapter.description or adapter.method,
            )
    Console(markup=False, highlight=False).print(table)  # descriptions come from files


def _get(name: tyro.conf.Positional[str], *, server: str = DEFAULT_ADDRESS) -> None:
    """Show one adapter."""
    with connect(server) as client:
        print(client.adapter(name), end="")


def _watch(*, server: str = DEFAULT_ADDRESS) -> None:
    """Print every version's state, then what changes, until interrupted."""
    with connect(server) as client:
        for event in client.watch():
            adapter = event.adapter
            state = "gone" if event.gone else _state(adapter.state)
            print(adapter.name, adapter.digest[:DIGEST_SHOWN] or "-", state, adapter.reason)


def _load(name: tyro.conf.Positional[str], *, server: str = DEFAULT_ADDRESS) -> None:
    """Take up NAME.safetensors from the server's directory now."""
    with connect(server) as client:
        print(client.load(name), end="")


def _unload(name: tyro.conf.Positional[str], *, server: str = DEFAULT_ADDRESS) -> None:
    """Stop serving an adapter; its running requests finish."""
    with connect(server) as client:
        client.unload(name)


def _pin(name: tyro.conf.Positional[str], *, server: str = DEFAULT_ADDRESS) -> None:
    """Bring an adapter to the device and keep it there."""
    with connect(server) as client:
        print(client.pin(name), end="")


def _unpin(name: tyro.conf.Positional[str], *, server: str = DEFAULT_ADDRESS) -> None:
    """Let an adapter be evicted again."""
    with connect(server) as client:
        print(client.unpin(name), end="")


def _state(state: int) -> str:
    name = pb.AdapterState.Name(state)
    return name.removeprefix("ADAPTER_STATE_").lower().replace("_", " ")
