"""What a run would train and need."""

import math
from dataclasses import dataclass

from spieldose_trainer.methods import UpdaterName
from spieldose_trainer.selectors.first_support import Allocation
from spieldose_trainer.sizes import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class KindPlan:
    """Hold what would be trained in all layers of one kind and shape."""

    kind: str
    shape: Shape
    layers: int
    entries: int  # over all of them

    @property
    def density(self) -> float:
        """Return entries over weights."""
        return self.entries / (self.layers * math.prod(self.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Hold what a run would train, and what it would need in bytes."""

    kinds: tuple[KindPlan, ...]
    updater: UpdaterName
    batch_size: int
    length: int
    allocation: Allocation
    file: int
    base: int
    value: int
    position: int
    gradient: int
    moments: int
    selection: int  # what the selector gathers during updates
    step: int | None  # estimate: activations, logits, temporaries of a pass; None: not known
    before: int  # estimate: what choosing the first support takes, before there is an update
    libraries: int | None  # the process without a model; None on CUDA, where it does not count
    retention: float  # estimate: what the process holds over what lives

    @property
    def entries(self) -> int:
        """Return the number of trainable parameters."""
        return sum(kind.entries for kind in self.kinds)

    @property
    def density(self) -> float:
        """Return entries over weights of the layers to be trained."""
        return self.entries / sum(kind.layers * math.prod(kind.shape) for kind in self.kinds)

    @property
    def live(self) -> int:
        """Return the most that would be alive at once: tensors and, on the CPU, libraries.

        Without the step where that is not known.
        """
        always = self.base + self.value + self.position + (self.libraries or 0)
        update = self.gradient + self.moments + self.selection + (self.step or 0)
        return always + max(update, self.before)

    @property
    def peak(self) -> int:
        """Return the expected peak: of the process on the CPU, of allocated memory on CUDA."""
        return int(self.live * self.retention)
