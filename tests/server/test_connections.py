"""Clients that are slow, or gone before they asked anything, do not hold up the others."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc

from ..conftest import Running, eventually

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# some 100 kB, more than HTTP/2 lets a server send to somebody who takes none of it, in a window
# that does not grow
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 14)]
LARGE = pb.SamplingParams(max_tokens=480, logprobs=20)
SHORT = pb.SamplingParams(max_tokens=24)


class Trickle:
    """A proxy that passes an answer on at a byte a second, once it is told to be slow."""

    def __init__(self, port: int) -> None:
        self._slow = threading.Event()
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server = socket.socket()
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least there is
        self._server.connect(("127.0.0.1", port))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> "Trickle":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for each in (self._server, self._client):
            with suppress(OSError):  # the other side has gone
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._server, self._client, self._listener):
            each.close()

    def slow_down(self) -> None:
        self._slow.set()

    def _accept(self) -> None:
        self._client, _ = self._listener.accept()
        self._threads.append(threading.Thread(target=self._pass, args=(self._client, self._server)))
        self._threads[-1].start()
        self._pass(self._server, self._client)

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        while not self._closed.is_set():
            answers_slowly = source is self._server and self._slow.is_set()
            try:
                target.sendall(source.recv(1 if answers_slowly else 1 << 16))
            except OSError:
                return
            if answers_slowly:
                self._closed.wait(1.0)


@pytest.fixture
def narrow(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Iterator[Running]:
    """A server with the adapters a1 and a2, and a place for one request at a time."""
    for seed in (1, 2):
        write_delta(tmp_path / f"a{seed}.safetensors", make_adapter(seed))
    yield from serve_tiny(tmp_path, max_batch_requests=1, max_adapters=1)


def test_clients_that_read_a_byte_a_second_keep_neither_place_nor_slot_nor_kv(
    narrow: Running,
) -> None:
    port, admission, engine = narrow.server.port, narrow.server.admission, narrow.server.engine
    request = pb.GenerateRequest(text="hello", adapter_id="a1", sampling_params=LARGE)
    with ExitStack() as stack:
        calls = []  # gRPC cancels those that nobody holds
        for _ in range(3):
            proxy = stack.enter_context(Trickle(port))
            channel = grpc.insecure_channel(proxy.address, options=NARROW)
            calls.append(
                rpc.InferenceStub(stack.enter_context(channel)).Generate(request, timeout=300)
            )
            next(calls[-1])
            proxy.slow_down()
        played = narrow.client.generate("hello", adapter="a2", sampling=SHORT, timeout=60).adapter
        assert played.startswith("a2@")
        eventually(lambda: (admission.running, engine.held_pages) == (0, 0))
        assert admission.accepted == 3  # their answers are there, and wait for them
        steps = engine.record.steps
        time.sleep(1.0)
        assert engine.record.steps == steps  # nothing more is made for them
    eventually(lambda: admission.accepted == 0)
    assert all(version.leases == 0 for version in narrow.server.store.list())


def test_clients_that_send_a_byte_a_second_hold_up_nobody(running: Running) -> None:
    alone = running.client.generate("hello", adapter="a1", sampling=SHORT)
    with ExitStack() as stack:
        senders = [stack.enter_context(connect(running)) for _ in range(100)]
        for byte in PREFACE[:3]:
            for sender in senders:
                sender.send(bytes([byte]))
            assert running.client.generate("hello", adapter="a1", sampling=SHORT) == alone
            time.sleep(1.0)


def test_10000_connections_opened_and_dropped_leave_nothing_and_disturb_nobody(
    running: Running,
) -> None:
    alone = running.client.generate("hello", adapter="a1", sampling=SHORT)
    before = open_files()
    with ThreadPoolExecutor(1) as pool:
        dropping = pool.submit(open_and_drop, running, 10_000)
        answers = 0
        while not dropping.done():
            assert running.client.generate("hello", adapter="a1", sampling=SHORT) == alone
            answers += 1
        dropping.result()
    assert answers
    eventually(lambda: open_files() <= before)
    assert running.client.generate("hello", adapter="a1", sampling=SHORT) == alone


def open_and_drop(running: Running, count: int, *, at_once: int = 100) -> None:
    """Open connections, say nothing, half a preface or nonsense after one, and drop them."""
    openings = (b"", PREFACE[:12], PREFACE, PREFACE + b"\xff" * 64)
    for first in range(0, count, at_once):
        with ExitStack() as stack:
            for number in range(first, first + at_once):
                connection = stack.enter_context(connect(running))
                connection.send(openings[number % len(openings)])
                if number % 3 == 0:  # with a reset
                    reset = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.server.port), timeout=60)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
