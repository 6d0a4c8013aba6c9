"""A module's name taken apart: which block of the model it lies in, and what it is there."""

from collections.abc import Iterable
from typing import NamedTuple


class ModuleKind(NamedTuple):
    """Say where a module lies."""

    kind: str  # what blocks have in common, e.g. self_attn.q_proj
    block: int | None  # None for what lies in no block


def module_kind(name: str) -> ModuleKind:
    """Split `model.layers.3.mlp.experts.5.up_proj` into `mlp.experts.*.up_proj` and 3."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return ModuleKind(name, None)
    within = ["*" if part.isdigit() else part for part in parts[first + 1 :]]
    return ModuleKind(".".join(within), int(parts[first]))


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Group module names by kind, kinds in the order of their first module."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(module_kind(name).kind, []).append(name)
    return kinds
