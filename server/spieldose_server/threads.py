"""Keep PyTorch's teams of threads out of each other's way.

OpenMP gives every thread that runs a parallel product a team of its own, for as long as that thread
lives. Once all teams together outnumber the cores, none waits awake for its next product any more,
and waking up costs as much as a product: on 2 cores a decoding step of the demo's base takes 28 ms
while the engine's team is the only one, and 70 ms beside the team of a thread that did nothing but
load the model. So what is not a step runs on a thread that ends, or on one that computes alone.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

# Of a core, for each loader while steps run. Priority alone does not do it: a thread of a team that
# waits awake keeps its core, but where it has gone to sleep, a loader runs on to the end of its
# slice, product after product. On Linux 6.18 and 2 cores, while 3 % of the demo's base loaded, the
# p99 between tokens was 2.3 times that of other times, at a niceness of 12; 1.17 times with a share
# of an eighth and a load of 1.5 s, 1.08 times with a twelfth and 2.2 s (benchmarks/traffic.py
# --parts cold --rounds 1).
SHARE = 1 / 12
NICE = 5  # where they do share a core, a loader has a quarter of it

# Each load at a time has that share: a burst of them does not take turns at it.
LOADERS = 4

# After every product a step needs the interpreter again, and the loader may have it for so long, of
# 5 ms by default. On another machine the same p99 was 1.85 times with 5 ms, 1.2 with this, at a
# niceness of 10 and without a share; 2.8 without either.
SWITCH_SECONDS = 0.0005


def apart(work: Callable[[], T]) -> T:
    """Run on a thread, and a team, that end with the work."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def loaders() -> ThreadPoolExecutor:
    """Return workers for tensor work beside the steps: they have no team and give way to theirs."""
    sys.setswitchinterval(SWITCH_SECONDS)
    team = torch.get_num_threads()
    workers = ThreadPoolExecutor(LOADERS, "loader", initializer=_give_way)
    all_there = threading.Barrier(LOADERS)
    for started in [workers.submit(all_there.wait) for _ in range(LOADERS)]:
        started.result()
    torch.set_num_threads(team)  # of this thread and of those to come, which the workers' 1 became
    return workers


class Rest:
    """Let a loader rest between the pieces of its work, as long as steps run."""

    def __init__(self, steps_run: Callable[[], bool]) -> None:
        self._steps_run = steps_run
        self._thread = threading.local()

    def __call__(self) -> None:
        """Sleep for so long that what this thread computed since the last time was its share."""
        now = time.thread_time()
        worked = now - getattr(self._thread, "rested", now)
        if self._steps_run():
            time.sleep(worked * (1 / SHARE - 1))
        self._thread.rested = time.thread_time()


def _give_way() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # now it stays so: a thread asks for the number of the others but once
    os.nice(NICE)  # on Linux of the calling thread alone
