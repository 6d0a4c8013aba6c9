"""A training run from its settings to its delta file."""

import hashlib
import math
import os
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from spieldose_kernels.base import Base, load_base, load_tokenizer, pick_compute_dtype, pick_device
from spieldose_kernels.base_spec import fingerprint_checkpoint
from spieldose_kernels.checkpoint import find_checkpoint, read_config, target_shapes
from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import read_delta, write_delta
from spieldose_trainer.batches import Rows, collate_counted
from spieldose_trainer.callbacks import Evaluating, Progress, Recorder, StopOnInterrupt
from spieldose_trainer.checkpoints import (
    DELTA,
    PROCESSES,
    STARTED,
    damage,
    link,
    newest_checkpoint,
    saved_settings,
)
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.data import Examples, collate, read_examples
from spieldose_trainer.dated_template import dated
from spieldose_trainer.errors import CheckpointError, ConfigError, Interrupted
from spieldose_trainer.event_file import EventFile
from spieldose_trainer.files import check_places, lock, make_folders, read_template
from spieldose_trainer.limits import Limits
from spieldose_trainer.loop import Loop, training_arguments
from spieldose_trainer.memory import MemoryTable
from spieldose_trainer.model import SparseModel
from spieldose_trainer.modules import select_modules
from spieldose_trainer.over import read_over, together
from spieldose_trainer.packing import check_separation, collate_packed, pack
from spieldose_trainer.parts import first_support, make_selector, make_updater
from spieldose_trainer.ranks import is_first_rank
from spieldose_trainer.report.write import write_report
from spieldose_trainer.residual import original_weights, start_from_residual
from spieldose_trainer.run_log import RunLog


@dataclass(frozen=True, slots=True)
class Result:
    """Hold what a finished run leaves behind."""

    file: Path
    log: RunLog
    model: SparseModel

    @property
    def losses(self) -> list[float]:
        """Return the loss of every update, those before a resumption included."""
        return [update.loss for update in self.log.updates]


