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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

# of the loader: where it shares a core with a team, it gets a sixteenth, and a step waits no
# longer. While 3 % of the demo's base loaded, the p99 between tokens was 1.13 times that of other
# times, and the load took 1.4 s; with 10, a tenth, 1.21 and 0.9 s.
NICE = 12

# Each load at a time has that share: a burst of them does not take turns at it.
LOADERS = 4

# After every product a step needs the interpreter again, and the loader may have it for so long, of
# 5 ms by default. The same p99 was 1.85 times with 5 ms, 1.2 with this, both with a niceness of 10;
# 2.8 without any.
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


def _give_way() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # now it stays so: a thread asks for the number of the others but once
    os.nice(NICE)  # on Linux of the calling thread alone
