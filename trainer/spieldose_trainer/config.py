"""Every setting of a training run; the command line is derived from this one dataclass."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from spieldose_trainer.errors import ConfigError
from spieldose_trainer.methods import (
    DENSITIES,
    LEARNING_RATES,
    METHODS,
    PERIODS,
    Method,
    MethodName,
    SelectorName,
    UpdaterName,
    check_pair,
)
from spieldose_trainer.setting_types import check_types
from spieldose_trainer.shared_name import shared_name
from spieldose_trainer.text import check_line, check_text
from spieldose_trainer.updaters.compression import Compression

LARGEST = (1 << 31) - 1  # of what is counted: products of two such numbers still fit 64 bits
SCORED = ("principal", "fisher", "magnitude")  # the selectors that score every weight at first
SPIEL = ("gradients", "momentum")  # the selectors that replace a falling share of the support


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Hold the settings that a method has values of its own for."""

    selector: SelectorName
    updater: UpdaterName
    density: float
    learning_rate: float
    reselect_every: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Fine-tune a sparse set of weights over a frozen base and write a delta file."""

    # settings that are None by default are the method's own: read them from `choice`

    base: str  # directory or hub name of the base model
    data: Path  # JSONL with `prompt` and `completion`, or with `messages`
    out: Path  # delta file to write, NAME.safetensors; NAME.run beside it holds the report
    over: Path | None = None  # delta file to build on: it stays as it is, and OUT holds both
    method: MethodName = "spiel-ag"  # which weights, and how they move
    selector: SelectorName | None = None  # which weights
    updater: UpdaterName | None = None  # how they move
    density: float | None = None  # share of the target weights that may change: 0.01, zo 0.001
    modules: tuple[str, ...] = ()  # target layers by ends of their names, as q_proj; none: all
    quantised: bool = True  # hold the base in NF4; otherwise unquantised, in the compute dtype
    value_dtype: Literal["float32", "bfloat16"] = "float32"  # of the values in the delta file

    epochs: float = 1.0  # passes over the data; ignored with --max-steps
    max_steps: int | None = None  # number of updates
    batch_size: int = 8  # examples per forward pass
    accumulation: int = 1  # forward passes per update
    max_length: int = 1024  # tokens of an example
    too_long: Literal["refuse", "truncate"] = "refuse"  # what happens to a longer example
    chat_template: Path | None = None  # Jinja file for `messages`, kept in OUT; none: the base's
    packing: bool = False  # several examples in a row of max_length, none of which sees another
    learning_rate: float | None = None  # peak: adamw 1e-3, sm3 2e-3, the others 1e-4
    warmup: float = 0.03  # share of the updates over which the learning rate rises
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # learning rate after warm-up
    weight_decay: float = 0.0  # pulls deltas, not weights, to zero
    clip: float | None = None  # largest norm of the values' gradient
    gradient_checkpointing: bool = False  # recompute activations in backward: slower, leaner

    eval_data: Path | None = None  # held-out examples, in the format of the data
    eval_every: int = 100  # updates from one evaluation to the next; the last is evaluated, too
    exact_match: bool = False  # also generate every held-out completion, and compare
    patience: int | None = None  # evaluations without a lower loss after which the run ends

    reselect_every: int | None = None  # updates between changes of support (S): 20, principal 200
    selection_steps: int = 5  # updates whose gradients decide a reselection (γ)
    first_rate: float = 1.0  # share of the random support that the first reselection replaces
    initial_rate: float = 0.2  # share replaced by the second; falls to 0 at the end (r0)
    rate_schedule: Literal["linear", "cosine"] = "linear"  # how that share falls
    drop: Literal["smallest", "least-changed"] = "smallest"  # |δ|, or since the last reselection
    growth: Literal["gradient", "correlation"] = "gradient"  # correlation: over the factors' norms
    seed_momentum: bool = True  # a grown entry's momentum is its mean gradient so far, otherwise 0
    allocation: Literal["layer", "global"] = "layer"  # compare scores within layers or overall
    fisher_data: Path | None = None  # for Fisher scores: as the data, or lines of `text`
    fisher_samples: int = 64  # examples scored, of fisher_data or else of the data
    rank: int = 128  # of low-rank approximations: principal weights, CESGC
    sgc_variant: Literal["mesgc", "cesgc"] = "mesgc"  # compress gradients, or their projections
    chunk: int = 1024  # weights whose gradient is compressed together (d)
    kept: int = 4  # entries of a chunk whose gradient counts, and that move (s)
    start: Literal["zero", "residual"] = "zero"  # first values: 0, or what NF4 rounded away
    epsilon: float = 1e-3  # size of the zeroth-order perturbation

    seed: int = 0  # of supports, of perturbations and of the order of examples
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda when there is one
    checkpoint_every: int = 100  # updates
    resume: bool = False  # go on from the newest checkpoint beside OUT
    plan: bool = False  # print what the run would train and need, and end
    description: str = ""  # one line about the adapter, kept in its file

    def __post_init__(self) -> None:
        self._take_others()
        self._check_names()
        check_types(self)
        choice = self.choice
        check_pair(choice.selector, choice.updater)
        self._check_values()
        if choice.updater == "compressed-adam":
            _ = self.compression  # raises what is wrong with it
        if choice.selector in SPIEL and choice.reselect_every <= self.selection_steps:
            raise ConfigError(
                f"reselect_every must exceed selection_steps ({self.selection_steps}), "
                f"got {choice.reselect_every}"
            )
        for name in ("exact_match", "patience"):
            if self.eval_data is None and getattr(self, name):
                raise ConfigError(f"{name} needs eval_data, got none")
        if self.start == "residual" and not self.quantised:
            raise ConfigError("start=residual needs a quantised base: another one rounded nothing")
        if self.start == "residual" and self.over is not None:
            raise ConfigError(
                "start=residual needs a base alone: over may have mended its rounding"
            )
        if self.clip is not None and choice.updater in ("zeroth-order", "compressed-adam"):
            raise ConfigError(f"clip limits a gradient that updater {choice.updater} does not use")
        if self.gradient_checkpointing and choice.updater == "zeroth-order":
            raise ConfigError("gradient_checkpointing is for backward: zeroth-order has none")

    def _take_others(self) -> None:
        """Take paths as str, too, the base as Path, and modules as any sequence of names."""
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if Path in (hint, *get_args(hint)) and isinstance(value, str):
                object.__setattr__(self, name, Path(value))
        if isinstance(self.base, Path):
            object.__setattr__(self, "base", str(self.base))
        if isinstance(self.modules, list):
            object.__setattr__(self, "modules", tuple(self.modules))

    def _check_names(self) -> None:
        """Raise ConfigError for a name that is not among those its setting knows."""
        for name, hint in get_type_hints(type(self)).items():
            kinds = (hint, *get_args(hint))  # a Literal, or one or None
            known = [
                word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)
            ]
            value = getattr(self, name)
            if known and value is not None and value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value}")

    def _check_values(self) -> None:
        """Raise ConfigError for a value out of range, or that the delta file cannot keep."""
        for names, is_right, expected in _RULES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not is_right(value):
                    raise ConfigError(f"{name} must be {expected}, got {value}")
        for name, words in self.settings().items():
            check_text(name, words)
        check_line("description", self.description)

    @property
    def folder(self) -> Path:
        """Return the directory of the run: its report, and its checkpoints while it is running."""
        return self.out.with_suffix(".run")

    @property
    def checkpoints(self) -> Path:
        """Return the directory of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def best(self) -> Path:
        """Return the file of the deltas whose held-out loss was lowest so far."""
        return self.folder / "best.safetensors"

    @property
    def choice(self) -> Choice:
        """Return the settings that depend on the method, with its own where none is given."""
        method = METHODS[self.method]
        selector, updater = self.selector or method.selector, self.updater or method.updater
        return Choice(
            selector=selector,
            updater=updater,
            density=DENSITIES[updater] if self.density is None else self.density,
            learning_rate=(
                LEARNING_RATES[updater] if self.learning_rate is None else self.learning_rate
            ),
            reselect_every=self.reselect_every or PERIODS.get(selector, 1),
        )

    @property
    def allocates_globally(self) -> bool:
        """Say whether layers compete for their entries, so that each one's share is found late."""
        return self.allocation == "global" and self.choice.selector in SCORED

    @property
    def compression(self) -> Compression:
        """Return how compressed Adam keeps gradients and moments."""
        return Compression(
            chunk=self.chunk,
            kept=self.kept,
            rank=self.rank if self.sgc_variant == "cesgc" else None,
            seed=self.seed,
        )

    @property
    def method_name(self) -> str:
        """Return what to call the pair of selector and updater: a method's name, or both of them.

        `method` alone may be another pair's, or that of one part.
        """
        choice = self.choice
        pair = Method(choice.selector, choice.updater)
        names = [self.method, *METHODS]
        found = next((name for name in names if METHODS[name] == pair), None)
        return found or f"{choice.selector}+{choice.updater}"

    def settings(self) -> dict[str, str]:
        """Return every setting as text, as it takes effect."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) for name, value in (own | asdict(self.choice)).items()}

    def shared_settings(self) -> dict[str, str]:
        """Return `settings` for a delta file, which travels: of paths the last part alone."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        paths = {name: value.name for name, value in own.items() if isinstance(value, Path)}
        return self.settings() | paths | {"base": shared_name(self.base)}


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("out", lambda path: path.suffix == ".safetensors", "NAME.safetensors"),
    ("density learning_rate", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    ("warmup first_rate initial_rate", lambda x: 0 <= x <= 1, "between 0 and 1"),
    (
        "batch_size accumulation max_length selection_steps checkpoint_every max_steps "
        "eval_every patience reselect_every fisher_samples rank",
        lambda x: 1 <= x <= LARGEST,
        f"between 1 and {LARGEST}",
    ),
    ("epochs", lambda x: 0 < x <= 1e6, "positive and at most a million"),
    ("epsilon", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    ("clip", lambda x: 0 < x <= 1e30, "above 0 and at most 1e30"),
    ("weight_decay", lambda x: 0 <= x <= 1e6, "between 0 and a million"),
    ("seed", lambda x: 0 <= x < 1 << 32, "between 0 and 4294967295"),  # NumPy's
)
