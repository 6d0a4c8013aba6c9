"""The server as a process of its own, run by the command line."""

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client

from ..conftest import eventually

COMMAND = str(Path(sys.executable).with_name("spieldose"))


@pytest.fixture
def adapters(tmp_path: Path, make_adapter) -> Path:
    write_delta(tmp_path / "a1.safetensors", make_adapter(1))
    return tmp_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(
    base: Path, adapters: Path, *options: str, **settings: Any
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    address = f"127.0.0.1:{free_port()}"
    command = [COMMAND, "serve", "--base", base, "--adapters", adapters, "--listen", address]
    command += ["--compute-dtype", "float32", "--kv-tokens", "4096", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **settings) as server:
        try:
            with Client(address) as client:
                client.wait(120)
            yield server, address
        finally:
            server.kill()


def test_sigterm_lets_running_requests_finish(tiny_directory: Path, adapters: Path) -> None:
    sampling = pb.SamplingParams(max_tokens=150)
    with process(tiny_directory, adapters) as (server, address), Client(address) as client:
        whole = client.generate("hello", adapter="a1", sampling=sampling)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(client.generate, "hello", adapter="a1", sampling=sampling)
            eventually(lambda: client.adapter("a1").running == 1)
            server.send_signal(signal.SIGTERM)
            assert running.result() == whole
        assert server.wait(30) == 0


def test_health_and_reflection_answer(tiny_directory: Path, adapters: Path) -> None:
    with (
        process(tiny_directory, adapters) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "spieldose.v1.Inference", "spieldose.v1.Adapters"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert {"spieldose.v1.Inference", "spieldose.v1.Adapters"} <= set(services)


def test_the_commands_stream_and_list(tiny_directory: Path, adapters: Path) -> None:
    with process(tiny_directory, adapters) as (_, address), Client(address) as client:
        expected = client.generate("hello", adapter="a1", sampling=pb.SamplingParams(max_tokens=9))
        said = command(
            "generate", "--server", address, "--adapter", "a1", "--prompt", "hello",
            "--max-tokens", "9",
        )  # fmt: skip
        assert said.stdout == expected.text + "\n"
        shutil.copy(__file__, adapters / "bad.safetensors")
        eventually(lambda: "rejected" in command("adapters", "list", "--server", address).stdout)
        listed = command("adapters", "list", "--server", address).stdout
        assert "resident" in listed
        assert "expected a safetensors file" in " ".join(listed.split())
        refused = command("generate", "--server", address, "--adapter", "no", "--prompt", "x")
        assert refused.returncode == 1
        assert refused.stderr.startswith("spieldose generate: NOT_FOUND: expected")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--base", "/nowhere", "--adapters", "."), "expected a model directory or hub name"),
        (("--base", "{base}", "--adapters", "/nowhere"), "adapters must be a directory"),
        (("--base", "{base}", "--adapters", ".", "--kv-tokens", "0"), "kv_tokens must be"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(
    tiny_directory: Path, arguments: tuple[str, ...], expected: str
) -> None:
    filled = [argument.format(base=tiny_directory) for argument in arguments]
    done = command("serve", *filled)
    assert done.returncode == 1
    assert expected in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:{taken}", "a..b:80"])
def test_a_server_that_cannot_start_ends(
    tiny_directory: Path, tmp_path: Path, address: str
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = address.format(taken=other.getsockname()[1])
        required = ("--base", str(tiny_directory), "--adapters", str(tmp_path))
        done = command("serve", *required, "--listen", "127.0.0.1:0", "--http-listen", address)
    assert done.returncode == 1
    assert f"http_listen: expected a free address, got {address}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, timeout=120, env=environment
    )
