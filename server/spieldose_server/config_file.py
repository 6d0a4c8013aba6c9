"""The server's settings from a TOML file; each becomes the flag of its name.

`python -m spieldose_server.config_file` prints a file with every setting, its default and meaning.
"""

import argparse
import inspect
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from spieldose_kernels.command_line import did_you_mean
from spieldose_server.access import Access
from spieldose_server.config import ServerConfig
from spieldose_server.errors import ConfigError
from spieldose_server.tls import Certificates
from spieldose_server.trusted_keys import TrustedKeys

MEANING = re.compile(r"    (\w+): [^#]*  # (.+)")  # a field of a dataclass, and its comment


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeArguments(ServerConfig):
    __doc__ = ServerConfig.__doc__

    config: Path | None = None  # TOML file of these settings; flags override it
    check: bool = False  # say what is wrong with the settings, serve nothing


def with_file(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the settings of its --config file before its own.

    Raises ConfigError.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, nargs="?")
    path = parser.parse_known_args(arguments)[0].config
    return [*arguments] if path is None else [*flags(path), *arguments]


def flags(path: Path) -> list[str]:
    """Return a TOML file's settings as flags. Raises ConfigError."""
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a readable TOML file, got: {error}") from error
    hints = get_type_hints(ServerConfig)
    known = [field.name for field in fields(ServerConfig)]
    found = []
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(
                f"{path}: expected a setting, got {name!r}{did_you_mean(name, known)}"
            )
        _check(f"{path}: {name}", value, hints[name])
        found += [f"--{name.replace('_', '-')}", str(value)]
    return found


def checked(config: ServerConfig) -> str:
    """Return what a server of these settings would serve. Raises BaseError or ConfigError."""
    from spieldose_kernels.base import pick_device  # heavy
    from spieldose_kernels.checkpoint import hub_name, target_shapes

    pick_device(config.device)
    if config.access:
        Access(Path(config.access))
    Certificates.of(config)
    TrustedKeys.of(config)

    if os.path.isdir(config.base):  # as find_checkpoint asks
        what = f"{config.base}, {len(target_shapes(Path(config.base)))} target layers"
    else:
        what = f"{hub_name(config.base)}, a hub name, not looked up"
    return f"spieldose serve: the settings are right: {what}, on {config.listen}"


def template() -> str:
    """Return a TOML file with every setting, its default and its meaning."""
    meanings = dict(MEANING.findall(inspect.getsource(ServerConfig)))
    lines = ["# Every setting of `spieldose serve --config FILE`, with its default.\n"]
    for field in fields(ServerConfig):
        required = field.default is MISSING
        value = '""' if required else _toml(field.default)
        setting = f"{field.name} = {value}"
        lines.append(f"# {meanings[field.name]}")
        lines.append(f"# {setting}  # has to be given\n" if required else f"{setting}\n")
    return "\n".join(lines)


def _check(what: str, value: object, hint: Any) -> None:
    """Raise ConfigError unless a TOML value is of a setting's type."""
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        if value not in choices:
            near = did_you_mean(str(value), choices)
            raise ConfigError(f"{what}: expected one of {', '.join(choices)}, got {value!r}{near}")
        return
    kinds: tuple[type, ...] = {int: (int,), float: (int, float)}.get(hint, (str,))
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = {int: "a whole number", float: "a number"}.get(hint, "a string")
        raise ConfigError(f"{what}: expected {expected}, got {value!r}")


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


if __name__ == "__main__":
    print(template(), end="")
