"""Cancelled requests free what they held, at once, and disturb no other."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client

from ..conftest import Running, eventually

LONG = pb.SamplingParams(max_tokens=400)


@pytest.fixture
def small(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Iterator[Running]:
    """A server with the adapters a1 to a4, and room for two of them."""
    for seed in range(1, 5):
        write_delta(tmp_path / f"a{seed}.safetensors", make_adapter(seed))
    yield from serve_tiny(tmp_path, max_adapters=2)


def test_500_streams_cancelled_at_random_times_leave_nothing_behind_within_a_second(
    small: Running, record_property: Callable[[str, object], None]
) -> None:
    alone = small.client.generate("hello", adapter="a1", sampling=LONG)
    most = cancel_at_random(small, streams=500, seconds=3.0)
    cancelled = time.monotonic()
    eventually(lambda: idle(small), seconds=1.0)  # 0.002 to 0.03 s on 2 busy cores
    record_property("seconds", time.monotonic() - cancelled)
    assert min(most[stage] for stage in ("waiting", "playing", "off_device")) > 20
    assert small.client.generate("hello", adapter="a1", sampling=LONG) == alone
    eventually(lambda: idle(small))  # nor did any of them begin after all
    engine = small.server.engine
    assert not engine._gone and not engine._cancelled and not engine._logprobs


def test_after_a_full_cache_whose_streams_were_all_cancelled_the_next_is_served(
    small: Running,
) -> None:
    admission, engine = small.server.admission, small.server.engine
    scheduler = engine._manager.batch_processor.scheduler
    full, go_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        if scheduler.block_new_requests:
            full.set()
            go_on.wait(60)

    with small.base.model.register_forward_pre_hook(pause):
        # 60 of them play the base or an adapter that has a slot, 7 pages each; there are 64
        calls = [small.client.inference.Generate(request(number)) for number in range(100)]
        assert full.wait(60)
        for call in calls:
            call.cancel()
        eventually(lambda: admission.accepted == admission.running == len(engine._cancelled))
        go_on.set()
    eventually(lambda: idle(small))
    small.client.generate("hello", sampling=LONG, timeout=60)


def test_a_lease_is_held_until_no_step_can_read_the_slot(running: Running) -> None:
    in_step, go_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        in_step.set()
        go_on.wait()

    stream = running.client.stream("hello", adapter="a1", sampling=LONG)
    next(stream)
    hook = running.base.model.register_forward_pre_hook(pause)
    assert in_step.wait(20)
    stream.close()
    running.admin.unload("a1")
    time.sleep(0.5)
    assert running.state("a1") == "draining"
    hook.remove()
    go_on.set()
    eventually(lambda: running.state("a1") == "")


def test_a_cancelled_stream_disturbs_no_other(running: Running) -> None:
    alone = running.client.generate("hello", adapter="a2", sampling=LONG)
    with ThreadPoolExecutor(8) as pool:
        other = pool.submit(running.client.generate, "hello", adapter="a2", sampling=LONG)
        list(pool.map(start_and_cancel, [running.client] * 14, range(14)))
        assert other.result().token_ids == alone.token_ids


def cancel_at_random(running: Running, *, streams: int, seconds: float) -> Counter[str]:
    """Start streams and cancel each at random; return how many at most were at which stage."""
    chance = random.Random(0)
    moments = []
    for number in range(streams):
        begin = chance.uniform(0, seconds)
        moments += [(begin, number), (chance.uniform(begin, seconds), number)]
    calls: dict[int, Any] = {}
    most: Counter[str] = Counter()
    started = time.monotonic()
    for moment, number in sorted(moments):
        time.sleep(max(0.0, started + moment - time.monotonic()))
        most |= stages(running)
        if number in calls:
            calls[number].cancel()
        else:
            calls[number] = running.client.inference.Generate(request(number))
    return most


def stages(running: Running) -> Counter[str]:
    admission, versions = running.server.admission, running.server.store.list()
    return Counter(
        waiting=admission.accepted - admission.running,
        playing=admission.running,
        off_device=sum(version.leases for version in versions if version.slot is None),
    )


def request(number: int) -> pb.GenerateRequest:
    """Make a request for one of four adapters, or the base; no two share a page of KV."""
    adapter = ("", "a1", "a2", "a3", "a4")[number % 5]
    return pb.GenerateRequest(text=f"{number}", adapter_id=adapter, sampling_params=LONG)


def start_and_cancel(client: Client, number: int) -> None:
    call = client.inference.Generate(request(number))
    time.sleep(number % 7 * 0.01)
    call.cancel()


def leases(running: Running) -> int:
    return sum(version.leases for version in running.server.store.list())


def idle(running: Running) -> bool:
    admission, engine = running.server.admission, running.server.engine
    held = admission.accepted, admission.running, leases(running), engine.held_pages
    return not any(held) and not engine._manager.batch_processor.has_pending_requests()
