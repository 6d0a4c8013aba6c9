"""Tensor work beside the steps leaves them their threads."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from spieldose_kernels.delta_file import write_delta
from spieldose_server.threads import LOADERS, NICE, SHARE, Rest, apart, loaders

from ..conftest import Running, eventually
from .test_adapters import Stream


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


def test_a_loader_rests_while_steps_run_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, slept = 0.0, []

    def thread_time() -> float:
        nonlocal computed
        computed += 1e-9  # to look takes time, too
        return computed

    monkeypatch.setattr("time.thread_time", thread_time)
    monkeypatch.setattr("time.sleep", slept.append)
    for steps_run in (True, False):
        computed, rest = 0.0, Rest(lambda now=steps_run: now)  # type: ignore[misc]
        rest()  # nothing is known of what came before
        for _ in range(3):
            computed += 0.01
            rest()
    assert 0 <= slept[0] < 1e-6
    assert [0.01 / (0.01 + each) for each in slept[1:]] == pytest.approx([SHARE] * 3, rel=1e-3)


def test_a_server_s_loads_rest_between_pieces_while_it_answers(
    serve_tiny: Callable[..., Iterator[Running]],
    tmp_path: Path,
    make_adapter: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []  # at each rest: whether steps ran

    class Noting(Rest):
        def __call__(self) -> None:
            asked.append(self._steps_run())
            super().__call__()

    monkeypatch.setattr("spieldose_server.server.Rest", Noting)
    write_delta(tmp_path / "a1.safetensors", make_adapter(1))
    with contextmanager(serve_tiny)(tmp_path) as running:
        eventually(lambda: running.state("a1"))
        running.admin.load("a1")
        assert asked and not any(asked)
        asked.clear()
        with Stream(running, ""):
            write_delta(tmp_path / "a2.safetensors", make_adapter(2))
            eventually(lambda: running.state("a2") == "resident")
            assert len(asked) > 10 and all(asked)  # a piece of each of two dozen arrays or more


def on_each(workers: ThreadPoolExecutor, ask: Callable[[], int]) -> list[int]:
    """Return what every worker answers; none answers twice, as they wait for each other."""
    together = threading.Barrier(LOADERS)

    def answer() -> int:
        together.wait(60)
        return ask()

    return [asked.result() for asked in [workers.submit(answer) for _ in range(LOADERS)]]
