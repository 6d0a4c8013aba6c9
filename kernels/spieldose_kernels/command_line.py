"""Command lines whose mistakes end in one line."""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_origin, get_type_hints

import tyro
from tyro import _errors as wrong  # tyro's hook for other words than its boxes: exactly pinned

from spieldose_kernels.errors import one_line

T = TypeVar("T")


def parse(kind: Callable[..., T], arguments: Sequence[str], *, prog: str) -> T:
    """Return what a dataclass or function gives for a command line.

    Exits with status 2 and one line on stderr if the command line is wrong.
    """
    options = [f"--{name.replace('_', '-')}" for name in inspect.signature(kind).parameters]
    _check_lists(kind, arguments, prog)
    with _in_one_line(options):
        return tyro.cli(kind, prog=prog, args=arguments)


def run_subcommand(
    commands: Mapping[str, Callable[..., Any]], arguments: Sequence[str], *, prog: str
) -> None:
    """Run the function that a command line names first; exits as `parse` does."""
    with _in_one_line(commands):
        tyro.extras.subcommand_cli_from_dict(dict(commands), prog=prog, args=arguments)


def _check_lists(kind: Callable[..., object], arguments: Sequence[str], prog: str) -> None:
    """Refuse an option of several values that is given twice: the last would count alone."""
    given = [word.partition("=")[0].replace("_", "-") for word in arguments]
    for name, hint in get_type_hints(kind).items():
        option = f"--{name.replace('_', '-')}"
        if get_origin(hint) is tuple and given.count(option) > 1:
            print(
                f"{prog}: expected {option} once, with all its values, got it again",
                file=sys.stderr,
            )
            sys.exit(2)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a line that refuses a name: the known one that is like it, if any is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextmanager
def _in_one_line(options: Iterable[str]) -> Iterator[None]:
    def refuse(event: wrong.ParseErrorEvent) -> None:
        if problem := _problem(event, options):
            print(one_line(f"{event.prog}: {problem}"), file=sys.stderr)
            sys.exit(2)

    with wrong.on_parse_error(refuse):
        yield


def _problem(event: wrong.ParseErrorEvent, options: Iterable[str]) -> str | None:
    """Say what was expected and got; None: a kind of error that only tyro has words for."""
    match event:
        case wrong.MissingArgs():
            names = [missing.arg.display_name() for missing in event.missing_arguments]
            return f"expected {', '.join(names)}, got {_got(event.unrecognized_tokens, names)}"
        case wrong.MissingSubcommand():
            known = event.subcommand_spec.parser_from_name
            found = [] if event.found_token is None else [event.found_token]
            return f"expected one of {', '.join(known)}, got {_got(found, known)}"
        case wrong.InvalidChoice():
            near = did_you_mean(event.value, event.choices)
            expected = f"{event.argument.display_name()} to be one of {', '.join(event.choices)}"
            return f"expected {expected}, got {event.value!r}{near}"
        case wrong.BadValue(offending_value=None):
            return f"expected {_invocation(event.argument)}, got no value"
        case wrong.UnrecognizedArgs():
            return f"expected what --help names, got {_got(event.tokens, options)}"
        case wrong.InstantiationFailure() if event.argument is not None:
            said = event.message.partition("\n")[0]
            quoted = re.findall(r"'(.*?)'", said)  # the value, in whatever words it is refused
            got = f", got {quoted[-1]!r}" if quoted else f": {said}"
            return f"expected {_invocation(event.argument)}{got}"
        case _:
            return None


def _got(tokens: Sequence[str], known: Iterable[str]) -> str:
    return f"{' '.join(tokens)}{did_you_mean(tokens[0], known)}" if tokens else "none"


def _invocation(argument: Any) -> str:
    metavar = argument.lowered.metavar or ""
    return metavar if argument.is_positional() else f"{argument.display_name()} {metavar}".rstrip()
