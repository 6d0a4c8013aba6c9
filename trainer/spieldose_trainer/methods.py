"""The methods by name: a selector says which weights, an updater how they move."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from spieldose_trainer.errors import ConfigError

SelectorName = Literal[
    "gradients", "momentum", "principal", "largest", "fisher", "magnitude", "row-topk", "random"
]
UpdaterName = Literal["adamw", "sm3", "compressed-adam", "zeroth-order"]
MethodName = Literal[
    "spiel-ag", "spiel-ma", "sgc", "zo", "lift", "fisher", "magnitude", "row-topk", "random"
]


@dataclass(frozen=True, slots=True)
class Method:
    """Pair a selector with an updater."""

    selector: SelectorName
    updater: UpdaterName


METHODS: Final[dict[MethodName, Method]] = {
    "spiel-ag": Method("gradients", "adamw"),
    "spiel-ma": Method("momentum", "sm3"),
    "sgc": Method("largest", "compressed-adam"),
    "zo": Method("fisher", "zeroth-order"),
    "lift": Method("principal", "adamw"),
    "fisher": Method("fisher", "adamw"),
    "magnitude": Method("magnitude", "adamw"),
    "row-topk": Method("row-topk", "adamw"),
    "random": Method("random", "adamw"),
}

# what a run uses where it is not told otherwise
LEARNING_RATES: Final[dict[UpdaterName, float]] = {
    "adamw": 1e-3,
    "sm3": 2e-3,
    "compressed-adam": 1e-4,
    "zeroth-order": 1e-4,
}
DENSITIES: Final[dict[UpdaterName, float]] = {  # zeroth order: arXiv 2406.02913
    "adamw": 0.01,
    "sm3": 0.01,
    "compressed-adam": 0.01,
    "zeroth-order": 0.001,
}
PERIODS: Final[dict[SelectorName, int]] = {  # updates from one change of support to the next
    "gradients": 20,  # the SpIEL authors' code
    "momentum": 20,
    "principal": 200,  # arXiv 2506.00772: every few hundred
}

_NEEDS: Final[dict[SelectorName, tuple[tuple[UpdaterName, ...], str]]] = {
    "gradients": (("adamw", "sm3"), "it accumulates gradients, which no other updater leaves it"),
    "momentum": (("sm3",), "it reads SM3's row and column accumulators"),
    "largest": (("compressed-adam",), "it takes up the changes compressed Adam recovers"),
}


def check_pair(selector: SelectorName, updater: UpdaterName) -> None:
    """Raise ConfigError unless this selector and this updater work together."""
    able, reason = _NEEDS.get(selector, (get_args(UpdaterName), ""))
    if updater not in able:
        raise ConfigError(
            f"selector {selector} expects updater {' or '.join(able)}, got {updater}: {reason}"
        )
    if updater == "compressed-adam" and selector != "largest":
        raise ConfigError(
            f"updater compressed-adam expects selector largest, got {selector}: "
            "its changes touch weights outside any support chosen beforehand"
        )