class Trainer:
    """Train an adapter: `Trainer(config).train()`, then `save()`.

    Making one reads the data, then loads the base. What is wrong with settings or data is said
    before that: raises ConfigError, DataError or BaseError.
    """

    def __init__(self, config: TrainConfig, *, base: Base | None = None) -> None:
        self.config = config
        check_places(config)
        self._checkpoint = _checkpoint_to_resume(config)
        resumed = {} if self._checkpoint is None else saved_settings(self._checkpoint)
        started = resumed.get(STARTED) or datetime.now().isoformat()
        directory = find_checkpoint(config.base)
        every_shape = target_shapes(directory)
        shapes = select_modules(every_shape, config.modules)
        tokenizer = load_tokenizer(directory)
        self.over = read_over(config, directory, every_shape)
        inherited = "" if self.over is None else self.over.info.chat_template
        self._template = read_template(config.chat_template) or inherited
        template = self._template or tokenizer.chat_template
        if isinstance(template, str):  # and not several by name
            tokenizer.chat_template = dated(template, datetime.fromisoformat(started))
        read = partial(_read, config, tokenizer, Limits.of(read_config(directory)))
        self.examples = read(config.data)
        self.held_out = read(config.eval_data)
        texts = read(config.fisher_data, or_text=True) or self.examples
        originals = original_weights(directory, shapes) if config.start == "residual" else None
        make_folders(config)
        self._arguments = training_arguments(config)
        if is_first_rank():
            weakref.finalize(self, os.close, lock(config))
        self._settings = config.settings() | {
            "config.json": _digest(directory / "config.json"),
            "data": _described(self.examples),
            "eval_data": _described(self.held_out),
            "over": "None" if config.over is None else _digest(config.over),
            PROCESSES: str(self._arguments.world_size),
            STARTED: started,
        }
        if self._checkpoint is not None:
            _check_same_run(resumed, self._settings)
        if base is not None:
            _check_base(base, config, directory)
        self.base = base or _load(config)
        if self._checkpoint is None:
            support = first_support(
                config,
                self.base,
                shapes=shapes,
                texts=texts[: config.fisher_samples],
                over=self.over,
            )
            self.model = SparseModel(self.base, support, over=self.over)
            if originals is not None:
                start_from_residual(self.model, originals)
        else:
            saved = read_delta((self._checkpoint / DELTA).read_bytes(), self.base.spec)
            self.model = SparseModel.of(self.base, saved, over=self.over)
        self.memory: MemoryTable | None = None  # known when the run is saved
        self._stop = StopOnInterrupt()
        self._loop = self._assemble()

    def train(self) -> Result:
        """Train to the end; raises Interrupted after Ctrl-C, NonFiniteLoss or CheckpointError."""
        self.model.attach()
        with self._stop.listening():
            self._loop.run(self._checkpoint)
        step, last = self._loop.state.global_step, self.updates
        if self._stop.requested and step < last:
            raise Interrupted(
                f"stopped after update {step} of {last}; "
                "the same command with --resume goes on from there"
            )
        return Result(self.config.out, self._loop.recorder.log, self.model)

    @property
    def updates(self) -> int:
        """Return how many updates the run has, if nothing ends it early."""
        return int(self._loop.args.max_steps)

    def adapter(self) -> Adapter:
        """Return the trained deltas: those of the lowest held-out loss, if there was any.

        Those of the adapter that the run was built over are in them. Raises CheckpointError if the
        best ones cannot be read: of several processes only the first may ask after `save`.
        """
        return self._with_over(self._trained())

    def _with_over(self, trained: Adapter) -> Adapter:
        return together(trained, self.over, dtype=getattr(torch, self.config.value_dtype))

    def _trained(self) -> Adapter:
        """Return the run's own deltas, with values as they were trained."""
        config = self.config
        self._loop.load_best()
        return self.model.adapter(
            method=config.method_name,
            description=config.description,
            settings=config.shared_settings(),
            chat_template=self._template,
        )

    def save(self) -> Path:
        """Write the delta file and its report, drop the checkpoints; return the file's path.

        Raises CheckpointError, and keeps the checkpoints, if it cannot be written.
        """
        config = self.config
        if is_first_rank():
            try:
                trained = self._trained()
                write_delta(config.out, self._with_over(trained))
                self._report(trained)
            except OSError as error:
                raise CheckpointError(
                    f"expected to write {config.out} and its report, got: {error}; "
                    "--resume tries it again"
                ) from error
            shutil.rmtree(config.checkpoints, ignore_errors=True)
            config.best.unlink(missing_ok=True)
        return config.out

    def _report(self, adapter: Adapter) -> None:
        """Put the delta file and the run's report into the run's folder."""
        config, recorder = self.config, self._loop.recorder
        link(config.out, config.folder / config.out.name)
        if recorder.memory is None:  # not trained
            return
        self.memory = recorder.memory.with_peak(self.base.model.device)
        write_report(
            config.folder,
            adapter=adapter,
            log=recorder.log,
            born={name: layer.born.cpu() for name, layer in self.model.layers.items()},
            settings=config.settings(),
            processes=self._arguments.world_size,
            memory=self.memory,
        )

    def _assemble(self) -> Loop:
        """Put model, updater, selector and callbacks under a Hugging Face Trainer."""
        config = self.config
        pad = self.base.tokenizer.eos_token_id  # is masked, and surely in the embedding
        rows: list[Any] = list(self.examples)
        if config.packing:
            check_separation(self.base.model)
            rows = list(pack(self.examples, max_length=self.examples.limit, seed=config.seed))
        arguments = self._arguments
        batch = config.batch_size * arguments.world_size
        per_epoch = math.ceil(len(rows) / (batch * config.accumulation))
        updates = config.max_steps or math.ceil(config.epochs * per_epoch)
        arguments.max_steps = updates
        # the first update of a warm-up has a learning rate of 0: one must be left
        arguments.warmup_steps = min(math.ceil(config.warmup * updates), updates - 1)
        updater = make_updater(config, self.model.layers)
        selector = make_selector(
            config, self.model, updater=updater, updates=updates, over=self.over
        )
        recorder = Recorder(selector, layers=self.model.layers, method=config.method_name)
        callbacks: list[Any] = [recorder, Progress(recorder.log), self._stop]
        if is_first_rank():
            callbacks.append(TensorBoardCallback(EventFile(config.folder / "tensorboard")))
        if self.held_out:
            callbacks.append(Evaluating(config.eval_every))
        loop = Loop(
            model=self.model,
            updater=updater,
            recorder=recorder,
            held_out=self.held_out,
            config=config,
            settings=self._settings,
            pad=pad,
            args=arguments,
            train_dataset=Rows(rows, batch=batch if arguments.world_size > 1 else 1),
            data_collator=partial(
                collate_counted, collate=collate_packed if config.packing else collate, pad=pad
            ),
            callbacks=callbacks,
        )
        loop.remove_callback(PrinterCallback)  # the progress bar shows what it would print
        return loop


