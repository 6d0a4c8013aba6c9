"""What is summed over all samples for a few layers at a time, as it would not fit for all."""

from collections.abc import Iterator, Mapping

BUDGET = 1 << 28  # numbers that are held at once: 1 GiB of float32


def groups(sizes: Mapping[str, int], *, budget: int) -> Iterator[list[str]]:
    """Yield the names in order, as many at a time as hold `budget` together, one at least."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > budget:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group
