"""Every setting of `spieldose repair`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from spieldose_trainer.config import LARGEST
from spieldose_trainer.errors import ConfigError
from spieldose_trainer.interop.config import check_delta_name, check_density
from spieldose_trainer.text import check_line, check_text

METHOD: Final = "repair"  # in the delta file, where a training method goes


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairConfig:
    """Make a delta file that gives a base back most of what its rounding to NF4 took, untrained."""

    base: str  # directory or hub name of the base model, not quantised
    data: Path  # JSONL with `prompt` and `completion`, `messages`, or `text`: what the base reads
    out: Path  # delta file to write, NAME.safetensors
    density: float = 0.002  # share of every row of the target layers' weights that is corrected
    samples: int = 64  # examples of the data
    max_length: int = 1024  # tokens of an example; a longer one is cut
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda when there is one
    description: str = ""  # one line about the adapter, kept in its file

    def __post_init__(self) -> None:
        check_text("base", self.base)
        check_line("description", self.description)
        check_delta_name(self.out)
        check_density(self.density)
        for name in ("samples", "max_length"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise ConfigError(
                    f"{name} must be between 1 and {LARGEST}, got {getattr(self, name)}"
                )