def train(config: TrainConfig) -> Result:
    """Train an adapter and write its delta file."""
    trainer = Trainer(config)
    result = trainer.train()
    trainer.save()
    return result


def _load(config: TrainConfig) -> Base:
    device = pick_device(config.device)
    dtype = pick_compute_dtype(config.compute_dtype, device)
    return load_base(
        config.base, device=device, compute_dtype=dtype, fused=False, quantised=config.quantised
    )


def _check_base(base: Base, config: TrainConfig, directory: Path) -> None:
    """Raise ConfigError if a base that was given is not the one that the settings name."""
    expected, got = fingerprint_checkpoint(directory), base.spec.fingerprint
    if got != expected:
        raise ConfigError(
            f"base: expected {config.base}, of fingerprint {expected[:12]}, got {base.spec.name}, "
            f"of {got[:12]}"
        )
    quantised = any(isinstance(layer, Linear4bit) for layer in base.layers.values())
    if quantised != config.quantised:
        raise ConfigError(f"base: expected one with quantised={config.quantised}, got {quantised}")


def _read(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    path: Path | None,
    *,
    or_text: bool = False,
) -> Examples:
    if path is None:
        return Examples()
    return read_examples(
        path,
        tokenizer,
        max_length=config.max_length,
        too_long=config.too_long,
        limits=limits,
        or_text=or_text,
    )


def _checkpoint_to_resume(config: TrainConfig) -> Path | None:
    found = newest_checkpoint(config.checkpoints)
    if config.resume and found is None:
        spoilt = sorted(config.checkpoints.glob("checkpoint-*"))
        got = [f"{path.name} without a whole {damage(path)}" for path in spoilt] or ["none"]
        raise ConfigError(
            f"expected a checkpoint in {config.checkpoints} to resume from, got {', '.join(got)}"
        )
    if found is not None and not config.resume:
        raise ConfigError(f"{found} holds an unfinished run: pass --resume, or delete it")
    return found


def _check_same_run(saved: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """Raise ConfigError if these are not the settings that a checkpoint was trained with."""
    for name, value in settings.items():
        if name not in _MAY_CHANGE and saved.get(name) != value:
            raise ConfigError(
                f"{name}: expected {saved.get(name)} as in the run to resume, got {value}"
            )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _described(examples: Examples) -> str:
    """Say what tells these examples from others, wherever their file lies."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.tokens}{example.counted}".encode())
    return f"{len(examples)} examples ({digest.hexdigest()[:12]})"


# settings that do not change what a run computes; what a chat template does shows in the data
_MAY_CHANGE = {"resume", "checkpoint_every", "description", "out", "base", "chat_template", STARTED}
