"""What a run records while it goes: its updates, reselections and evaluations."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Hold one move of the values."""

    number: int  # counted from 1
    loss: float  # mean over the update's batch, before the values moved
    learning_rate: float
    seconds: float  # wall time
    tokens: int  # processed, padding left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Reselection:
    """Hold one exchange of support entries."""

    update: int  # the update after which it happened
    replaced: int  # entries that left and as many that joined, over all layers
    entries: int  # in the support, over all layers
    lost: float | None  # share of the norm of the deltas that was evicted; None: not measured
    lost_over_run: float | None  # share that all evictions so far took together, likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Hold one look at the evaluation set."""

    update: int  # the update after which it happened; 0: before the first
    loss: float
    exact_match: float | None  # share of completions reproduced; None: not measured


Record = Update | Reselection | Evaluation
Kind = TypeVar("Kind", Update, Reselection, Evaluation)


class RunLog:
    """Keep a run's records in the order they came; a resumed run goes on with the same log."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.reselections: list[Reselection] = []
        self.evaluations: list[Evaluation] = []

    def append(self, record: Record) -> None:
        """Add one record to those of its kind."""
        match record:
            case Update():
                self.updates.append(record)
            case Reselection():
                self.reselections.append(record)
            case Evaluation():
                self.evaluations.append(record)

    @property
    def best(self) -> Evaluation | None:
        """Return the evaluation of the lowest loss, of equal ones the first."""
        return min(self.evaluations, key=lambda look: look.loss, default=None)

    def state_dict(self) -> dict[str, dict[str, list[Any]]]:
        """Return the records as plain data: for each kind, one list per field."""
        return {
            "updates": _columns(Update, self.updates),
            "reselections": _columns(Reselection, self.reselections),
            "evaluations": _columns(Evaluation, self.evaluations),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, list[Any]]]) -> None:
        """Take the records of `state_dict` in place of those held."""
        self.updates = _records(Update, state["updates"])
        self.reselections = _records(Reselection, state["reselections"])
        self.evaluations = _records(Evaluation, state["evaluations"])


def _columns(kind: type[Kind], records: list[Kind]) -> dict[str, list[Any]]:
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: [getattr(record, name) for record in records] for name in names}


def _records(kind: type[Kind], columns: Mapping[str, list[Any]]) -> list[Kind]:
    rows = zip(*columns.values(), strict=True)
    return [kind(**dict(zip(columns, row, strict=True))) for row in rows]
