"""The types of settings, which Python does not check and command lines do."""

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from spieldose_trainer.errors import ConfigError

_CALLED: Final[dict[Any, str]] = {
    str: "text",
    Path: "a path",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    tuple: "a tuple of names",
    Literal: "a name",
    NoneType: "None",
}


def check_types(config: Any) -> None:
    """Raise ConfigError for a dataclass's value of another type than its field's."""
    for name, hint in get_type_hints(type(config)).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        value = getattr(config, name)
        if not any(_is_of(kind, value) for kind in kinds):
            expected = " or ".join(_CALLED[get_origin(kind) or kind] for kind in kinds)
            raise ConfigError(f"{name} must be {expected}, got {value!r}")


def _is_of(kind: Any, value: Any) -> bool:
    """Say whether a value is of a type, which may be a Literal; True is no number."""
    if kind is float:
        return isinstance(value, float) or type(value) is int
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
