"""Every setting of `spieldose convert`, `extract` and `inspect`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from spieldose_trainer.errors import ConfigError
from spieldose_trainer.text import check_line, check_text

Format = Literal["delta", "shira"]
Allocation = Literal["layer", "global"]
Source = Annotated[Positional[Path], arg(metavar="SOURCE")]
Out = Annotated[Positional[Path], arg(metavar="OUT")]
File = Annotated[Positional[Path], arg(metavar="FILE")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """Turn a sparse PEFT adapter into a delta file, or a delta file into a PEFT adapter.

    Reads SHiRA, Super-Tuning, WaveFT without wavelets, the SFT of the SpIEL authors' fork, and
    delta files; writes delta files and SHiRA. Which of them SOURCE is, it says itself.
    """

    source: Source  # directory of a PEFT adapter, or a delta file
    out: Out  # delta file NAME.safetensors, or a new directory for a PEFT adapter
    base: str  # directory or hub name of the model the adapter was trained on
    format: Format | None = None  # of OUT; when not given, the other kind than SOURCE
    description: str = ""  # one line about an adapter of PEFT's, kept in its delta file

    def __post_init__(self) -> None:
        check_text("base", self.base)
        check_line("description", self.description)
        if not os.path.exists(self.source):  # Path's own raises where a name is too long
            raise ConfigError(
                f"source must be the directory of a PEFT adapter or a delta file, got {self.source}"
            )
        if self.target == "delta":
            check_delta_name(self.out)
            if not self.source.is_dir():
                raise ConfigError(f"format must be shira for a delta file, got {self.format}")
        else:
            check_new_directory(self.out)

    @property
    def target(self) -> Format:
        """Return the format to write."""
        if self.format is not None:
            return self.format
        return "delta" if self.source.is_dir() else "shira"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig:
    """Make a delta file of the largest changes that a full fine-tune made to its base."""

    base: str  # directory or hub name of the base model
    finetuned: str  # directory or hub name of the same model after full fine-tuning
    out: Path  # delta file to write, NAME.safetensors
    density: float = 0.01  # share of the target layers' weights to keep
    allocation: Allocation = "layer"  # that share of every layer, or the largest of all layers
    description: str = ""  # one line about the adapter, kept in its file

    def __post_init__(self) -> None:
        check_text("base", self.base)
        check_text("finetuned", self.finetuned)
        check_line("description", self.description)
        check_delta_name(self.out)
        check_density(self.density)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig:
    """Check a delta file completely and print what it holds."""

    file: File  # delta file
    base: str | None = None  # directory or hub name of a model it must fit
    modules: bool = False  # a line for every module instead of every kind of module


def check_density(density: float) -> None:
    """Raise ConfigError for what is no share of weights."""
    if not 0 < density <= 1:
        raise ConfigError(f"density must be above 0 and at most 1, got {density}")


def check_new_directory(path: Path) -> None:
    """Raise ConfigError for a path at which no directory can be made, or one is already."""
    if path.suffix == ".safetensors" or not path.absolute().name:
        raise ConfigError(f"out must be a directory for a PEFT adapter, got {path}")
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"out must be a new directory or an empty one, got {path}")


def check_delta_name(path: Path) -> None:
    """Raise ConfigError for a path that a delta file cannot have."""
    if path.suffix != ".safetensors":
        raise ConfigError(f"out must end in .safetensors, got {path}")
