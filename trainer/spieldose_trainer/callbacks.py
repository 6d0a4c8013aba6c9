"""What happens between updates: the selector's turn, the record, the bar, and a clean stop."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.memory import MemoryTable, measure_memory
from spieldose_trainer.ranks import sum_over_ranks
from spieldose_trainer.run_log import Reselection, RunLog, Update
from spieldose_trainer.selectors.selector import Selector


class Recorder(TrainerCallback):
    """Give the selector its turns, and record what every update did, and the memory it took."""

    def __init__(
        self, selector: Selector, *, layers: Mapping[str, TrainableDelta], method: str
    ) -> None:
        self.selector = selector
        self.log = RunLog()
        self.memory: MemoryTable | None = None  # known from the first update on
        self._layers = layers
        self._method = method
        self._tokens = 0  # of the running update
        self._started = 0.0
        self._learning_rate = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write checkpoints as often as asked for now: a resumed state says how often it was."""
        state.save_steps = int(args.save_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the next update."""
        self._tokens, self._started = 0, time.perf_counter()
        self._learning_rate = kwargs["optimizer"].param_groups[0]["lr"]
        self.selector.begin_update(state.global_step + 1)

    def count(self, tokens: int) -> None:
        """Count a forward pass's tokens."""
        self._tokens += tokens

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the memory once, while gradients and moments are both there."""
        if self.memory is None:
            optimizer = kwargs["optimizer"]
            self.memory = measure_memory(self._layers, optimizer, method=self._method)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the update that has just moved the values."""
        replaced = self.selector.end_update(state.global_step)
        if replaced or self.selector.lost:  # all that was new may have been evicted at once
            self.log.append(
                Reselection(
                    update=state.global_step,
                    replaced=replaced,
                    entries=sum(layer.values.numel() for layer in self._layers.values()),
                    lost=self.selector.lost,
                    lost_over_run=self.selector.lost_over_run,
                )
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the update; its loss is known only now, as the mean over all processes."""
        if (loss := kwargs["logs"].get("loss")) is not None:
            self.log.append(
                Update(
                    number=state.global_step,
                    loss=float(loss),
                    learning_rate=self._learning_rate,
                    seconds=time.perf_counter() - self._started,
                    tokens=sum_over_ranks(self._tokens),
                )
            )


class Evaluating(TrainerCallback):
    """Ask for evaluations; what comes of them is the loop's matter."""

    def __init__(self, every: int) -> None:
        self._every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for an evaluation every so many updates and after the last."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            control.should_evaluate = True


class Progress(TrainerCallback):
    """Show loss, learning rate, time, speed and churn on one line."""

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar where a resumed run stands."""
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="update",
            disable=not state.is_world_process_zero,
        )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance by the update just recorded."""
        if self._bar is None or "loss" not in kwargs["logs"]:
            return
        update = self._log.updates[-1]
        shown = {
            "loss": f"{update.loss:.4f}",
            "lr": f"{update.learning_rate:.1e}",
            "step": f"{update.seconds:.2f}s",
            "tokens/s": f"{update.tokens / update.seconds:.0f}",
        }
        if self._log.reselections:
            last = self._log.reselections[-1]
            shown["churn"] = f"{last.replaced / last.entries:.0%}"
        if self._log.evaluations:
            shown["held out"] = f"{self._log.evaluations[-1].loss:.4f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class StopOnInterrupt(TrainerCallback):
    """End the run after the running update, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint and the end, if a stop was requested of any process."""
        if sum_over_ranks(self.requested):
            self.requested = True
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT as a request to stop while the block runs, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are not delivered to others
            return
        previous = signal.signal(signal.SIGINT, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
