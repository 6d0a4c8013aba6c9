"""Hugging Face's Trainer, taught what a sparse run needs: its checkpoints, its steps, its looks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from spieldose_kernels.base import pick_device
from spieldose_kernels.delta_file import write_delta
from spieldose_trainer.callbacks import Recorder
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.data import Example
from spieldose_trainer.errors import CheckpointError, NonFiniteLoss
from spieldose_trainer.evaluation import evaluate
from spieldose_trainer.model import SparseModel
from spieldose_trainer.run_log import Evaluation
from spieldose_trainer.updaters.updater import Updater
from spieldose_trainer.updaters.zeroth_order import ZerothOrder

DELTA = "delta.safetensors"  # in a checkpoint, beside what Hugging Face's Trainer writes there
RUN_STATE = "run.pt"


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
        pad: int,
        **arguments: Any,
    ) -> None:
        super().__init__(model=model, optimizers=(updater, None), **arguments)
        self.sparse_model = model
        self.updater = updater
        self.recorder = recorder
        self._held_out = held_out
        self._config = config
        self._pad = pad

    def run(self, checkpoint: Path | None) -> None:
        """Train to the last update, from a checkpoint if there is one."""
        if checkpoint is None:
            if self._held_out:
                self.evaluate()  # what there is to improve on
            self.train()
            return
        self._load_run_state(checkpoint)
        saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if saved.global_step < self.args.max_steps:  # else `train` would make one update more
            self.train(resume_from_checkpoint=str(checkpoint))
        else:
            self.state = saved

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Make one forward pass and its backward pass, or two forward passes in zeroth order."""
        mask = inputs.get("attention_mask")
        self.recorder.count(inputs["labels"].numel() if mask is None else int(mask.sum()))
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

    @torch.no_grad()
    def _two_forward_passes(self, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        assert isinstance(self.updater, ZerothOrder)
        model.train()
        inputs = self._prepare_inputs(inputs)
        losses = torch.zeros(2, dtype=torch.float64)
        for i, sign in enumerate((1, -1)):
            with self.updater.perturbed(sign):
                loss: Any = self.compute_loss(
                    model, dict(inputs), num_items_in_batch=num_items_in_batch
                )
            losses[i] = loss
        if num_items_in_batch is None:
            losses /= self.current_gradient_accumulation_steps
        self.updater.observe(*losses.tolist())
        return losses.mean().float()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out examples and remember the best deltas."""
        found = evaluate(
            self.sparse_model.model,
            self._held_out,
            tokenizer=self.sparse_model.base.tokenizer,
            pad=self._pad,
            batch_size=self._config.batch_size,
            exact_match=self._config.exact_match,
        )
        record = Evaluation(
            update=self.state.global_step, loss=found.loss, exact_match=found.exact_match
        )
        metrics = {"eval_loss": found.loss}
        if found.exact_match is not None:
            metrics["eval_exact_match"] = found.exact_match
        earlier = [evaluation.loss for evaluation in self.recorder.log.evaluations]
        self.recorder.log.append(record)
        if self.args.should_save and found.loss < min(earlier, default=float("inf")):
            self._config.folder.mkdir(parents=True, exist_ok=True)
            write_delta(self._config.best, self.sparse_model.adapter(method="checkpoint"))
        self.log(dict(metrics))
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"update {self.state.global_step}: expected to write a checkpoint to "
                f"{self._config.checkpoints}, got: {str(error).splitlines()[0]}; "
                "the one before it is left as it was"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        adapter = self.sparse_model.adapter(method="checkpoint", settings=self._config.settings())
        write_delta(directory / DELTA, adapter)
        state = {
            "selector": self.recorder.selector.state_dict(),
            "log": self.recorder.log.state_dict(),
            "born": {name: layer.born for name, layer in self.sparse_model.layers.items()},
        }
        torch.save(state, directory / RUN_STATE)

    def _load_run_state(self, directory: Path) -> None:
        state = torch.load(directory / RUN_STATE, weights_only=True)
        self.recorder.selector.load_state_dict(state["selector"])
        self.recorder.log.load_state_dict(state["log"])
        for name, layer in self.sparse_model.layers.items():
            layer.born.copy_(state["born"][name])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the model was made from the checkpoint's delta."""


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Return Hugging Face's settings of a run, apart from its number of updates."""
    on_cpu = pick_device(config.device).type == "cpu"
    scheduler = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return TrainingArguments(
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
        save_total_limit=1,
        seed=config.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, if there is one.

    The Trainer's state is written last, so what a crash or a full disk cut short lacks it.
    """
    found = []
    for path in directory.glob("checkpoint-*"):
        try:
            state = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
        except (OSError, ValueError):
            continue
        found.append((state.global_step, path))
    return max(found)[1] if found else None
