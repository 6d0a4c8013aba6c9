"""The command line that makes a run again."""

import ast
import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spieldose_trainer.config import TrainConfig
from spieldose_trainer.methods import METHODS

ALWAYS_SAID = ("base", "data", "out")
NEVER_SAID = ("resume", "plan")  # the run begins anew, and is made


def command(settings: Mapping[str, str], *, processes: int) -> str:
    """Return `spieldose train …` with every setting that is not the default.

    `settings` are those of `TrainConfig.settings`, `processes` how many shared its batches.
    """
    words, defaults = ["spieldose", "train"], _defaults(settings)
    if processes > 1:
        words = ["torchrun", f"--nproc-per-node={processes}", "--no-python", *words]
    for field in dataclasses.fields(TrainConfig):
        value = settings[field.name]
        if field.name in NEVER_SAID or value == defaults.get(field.name):
            continue
        flag = field.name.replace("_", "-")
        if isinstance(field.default, bool):
            words.append(f"--{flag}" if value == "True" else f"--no-{flag}")
        elif isinstance(field.default, tuple):
            words += [f"--{flag}", *ast.literal_eval(value)]
        elif value.startswith("-"):  # or it would be taken for another option
            words.append(f"--{flag}={value}")
        else:
            words += [f"--{flag}", value]
    return shlex.join(words)


def _defaults(settings: Mapping[str, str]) -> dict[str, str]:
    """Return what a run of this method, selector and updater does where it is not told."""
    parts: dict[str, Any] = {name: settings[name] for name in ("method", "selector", "updater")}
    config = TrainConfig(base="", data=Path(), out=Path("none.safetensors"), **parts)
    method = METHODS[config.method]
    found = config.settings() | {"selector": method.selector, "updater": method.updater}
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    found["method"] = str(fields["method"])
    return {name: value for name, value in found.items() if name not in ALWAYS_SAID}
