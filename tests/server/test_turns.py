"""A full server says so and when to come back; tenants take turns on a real socket."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client, ClientError

from ..conftest import Running, eventually
from .test_adapters import Stream

SHORT = pb.SamplingParams(max_tokens=4)


@pytest.fixture
def serving(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Any:
    """Return a context manager: a server with the adapter a1 and these settings."""
    write_delta(tmp_path / "a1.safetensors", make_adapter(1))
    return lambda **settings: contextmanager(serve_tiny)(tmp_path, **settings)


def test_a_full_server_says_when_to_come_back_and_answers_everything_else(serving: Any) -> None:
    with serving(max_requests=1) as running:
        with Stream(running, "a1"):
            call = running.client.inference.Generate(
                pb.GenerateRequest(text="x", sampling_params=SHORT)
            )
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "at most 1 requests at once" in caught.value.details()
            status, retry = rpc_status.from_call(caught.value), error_details_pb2.RetryInfo()
            assert status.details[0].Unpack(retry)
            assert 0 < retry.retry_delay.ToMilliseconds() <= 60_000
            assert running.client.adapter("a1").running == 1
        eventually(lambda: running.server.admission.accepted == 0)
        running.client.generate("x", sampling=SHORT)


def test_a_deadline_holds_in_the_queue_too(serving: Any) -> None:
    with serving(max_batch_requests=1) as running, Stream(running, "a1"):
        with pytest.raises(ClientError) as caught:
            running.client.generate("x", sampling=SHORT, timeout=0.3)
        assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: running.server.admission.accepted == 1)
        assert running.server.admission.running == 1


def test_a_tenants_flood_does_not_hold_up_another(serving: Any) -> None:
    with (
        serving(max_batch_requests=1) as running,
        Client(f"127.0.0.1:{running.server.port}", tenant="other") as other,
        ThreadPoolExecutor(32) as pool,
    ):
        with Stream(running, "a1"):
            flood = [pool.submit(running.client.generate, "x", sampling=SHORT) for _ in range(30)]
            eventually(lambda: running.server.admission.accepted == 31)
            mine = pool.submit(other.generate, "x", sampling=SHORT)
            eventually(lambda: running.server.admission.accepted == 32)
        mine.result()
        assert sum(future.done() for future in flood) <= 5
        for future in flood:
            future.result()


def test_a_tenant_over_its_tokens_a_second_is_turned_away(serving: Any) -> None:
    with serving(tenant_tokens_per_second=1.0) as running:
        running.client.generate("a prompt of more than ten tokens", sampling=SHORT)
        with pytest.raises(ClientError) as caught:
            running.client.generate("x", sampling=SHORT)
        assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        with Client(f"127.0.0.1:{running.server.port}", tenant="other") as other:
            other.generate("x", sampling=SHORT)


def test_a_name_too_long_is_refused(serving: Any) -> None:
    with serving() as running, Client(f"127.0.0.1:{running.server.port}", tenant="t" * 200) as bad:
        with pytest.raises(ClientError, match="expected at most 128 characters, got 200") as caught:
            bad.generate("x", sampling=SHORT)
        assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
