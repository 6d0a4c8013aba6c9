"""Who steers adapters and sees connections: nobody, unless a port or an access file says so."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client
from spieldose_server.errors import ConfigError

from ..conftest import Running
from .test_access import WANTED, refusal, table

SHORT = pb.SamplingParams(max_tokens=3)
Serving = Callable[..., contextlib.AbstractContextManager[Running]]


@pytest.fixture
def serving(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Serving:
    """Run a server with the adapter a1."""
    (directory := tmp_path / "adapters").mkdir()
    write_delta(directory / "a1.safetensors", make_adapter(1))
    serve = contextlib.contextmanager(serve_tiny)
    return lambda **settings: serve(directory, **settings)


def steer(client: Client) -> None:
    assert client.pin("a1").pinned
    assert not client.unpin("a1").pinned
    client.unload("a1")
    assert client.load("a1").name == "a1"


def refused(client: Client) -> None:
    for act in (client.load, client.unload, client.pin, client.unpin):
        for name in ("a1", "none", ""):
            code, text = refusal(lambda act=act, name=name: act(name))  # type: ignore[misc]
            assert (code, text) == (
                grpc.StatusCode.PERMISSION_DENIED,
                f"PERMISSION_DENIED: {WANTED}",
            )


def connections(address: str, **metadata: str) -> int | grpc.StatusCode:
    """Return how many servers channelz tells of, or how it refuses to."""
    with grpc.insecure_channel(address) as channel:
        try:
            found = channelz_pb2_grpc.ChannelzStub(channel).GetServers(
                channelz_pb2.GetServersRequest(), metadata=list(metadata.items())
            )
        except grpc.RpcError as error:
            return error.code()
        return len(found.server)


def test_nobody_steers_unless_it_is_configured(serving: Serving) -> None:
    with serving(admin_listen="") as running:
        refused(running.client)
        assert running.client.generate("hi", adapter="a1", sampling=SHORT).token_ids
        assert running.client.adapter("a1").name == "a1"
        address = f"127.0.0.1:{running.server.port}"
        assert connections(address) is grpc.StatusCode.PERMISSION_DENIED


def test_who_reaches_the_administrators_port_steers(serving: Serving) -> None:
    with serving() as running:
        refused(running.client)
        steer(running.admin)
        assert refusal(lambda: running.admin.generate("hi"))[0] is grpc.StatusCode.UNIMPLEMENTED
        admin = f"127.0.0.1:{running.server.admin_port}"
        found = connections(admin)
        assert isinstance(found, int)
        assert found >= 2
        with grpc.insecure_channel(admin) as channel:
            offered = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert {"spieldose.v1.Adapters", "grpc.channelz.v1.Channelz"} <= offered
        assert "spieldose.v1.Inference" not in offered


def test_the_port_may_be_a_socket_in_a_directory(serving: Serving, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/admin.sock"
    with serving(admin_listen=address), Client(address) as admin:
        steer(admin)


def test_a_socket_that_answers_is_not_taken_from_who_has_it(
    serving: Serving, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/admin.sock"
    with serving(admin_listen=address), Client(address) as admin:
        with pytest.raises(ConfigError, match=r"^expected a free address .*, got unix:"):
            serving(admin_listen=address).__enter__()
        steer(admin)
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(f"{tmp_path}/admin.sock")
    with serving(admin_listen=address), Client(address) as admin:
        steer(admin)


def test_with_tenants_the_port_needs_an_administrators_token_too(
    serving: Serving, tmp_path: Path
) -> None:
    (tmp_path / "access.toml").write_text(
        table("red", "red-token", adapters='["*"]') + table("operator", "operator", admin="true")
    )
    access = str(tmp_path / "access.toml")
    with serving(access=access) as running:
        main, admin = (
            f"127.0.0.1:{port}" for port in (running.server.port, running.server.admin_port)
        )
        with Client(admin, token="red-token") as tenant, Client(main, token="operator") as away:
            refused(tenant)
            refused(away)
        assert refusal(running.admin.adapters)[0] is grpc.StatusCode.UNAUTHENTICATED
        with Client(admin, token="operator") as operator:
            steer(operator)
        assert connections(main, authorization="Bearer operator") is (
            grpc.StatusCode.PERMISSION_DENIED
        )
    with serving(access=access, admin_listen="") as running:
        main = f"127.0.0.1:{running.server.port}"
        with Client(main, token="operator") as operator:
            steer(operator)
        assert connections(main, authorization="Bearer operator") != 0
        assert connections(main, authorization="Bearer red-token") is (
            grpc.StatusCode.PERMISSION_DENIED
        )


def test_an_address_in_use_is_named(serving: Serving) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=f"a free address to listen on, got {address}"),
            serving(admin_listen=address),
        ):
            pass
