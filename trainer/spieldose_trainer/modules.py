"""Which of a base's linear layers are trained, by the ends of their names."""

from collections.abc import Mapping, Sequence

from spieldose_trainer.errors import ConfigError


def select_modules(
    shapes: Mapping[str, tuple[int, int]], wanted: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Return the layers whose names are, or end with, one of `wanted`; all if none is given.

    Raises ConfigError if a name matches nothing.
    """
    if not wanted:
        return dict(shapes)
    for end in wanted:
        if not any(_ends(name, end) for name in shapes):
            kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in shapes))
            raise ConfigError(f"modules: expected ends of layers' names, as {kinds}, got {end!r}")
    return {n: shape for n, shape in shapes.items() if any(_ends(n, end) for end in wanted)}


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
