"""Hugging Face's Trainer, taught what a sparse run needs: its checkpoints, its steps, its looks."""

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from spieldose_kernels.base import pick_device
from spieldose_kernels.delta_file import read_delta, write_delta
from spieldose_kernels.errors import DeltaError
from spieldose_trainer.batches import BlanksLast, Rows
from spieldose_trainer.callbacks import Recorder
from spieldose_trainer.checkpoints import DELTA, RUN_STATE, keep_only, link, seal
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.data import Example
from spieldose_trainer.errors import CheckpointError, NonFiniteLoss
from spieldose_trainer.evaluation import evaluate, evaluating
from spieldose_trainer.memory import MemoryTable
from spieldose_trainer.model import SparseModel
from spieldose_trainer.ranks import mean_over_ranks
from spieldose_trainer.run_log import Evaluation
from spieldose_trainer.updaters.updater import Updater
from spieldose_trainer.updaters.zeroth_order import ZerothOrder


class Loop(HuggingFaceTrainer):
    """Checkpoint the support and its values instead of the frozen base, and judge by them."""

    def __init__(
        self,
        *,
        model: SparseModel,
        updater: Updater,
        recorder: Recorder,
        held_out: Sequence[Example],
        config: TrainConfig,
        settings: Mapping[str, str],
        pad: int,
        **arguments: Any,
    ) -> None:
        """Take, beside the parts of a run, the settings that its checkpoints are to name."""
        super().__init__(model=model, optimizers=(updater, None), **arguments)
        self.sparse_model = model
        self.updater = updater
        self.recorder = recorder
        self._held_out = held_out
        self._config = config
        self._settings = settings
        self._pad = pad
        self._best_born: dict[str, torch.Tensor] = {}  # of the best deltas, on the CPU
        self._loaded: int | None = None  # update whose deltas `load_best` took over

    def run(self, checkpoint: Path | None) -> None:
        """Train to the last update, from a checkpoint if there is one."""
        if checkpoint is None:
            set_seed(self.args.seed)  # for dropout: others may have drawn since this was made
            if self._held_out:
                self.evaluate()  # what there is to improve on
            self.train()
            return
        self._load_run_state(checkpoint)
        saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        over = saved.global_step == self.args.max_steps or self._out_of_patience()
        if not over:  # else `train` would make one update more
            self.train(resume_from_checkpoint=str(checkpoint))
        else:
            self.state = saved

    def get_train_dataloader(self) -> Any:
        """Return the batches of this process, as many and as large as every other's."""
        loader: Any = super().get_train_dataloader()
        assert isinstance(self.train_dataset, Rows)
        loader.set_sampler(BlanksLast(self.train_dataset, seed=self.args.seed))
        return loader

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Make one forward pass and its backward pass, or two forward passes in zeroth order."""
        self.recorder.count(inputs.pop("tokens"))
        if isinstance(self.updater, ZerothOrder):
            loss = self._two_forward_passes(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise NonFiniteLoss(
                f"update {self.state.global_step + 1}: expected a finite loss, got {float(loss)}; "
                "try a lower learning_rate"
            )
        return loss

    def _two_forward_passes(self, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """Compare both losses without dropout, as MeZO does: it would differ between them."""
        assert isinstance(self.updater, ZerothOrder)
        inputs = self._prepare_inputs(inputs)
        losses = torch.zeros(2, dtype=torch.float64)
        for i, sign in enumerate((1, -1)):
            with self.updater.perturbed(sign), evaluating(model):
                loss: Any = self.compute_loss(
                    model, dict(inputs), num_items_in_batch=num_items_in_batch
                )
            losses[i] = loss
        if num_items_in_batch is None:
            losses /= self.current_gradient_accumulation_steps
        self.updater.observe(*losses.tolist())
        return losses.mean().float().to(self.args.device)

    def _clip_grad_norm(self, model: Any) -> Any:
        clip: Any = super()._clip_grad_norm
        norm = clip(model)
        # as torch.nn.utils.clip_grad_norm_ has just scaled the values' own
        factor = min(1.0, self.args.max_grad_norm / (float(norm) + 1e-6))
        self.recorder.selector.scale_update(factor)
        return norm

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out examples, remember the best deltas, and end the run in time."""
        found = evaluate(
            self.sparse_model.model,
            self._held_out,
            tokenizer=self.sparse_model.base.tokenizer,
            pad=self._pad,
            batch_size=self._config.batch_size,
            exact_match=self._config.exact_match,
        )
        update = self.state.global_step
        # one number for all processes, which decides the same in each
        loss = float(mean_over_ranks(torch.tensor(found.loss, dtype=torch.float64)))
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"update {update}: expected a finite held-out loss, got {loss}")
        look = Evaluation(update=update, loss=loss, exact_match=found.exact_match)
        self.recorder.log.append(look)
        if self.recorder.log.best is look:
            layers = self.sparse_model.layers.items()
            self._best_born = {name: layer.born.to("cpu", copy=True) for name, layer in layers}
            if self.args.should_save:
                self._write_best()
        metrics = {"eval_loss": loss}
        if found.exact_match is not None:
            metrics["eval_exact_match"] = found.exact_match
        self.log(dict(metrics))
        self.control.should_evaluate = False  # or it would be done again at the end of an epoch
        if self._out_of_patience():
            self.control.should_training_stop = True
            self.control.should_save = True  # as after the last update, should `save` fail
        return metrics

    def _out_of_patience(self) -> bool:
        """Say whether too many evaluations in a row brought no lower loss."""
        losses = [look.loss for look in self.recorder.log.evaluations]
        if self._config.patience is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self._config.patience

    def _write_best(self) -> None:
        try:
            write_delta(self._config.best, self.sparse_model.adapter(method="checkpoint"))
        except OSError as error:
            raise CheckpointError(
                f"update {self.state.global_step}: expected to write {self._config.best}, "
                f"got: {error}; the last checkpoint is left as it was"
            ) from error

    def load_best(self) -> None:
        """Take over the deltas whose held-out loss was lowest, if any was measured.

        Raises CheckpointError if they are no longer there.
        """
        best = self.recorder.log.best
        if best is None or best.update in (self.state.global_step, self._loaded):
            return
        try:
            saved = read_delta(self._config.best.read_bytes(), self.sparse_model.base.spec)
        except (OSError, DeltaError) as error:
            raise CheckpointError(
                f"{self._config.best}: expected the deltas of update {best.update}, whose held-out "
                f"loss was lowest, got: {error}"
            ) from error
        self.sparse_model.load(saved)
        for name, born in self._best_born.items():
            self.sparse_model.layers[name].born.copy_(born)
        self._loaded = best.update

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        update = self.state.global_step
        if not self.sparse_model.is_finite():
            raise NonFiniteLoss(
                f"update {update}: expected finite values, got NaN or infinity; "
                "try a lower learning_rate"
            )
        checkpoint = self._config.checkpoints / f"checkpoint-{update}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes a file of its own
            if self.args.should_save:
                if self.recorder.log.best is not None:
                    link(self._config.best, checkpoint / self._config.best.name)
                seal(checkpoint)
                keep_only(checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            # PyTorch does not say that a disk is full
            free = shutil.disk_usage(self._config.folder).free
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise CheckpointError(
                f"update {update}: expected to write a checkpoint to "
                f"{self._config.checkpoints}, got: {str(error).splitlines()[0]}, "
                f"{free >> 20} MB free on the disk; the one before it is left as it was"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        adapter = self.sparse_model.adapter(method="checkpoint", settings=self._settings)
        write_delta(directory / DELTA, adapter)
        memory, device = self.recorder.memory, self.sparse_model.base.model.device
        state = {
            "selector": self.recorder.selector.state_dict(),
            "log": self.recorder.log.state_dict(),
            "memory": asdict(memory.with_peak(device)) if memory else None,
            "born": {name: layer.born for name, layer in self.sparse_model.layers.items()},
            "best_born": self._best_born,
        }
        torch.save(state, directory / RUN_STATE)

    def _load_run_state(self, directory: Path) -> None:
        state = torch.load(
            directory / RUN_STATE,
            map_location=self.sparse_model.base.model.device,
            weights_only=True,
        )
        self.recorder.selector.load_state_dict(state["selector"])
        self.recorder.log.load_state_dict(state["log"])
        self.recorder.memory = MemoryTable.of(state["memory"]) if state["memory"] else None
        for name, layer in self.sparse_model.layers.items():
            layer.born.copy_(state["born"][name])
        self._best_born = {name: born.cpu() for name, born in state["best_born"].items()}
        best = directory / self._config.best.name
        if self.args.should_save and best.exists():
            link(best, self._config.best)  # a later one is of updates to come again

    def _prepare_for_training(self, *arguments: Any, **settings: Any) -> Any:
        with warnings.catch_warnings():  # accelerate 1.15 does not know the setting's new name
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            prepare: Any = super()._prepare_for_training
            return prepare(*arguments, **settings)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the model was made from the checkpoint's delta."""


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Return Hugging Face's settings of a run, apart from its number of updates.

    Under torchrun or `accelerate launch` this joins the other processes and picks the device.
    """
    on_cpu = pick_device(config.device).type == "cpu"
    scheduler = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    arguments = TrainingArguments(
        output_dir=str(config.checkpoints),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.choice.learning_rate,
        lr_scheduler_type=scheduler,
        max_grad_norm=config.clip or 0.0,  # 0: never
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.checkpoint_every,
        save_total_limit=None,  # `keep_only` removes them, when the newest is safe
        average_tokens_across_devices=True,  # an update's loss is the mean over all its tokens
        seed=config.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # all processes change their support alike
    )
    # else several GPUs seen by one process would each get a copy of the model: nn.DataParallel
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
