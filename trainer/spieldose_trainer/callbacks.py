"""What happens between updates: reselection, the progress bar, and a clean stop on Ctrl-C."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spieldose_trainer.selector import AccumulatedGradients

SELECTOR_STATE = "selector.pt"


class Reselection(TrainerCallback):
    """Tell the selector when updates begin and end; keep its state with every checkpoint."""

    def __init__(self, selector: AccumulatedGradients) -> None:
        self.selector = selector
        self.replaced = 0  # by the latest update

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the next update."""
        self.selector.begin_update(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the update that has just moved the values."""
        self.replaced = self.selector.end_update(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save the selector beside the optimizer."""
        directory = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        torch.save(self.selector.state_dict(), directory / SELECTOR_STATE)

    def load(self, directory: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(directory / SELECTOR_STATE, weights_only=True)
        self.selector.load_state_dict(state)


class Progress(TrainerCallback):
    """Show loss, time per update and positions replaced on one line."""

    def __init__(self, reselection: Reselection) -> None:
        self.reselection = reselection
        self.losses: list[float] = []
        self._bar: tqdm[Any] | None = None
        self._started = 0.0
        self._replaced = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar where a resumed run stands."""
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="update")
        self._started = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance by the update just logged."""
        loss = kwargs["logs"].get("loss")
        if loss is None or self._bar is None:
            return
        self.losses.append(float(loss))
        self._replaced = self.reselection.replaced or self._replaced
        now = time.perf_counter()
        self._bar.set_postfix(
            loss=f"{loss:.4f}",
            step=f"{now - self._started:.2f}s",
            replaced=f"{self._replaced:,}",
            refresh=False,
        )
        self._bar.update(1)
        self._started = now

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
        """Ask for a checkpoint and the end, if a stop was requested."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT as a request to stop while the block runs."""
        previous = signal.signal(signal.SIGINT, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
