"""Tensor work beside the steps leaves them their threads."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from spieldose_server.threads import NICE, apart, loader


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


def test_the_loader_computes_alone_and_every_other_thread_with_a_team() -> None:
    with loader() as worker:
        assert worker.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        assert apart(torch.get_num_threads) == 2


def test_the_loader_gives_way_to_every_other_thread() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    with loader() as worker:
        assert worker.submit(niceness).result() == min(before + NICE, 19)
        assert niceness() == apart(niceness) == before
