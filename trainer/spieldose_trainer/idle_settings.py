"""The settings of a run that nothing in it reads."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Final

from spieldose_trainer.config import SCORED, SPIEL, TrainConfig

_CHANGING: Final = (*SPIEL, "principal")  # selectors whose support changes after some updates

# settings, what of the run decides whether they are read, and which of its values read them
_RULES: Final[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
    ("reselect_every", "selector", _CHANGING),
    ("selection_steps first_rate initial_rate rate_schedule drop", "selector", SPIEL),
    ("growth seed_momentum", "selector", ("gradients",)),
    ("seed_momentum", "updater", ("adamw",)),
    ("allocation", "selector", SCORED),
    ("fisher_data fisher_samples", "selector", ("fisher",)),
    ("rank", "selector", ("principal", "largest")),
    ("rank", "sgc_variant", ("cesgc",)),
    ("sgc_variant chunk kept", "updater", ("compressed-adam",)),
    ("epsilon", "updater", ("zeroth-order",)),
)


def idle_settings(config: TrainConfig, *, updates: int | None) -> list[str]:
    """Say in a line each which settings differ from their defaults without a lasting effect.

    And if a run of so many updates, where that is known, is too short for its selector.
    """
    choice, changed = config.choice, set(_changed(config))
    run: dict[str, str] = {"selector": choice.selector, "updater": choice.updater}
    if choice.updater == "compressed-adam":
        run["sgc_variant"] = config.sgc_variant
    found = {
        name: f"{part} {' or '.join(readers)} would read it, {run[part]} does not"
        for names, part, readers in _RULES
        for name in names.split()
        if name in changed and part in run and run[part] not in readers
    }
    if "epochs" in changed and config.max_steps is not None:
        found["epochs"] = "max_steps says how long the run is"
    if "eval_every" in changed and config.eval_data is None:
        found["eval_every"] = "there is no eval_data"
    lines = [f"{name} has no effect: {reason}" for name, reason in found.items()]
    first = config.selection_steps if choice.selector in SPIEL else choice.reselect_every
    if choice.selector in _CHANGING and updates is not None and updates <= first:
        lines.append(
            f"selector {choice.selector} keeps its first support: it changes after update {first}, "
            f"and there are {updates}"
        )
    if config.start == "residual" and choice.selector in _CHANGING:
        lines.append(
            f"start=residual does not last: selector {choice.selector} replaces entries, and new "
            "ones start at 0"
        )
    if config.start == "residual" and choice.selector == "largest":
        lines.append(
            "start=residual keeps the support nearly as it is: selector largest evicts the "
            "smallest |δ|, and what updates add is far smaller than residuals"
        )
    return lines


def _changed(config: TrainConfig) -> Iterator[str]:
    for field in fields(config):
        if getattr(config, field.name) != field.default:
            yield field.name
