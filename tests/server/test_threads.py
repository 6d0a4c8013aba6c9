"""Tensor work beside the steps leaves them their threads."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spieldose_server.threads import LOADERS, NICE, apart, loaders


@pytest.fixture(autouse=True)
def team_of_two() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_work_apart_returns_its_result_and_its_thread_is_gone() -> None:
    thread = apart(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_what_work_apart_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)


def test_loaders_compute_alone_and_every_other_thread_with_a_team() -> None:
    with loaders() as workers:
        assert on_each(workers, torch.get_num_threads) == [1] * LOADERS
        assert torch.get_num_threads() == 2
        assert apart(torch.get_num_threads) == 2


def test_loaders_give_way_to_every_other_thread() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    with loaders() as workers:
        assert on_each(workers, niceness) == [min(before + NICE, 19)] * LOADERS
        assert niceness() == apart(niceness) == before


def on_each(workers: ThreadPoolExecutor, ask: Callable[[], int]) -> list[int]:
    """Return what every worker answers; none answers twice, as they wait for each other."""
    together = threading.Barrier(LOADERS)

    def answer() -> int:
        together.wait(60)
        return ask()

    return [asked.result() for asked in [workers.submit(answer) for _ in range(LOADERS)]]
