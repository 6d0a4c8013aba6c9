"""Every setting of a training run; the command line is derived from this one dataclass."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spieldose_trainer.errors import ConfigError

Method = Literal["spiel-ag"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Fine-tune a sparse set of weights over a frozen 4-bit base and write a delta file."""

    base: str  # directory or hub name of the base model
    data: Path  # JSONL with `prompt` and `completion`, or with `messages`
    out: Path  # delta file to write, NAME.safetensors
    method: Method = "spiel-ag"  # which weights, and how they move
    density: float = 0.01  # share of the target layers' weights that may change

    epochs: float = 1.0  # passes over the data; ignored with --max-steps
    max_steps: int | None = None  # number of updates
    batch_size: int = 8  # examples per forward pass
    accumulation: int = 1  # forward passes per update
    max_length: int = 1024  # tokens; longer examples are refused
    learning_rate: float = 1e-3  # peak; the paper's grid for 7B is 3e-6 to 1e-4
    warmup: float = 0.03  # share of the updates over which the learning rate rises
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # learning rate after warm-up
    weight_decay: float = 0.0  # pulls deltas, not weights, to zero

    reselect_every: int = 20  # updates from one reselection to the next (S)
    selection_steps: int = 5  # updates whose gradients decide a reselection (γ)
    initial_rate: float = (
        0.2  # share replaced by the second reselection; falls to 0 at the end (r0)
    )
    rate_schedule: Literal["linear", "cosine"] = "linear"  # how that share falls

    seed: int = 0  # of the first support and of the order of examples
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda when there is one
    checkpoint_every: int = 100  # updates
    resume: bool = False  # go on from the newest checkpoint beside OUT
    description: str = ""  # one line about the adapter, kept in its file

    def __post_init__(self) -> None:
        if self.out.suffix != ".safetensors":
            raise ConfigError(f"out must end in .safetensors, got {self.out}")
        for name in ("density", "learning_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} must be above 0 and at most 1, got {getattr(self, name)}"
                )
        for name in ("warmup", "initial_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in (
            "batch_size",
            "accumulation",
            "max_length",
            "selection_steps",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.epochs > 0 or (self.max_steps is not None and self.max_steps < 1):
            raise ConfigError(
                f"epochs and max_steps must be positive, got {self.epochs}, {self.max_steps}"
            )
        if not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.reselect_every <= self.selection_steps:
            raise ConfigError(
                f"reselect_every must exceed selection_steps ({self.selection_steps}), "
                f"got {self.reselect_every}"
            )

    @property
    def checkpoints(self) -> Path:
        """Return the directory of this run's checkpoints."""
        return self.out.with_name(f"{self.out.stem}.checkpoints")
