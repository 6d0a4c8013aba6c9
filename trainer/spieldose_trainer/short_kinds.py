"""Module kinds by short names, for tables and plots."""

from collections import defaultdict
from collections.abc import Iterable

from spieldose_trainer.module_kind import ModuleKind, module_kind


def short_kinds(names: Iterable[str]) -> dict[str, ModuleKind]:
    """Return each module's kind and block, the kind by its last word where no other shares that.

    `model.layers.3.mlp.up_proj` is up_proj in block 3. A name whose only number ends it is a kind
    of its own, as one without a number.
    """
    whole = {name: _named(name) for name in names}
    sharing = defaultdict(set)
    for kind, _ in whole.values():
        sharing[_last(kind)].add(kind)
    return {
        name: ModuleKind(_last(kind) if len(sharing[_last(kind)]) == 1 else kind, block)
        for name, (kind, block) in whole.items()
    }


def _named(name: str) -> ModuleKind:
    found = module_kind(name)
    return found if found.kind else ModuleKind(name, None)


def _last(kind: str) -> str:
    return kind.rpartition(".")[2]
