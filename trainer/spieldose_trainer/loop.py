"""A training run from configuration to delta file, on Hugging Face Trainer."""

import dataclasses
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from spieldose_kernels.base import load_base, pick_compute_dtype, pick_device
from spieldose_kernels.delta_file import write_delta
from spieldose_trainer.callbacks import Progress, Reselection, StopOnInterrupt
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.data import Example, collate, read_examples
from spieldose_trainer.errors import ConfigError, Interrupted
from spieldose_trainer.model import SparseModel
from spieldose_trainer.schedule import ReselectionSchedule
from spieldose_trainer.selector import AccumulatedGradients
from spieldose_trainer.updater import SparseAdamW


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """Hold what a finished run leaves behind."""

    file: Path
    losses: list[float]  # per update of this process
    model: SparseModel


def train(config: TrainConfig) -> Result:
    """Train an adapter and write its delta file.

    Raises ConfigError, DataError or BaseError before the first update, Interrupted after Ctrl-C.
    """
    checkpoint = _checkpoint_to_resume(config)
    device = pick_device(config.device)
    dtype = pick_compute_dtype(config.compute_dtype, device)
    base = load_base(config.base, device=device, compute_dtype=dtype, fused=False)
    examples = read_examples(config.data, base.tokenizer, max_length=config.max_length)
    model = SparseModel(base, density=config.density, seed=config.seed)
    trainer, stop, progress = build(model, examples, config)
    with stop.listening():
        trainer.run(checkpoint)
    step = trainer.state.global_step
    if stop.requested and step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped after update {step} of {trainer.state.max_steps}; "
            "the same command with --resume goes on from there"
        )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        field.name: str(getattr(config, field.name)) for field in dataclasses.fields(config)
    }
    adapter = model.adapter(method=config.method, description=config.description, settings=settings)
    if trainer.is_world_process_zero():
        write_delta(config.out, adapter)
        shutil.rmtree(config.checkpoints, ignore_errors=True)
    return Result(config.out, progress.losses, model)


def build(
    model: SparseModel, examples: Sequence[Example], config: TrainConfig
) -> tuple["_SparseTrainer", StopOnInterrupt, Progress]:
    """Put updater, selector and callbacks under a Hugging Face Trainer."""
    arguments = _arguments(config)
    per_update = config.batch_size * config.accumulation * arguments.world_size
    updates = config.max_steps or math.ceil(config.epochs * math.ceil(len(examples) / per_update))
    arguments.max_steps = updates
    arguments.warmup_steps = math.ceil(config.warmup * updates)
    parameters = [layer.values for layer in model.layers.values()]
    updater = SparseAdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = ReselectionSchedule(
        every=config.reselect_every,
        steps=config.selection_steps,
        initial_rate=config.initial_rate,
        decay=config.rate_schedule,
        total=updates,
    )
    selector = AccumulatedGradients(
        model.layers, model.base.spec.shapes, updater=updater, schedule=schedule
    )
    reselection, stop = Reselection(selector), StopOnInterrupt()
    progress = Progress(reselection)
    tokenizer = model.base.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    trainer = _SparseTrainer(
        model=model,
        args=arguments,
        train_dataset=list(examples),
        data_collator=partial(collate, pad=pad),
        optimizers=(updater, None),
        callbacks=[reselection, progress, stop],
        reselection=reselection,
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar shows what it would print
    return trainer, stop, progress


class _SparseTrainer(Trainer):
    """Checkpoint the support and its values instead of the frozen base."""

    def __init__(self, *, reselection: Reselection, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.reselection = reselection

    def run(self, checkpoint: str | None) -> None:
        """Train to the last update, from a checkpoint if there is one."""
        if checkpoint is not None:
            saved = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            if saved.global_step >= self.args.max_steps:
                self._load_from_checkpoint(checkpoint)  # `train` would make one update more
                return
        self.train(resume_from_checkpoint=checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert isinstance(self.model, SparseModel)
        self.model.save_checkpoint(Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert isinstance(self.model, SparseModel)
        self.model.load_checkpoint(Path(resume_from_checkpoint))
        self.reselection.load(Path(resume_from_checkpoint))


def _arguments(config: TrainConfig) -> TrainingArguments:
    on_cpu = pick_device(config.device).type == "cpu"
    scheduler = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return TrainingArguments(
        output_dir=str(config.checkpoints),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=scheduler,
        max_grad_norm=0.0,  # the selector's gradients are not clipped, so the updater's are not
        logging_steps=1,
        save_steps=config.checkpoint_every,
        save_total_limit=1,
        seed=config.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
    )


def _checkpoint_to_resume(config: TrainConfig) -> str | None:
    found = get_last_checkpoint(str(config.checkpoints)) if config.checkpoints.is_dir() else None
    if config.resume and found is None:
        raise ConfigError(f"expected a checkpoint in {config.checkpoints} to resume from, got none")
    if found is not None and not config.resume:
        raise ConfigError(f"{found} holds an unfinished run: pass --resume, or delete it")
    return found
