"""When a selection phase runs, and what share of the support it replaces."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ReselectionSchedule:
    """Lay out the selection phases of a run of `total` updates, counted from 1.

    A phase is the first γ updates of every S; at its end the support changes: the first time by a
    share of its own, wholly in arXiv 2401.16405 (it was random), by one that falls from r0 to 0
    afterwards. None ends with the run or later: nothing would train what it grew.
    """

    every: int  # S
    steps: int  # γ
    initial_rate: float  # r0
    decay: Literal["linear", "cosine"]
    total: int  # T
    first_rate: float = 1.0

    def opens_phase(self, update: int) -> bool:
        """Say whether candidates are chosen from this update's gradients."""
        return update % self.every == 1 and self._ends(update)

    def in_phase(self, update: int) -> bool:
        """Say whether this update's gradients count for the next reselection."""
        return 1 <= update % self.every <= self.steps and self._ends(update)

    def due(self, update: int) -> bool:
        """Say whether the support changes after this update, the last of a phase."""
        return update % self.every == self.steps and self._ends(update)

    def number(self, update: int) -> int:
        """Return which phase this update belongs to, counted from 1."""
        return (update - 1) // self.every + 1

    def rate(self, update: int) -> float:
        """Return the share of the support to replace after this update, the last of a phase."""
        if update == self.steps:
            return self.first_rate
        progress = update / self.total
        if self.decay == "linear":
            return self.initial_rate * (1 - progress)
        return self.initial_rate * (1 + math.cos(math.pi * progress)) / 2

    def _ends(self, update: int) -> bool:
        """Say whether this update's phase ends before the run does."""
        return (self.number(update) - 1) * self.every + self.steps < self.total


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshSchedule:
    """Change the support after every S updates; never after the last, nothing would train it."""

    every: int  # S
    total: int  # T

    def due(self, update: int) -> bool:
        """Say whether the support changes after this update."""
        return update % self.every == 0 and update < self.total

    def number(self, update: int) -> int:
        """Return which change that is, counted from 1."""
        return update // self.every
