"""What can be wrong with a training run.

SpieldoseError
└── TrainerError
    ├── ConfigError     a setting is out of range
    ├── DataError       a line of the data cannot be used
    ├── NonFiniteLoss   the loss is infinite or not a number; the last checkpoint is good
    ├── CheckpointError a checkpoint or delta file cannot be written, the one before it is intact;
    │                   or the best deltas cannot be read again
    ├── Interrupted     stopped on request; a checkpoint is there to resume from
    └── ConversionError a foreign adapter cannot become a delta, or the other way round
"""

from spieldose_kernels.errors import SpieldoseError


class TrainerError(SpieldoseError):
    """A training run cannot go on."""


class ConfigError(TrainerError):
    """A setting is out of range."""


class DataError(TrainerError):
    """A line of the training data cannot be used."""


class NonFiniteLoss(TrainerError):
    """The loss is infinite or not a number."""


class CheckpointError(TrainerError):
    """A checkpoint or a delta file cannot be written, or not be read again."""


class Interrupted(TrainerError):
    """The run stopped on request and left a checkpoint."""


class ConversionError(TrainerError):
    """A foreign adapter or checkpoint cannot become a delta, or a delta a foreign adapter."""
