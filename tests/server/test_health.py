"""grpc.health.v1 as a load balancer sees it, over a real server's life."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client

from ..conftest import eventually
from .test_process import adapters, process

__all__ = ["adapters"]  # a fixture

SERVICES = ("", "spieldose.v1.Inference", "spieldose.v1.Adapters")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_watch_follows_start_drain_and_stop(tiny_directory: Path, adapters: Path) -> None:
    long = pb.SamplingParams(max_tokens=300, min_tokens=300)
    with (
        process(tiny_directory, adapters) as (server, address),
        Client(address) as client,
        grpc.insecure_channel(address) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in SERVICES]
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nothing"))
        assert [next(watch).status for watch in watches] == [SERVING] * 3
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        running = pool.submit(client.generate, "hello", adapter="a1", sampling=long)
        eventually(lambda: client.adapter("a1").running == 1)
        server.send_signal(signal.SIGTERM)
        assert [next(watch).status for watch in watches] == [NOT_SERVING] * 3
        assert len(running.result().token_ids) == 300
        ended = time.monotonic()
        for watch in (*watches, unknown):
            with pytest.raises(grpc.RpcError) as over:
                next(watch)
            assert over.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.wait(20) == 0
        assert time.monotonic() - ended < 20  # --drain-seconds are 30: nobody waits for watches
