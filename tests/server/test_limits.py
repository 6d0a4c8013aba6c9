"""How much one client may send and hold at once, on a real socket."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server.client import ClientError

from ..conftest import Running

LONG = pb.SamplingParams(max_tokens=500, min_tokens=500)
SHORT = pb.SamplingParams(max_tokens=2)


def test_too_large_a_message_is_refused_and_others_are_served(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path
) -> None:
    limits = {"max_message_bytes": 10_000, "max_prompt_bytes": 1_000}
    with contextlib.contextmanager(serve_tiny)(tmp_path, **limits) as running:
        stream = running.client.stream("hello", sampling=LONG)
        text = next(stream)
        for size, code in (
            (20_000, grpc.StatusCode.RESOURCE_EXHAUSTED),
            (2_000, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(ClientError) as refused:
                running.client.generate("x" * size, sampling=SHORT)
            assert refused.value.code is code
        assert running.client.generate("x" * 400, sampling=SHORT).token_ids
        text += "".join(stream)  # on the same connection
        assert text == running.client.generate("hello", sampling=LONG).text


def test_calls_beyond_a_connections_share_wait(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> None:
    write_delta(tmp_path / "a1.safetensors", make_adapter(1))
    with contextlib.contextmanager(serve_tiny)(tmp_path, max_connection_calls=2) as running:
        running.client.model()  # by now the client knows the limit
        endless = [running.client.watch() for _ in range(2)]
        for watch in endless:
            next(watch)
        with pytest.raises(ClientError) as waited:
            running.client.generate("third", sampling=SHORT, timeout=1.0)
        assert waited.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        # clients of one process share a connection, unless told not to
        own = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"127.0.0.1:{running.server.port}", own) as another:
            assert rpc.InferenceStub(another).GetModelInfo(pb.GetModelInfoRequest(), timeout=20)
        for watch in endless:
            watch.close()
        assert running.client.generate("third", sampling=SHORT).token_ids
