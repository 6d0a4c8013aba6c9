"""Fine-tune a sparse set of a model's weights and write it as a small delta file.

In a notebook::

    config = TrainConfig(base=..., data=Path(...), out=Path("mine.safetensors"))
    trainer = Trainer(config)
    result = trainer.train()
    trainer.save()
"""

from typing import TYPE_CHECKING, Any

from spieldose_trainer.config import TrainConfig

if TYPE_CHECKING:
    from spieldose_trainer.trainer import Result, Trainer, train

__all__ = ["Result", "TrainConfig", "Trainer", "train"]


def __getattr__(name: str) -> Any:
    """Import what needs PyTorch when it is asked for: `spieldose train --help` does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from spieldose_trainer import trainer

    return getattr(trainer, name)
