"""Who may do what: nobody without a token, a tenant its own, an administrator everything."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server.access import Access, hashed, make_token
from spieldose_server.client import Client, ClientError
from spieldose_server.command_line import token as token_command
from spieldose_server.errors import ConfigError, Unauthenticated

from ..conftest import Running

SHORT = pb.SamplingParams(max_tokens=4)
WANTED = "expected an administrator's token or port, got another's"
EXPIRED = "a-token-of-last-year"


def table(name: str, *tokens: str, expires: str = "", **more: str) -> str:
    until = f", expires = {expires}" if expires else ""
    entries = ", ".join(f'{{ sha256 = "{hashed(token)}"{until} }}' for token in tokens)
    lines = [f"{key} = {value}" for key, value in more.items()]
    return "\n".join(["[[tenant]]", f'name = "{name}"', f"tokens = [{entries}]", *lines, ""])


TENANTS = (
    table("red", "red-token", expires="2999-01-01", adapters='["red-*"]')
    + table("blue", "blue-token", adapters='["blue", "shared"]', base="true")
    + table("late", EXPIRED, expires="2025-11-25T10:00:00Z", adapters='["*"]')
    + table("operator", "operator-token", admin="true")
)


@pytest.fixture
def guarded(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Iterator[Running]:
    """A server with the adapters of two tenants, and an access file."""
    (directory := tmp_path / "adapters").mkdir()
    for seed, name in enumerate(("red-1", "blue", "shared"), start=1):
        write_delta(directory / f"{name}.safetensors", make_adapter(seed))
    (directory / "blue-broken.safetensors").write_bytes(b"no delta")
    (tmp_path / "access.toml").write_text(TENANTS)
    yield from serve_tiny(directory, access=str(tmp_path / "access.toml"), admin_listen="")


@pytest.fixture
def client_of(guarded: Running) -> Iterator[Callable[..., Client]]:
    """Return a client with a token."""
    clients = []

    def make(token: str = "", **more: Any) -> Client:
        clients.append(Client(f"127.0.0.1:{guarded.server.port}", token=token, **more))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(ClientError) as refused:
        call()
    return refused.value.code, str(refused.value)


def test_each_tenant_plays_its_own(client_of: Callable[..., Client]) -> None:
    assert client_of("red-token").generate("hi", adapter="red-1", sampling=SHORT).token_ids
    blue = client_of("blue-token")
    for adapter in ("blue", "shared", ""):
        assert blue.generate("hi", adapter=adapter, sampling=SHORT).token_ids


@pytest.mark.parametrize("token", ["", "forged", EXPIRED, "red-toke", hashed("red-token")])
def test_missing_forged_and_expired_tokens_are_refused_everywhere(
    guarded: Running, client_of: Callable[..., Client], token: str
) -> None:
    client = client_of(token, tenant="red")
    calls: list[Callable[[], object]] = [
        lambda: client.generate("hi", adapter="red-1"),
        lambda: client.generate("hi"),
        client.model,
        client.adapters,
        lambda: client.adapter("red-1"),
        lambda: client.load("red-1"),
        lambda: client.unload("red-1"),
        lambda: client.pin("red-1"),
        lambda: client.unpin("red-1"),
        lambda: next(client.watch()),
    ]
    wanted = "expected a valid token, got another" if token else "expected a bearer token, got none"
    for call in calls:
        assert refusal(call) == (
            grpc.StatusCode.UNAUTHENTICATED,
            f"UNAUTHENTICATED: {wanted}",
        )
    assert guarded.refused() == len(calls)


@pytest.mark.parametrize("given", ["red-token", "Basic red-token", "Bearer", "Bearer  "])
def test_only_bearer_tokens_count(guarded: Running, given: str) -> None:
    with (
        grpc.insecure_channel(f"127.0.0.1:{guarded.server.port}") as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        rpc.InferenceStub(channel).GetModelInfo(
            pb.GetModelInfoRequest(), metadata=[("authorization", given)]
        )
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "adapter", ["blue", "blue-broken", "shared", "BLUE", "*", "blue@" + "0" * 64]
)
def test_what_a_tenant_may_not_play_looks_unknown_to_it(
    client_of: Callable[..., Client], adapter: str
) -> None:
    client = client_of("red-token", tenant="blue")
    messages = [pb.ChatMessage(role="user", content="hi")]
    asked = pb.TokenizeRequest(adapter_id=adapter, messages=pb.ChatMessages(messages=messages))
    calls: list[Callable[[], object]] = [
        lambda: client.generate("hi", adapter=adapter),
        lambda: client.adapter(adapter),
        lambda: client._call(client.inference.Tokenize, asked, pb.TokenizeResponse),
    ]
    for call in calls:
        code, text = refusal(call)
        assert code is grpc.StatusCode.NOT_FOUND
        assert text == f"NOT_FOUND: expected a served adapter, got {adapter!r}"
    same = refusal(lambda: client.generate("", adapter=adapter))  # a mistake in the request itself
    assert same == refusal(lambda: client.generate("", adapter="nobody"))


def test_the_base_is_played_by_whom_it_is_granted(client_of: Callable[..., Client]) -> None:
    code, text = refusal(lambda: client_of("red-token").generate("hi"))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "may not play the base" in text


def test_lists_and_watches_show_a_tenant_its_own(client_of: Callable[..., Client]) -> None:
    def names(token: str) -> list[str]:
        return [adapter.name for adapter in client_of(token).adapters()]

    assert names("red-token") == ["red-1"]
    assert names("blue-token") == ["blue", "shared"]
    assert names("operator-token") == ["blue", "blue-broken", "red-1", "shared"]
    operator = client_of("operator-token")
    with_red = client_of("red-token").watch()
    assert next(with_red).adapter.name == "red-1"
    operator.unload("shared")
    operator.unload("red-1")
    changed = next(with_red)
    assert (changed.adapter.name, changed.gone) == ("red-1", True)


def test_only_an_administrator_steers(client_of: Callable[..., Client]) -> None:
    tenant, operator = client_of("blue-token"), client_of("operator-token")
    for act in (tenant.load, tenant.unload, tenant.pin, tenant.unpin):
        for name in ("blue", "red-1", "none", "../access", ""):
            code, text = refusal(lambda act=act, name=name: act(name))  # type: ignore[misc]
            assert code is grpc.StatusCode.PERMISSION_DENIED
            assert text == f"PERMISSION_DENIED: {WANTED}"
    assert operator.pin("blue").pinned
    assert not operator.unpin("blue").pinned
    operator.unload("blue")
    assert operator.load("blue").name == "blue"
    assert refusal(lambda: operator.generate("hi", adapter="blue"))[0] is grpc.StatusCode.NOT_FOUND


def test_fair_turns_go_by_the_token_and_not_by_what_a_client_says(
    guarded: Running, client_of: Callable[..., Client]
) -> None:
    seen = []
    accept = guarded.server.admission.accept
    guarded.server.admission.accept = (  # type: ignore[method-assign]
        lambda name: seen.append(name) or accept(name)  # type: ignore[func-returns-value]
    )
    client_of("red-token", tenant="blue").generate("hi", adapter="red-1", sampling=SHORT)
    assert seen == ["red"]


def test_a_changed_file_counts_at_once_and_a_spoilt_one_changes_nothing(
    guarded: Running, client_of: Callable[..., Client], tmp_path: Path, caplog: Any
) -> None:
    red, blue = client_of("red-token"), client_of("blue-token")
    file = tmp_path / "access.toml"
    assert refusal(lambda: red.adapter("shared"))[0] is grpc.StatusCode.NOT_FOUND
    file.write_text(TENANTS.replace('["red-*"]', '["red-*", "shared"]'))
    assert red.adapter("shared").name == "shared"
    with caplog.at_level(logging.ERROR):
        file.write_text("[[tenant]]\nname =")
        assert red.adapter("shared").name == blue.adapter("shared").name == "shared"
        file.unlink()
        assert red.adapter("shared").name == "shared"
    assert "tenants stay as they were" in caplog.text
    file.write_text(table("red", "another-token", adapters='["*"]'))
    for gone in (red, blue):
        assert refusal(gone.adapters)[0] is grpc.StatusCode.UNAUTHENTICATED
    assert client_of("another-token").adapter("blue").name == "blue"


def test_health_and_reflection_need_no_token(guarded: Running) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    with grpc.insecure_channel(f"127.0.0.1:{guarded.server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert "spieldose.v1.Inference" in ProtoReflectionDescriptorDatabase(channel).get_services()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected [[tenant]] tables, got none"),
        ("tenant = 3", "expected [[tenant]] tables, got none"),
        ("[[tenants]]", "expected [[tenant]] tables, got 'tenants'"),
        ("[[tenant]]", "tenant 1: expected a name, got none"),
        ("[[tenant]]\nname = 3", "tenant 1: name: expected a str, got 3"),
        ('[[tenant]]\nname = "a"\nadmin = 1', "tenant 1: admin: expected a bool, got 1"),
        ('[[tenant]]\nname = "a"\nroot = true', "tenant 1: expected one of name, tokens, "),
        ('[[tenant]]\nname = "a"\nadapters = [1]', "adapters: expected names, got [1]"),
        ('[[tenant]]\nname = "a"\ntokens = ["plain"]', "tokens: expected { sha256, expires }, got"),
        (
            '[[tenant]]\nname = "a"\ntokens = [{ sha256 = "9F" }]',
            "expected 64 hex digits, got '9F'",
        ),
        (
            table("a", "t", expires="2027-01-01T00:00:00"),
            "expected a date, or a time with an offset",
        ),
        (table("a", "t", expires='"tomorrow"'), "expected a date, or a time with an offset"),
        (
            table("a", certificates='["x"]') + table("b", certificates='["x"]'),
            "tenant 2: certificates: expected each name once, got 'x' twice",
        ),
        (table("a", "t") + table("b", "t"), "tenant 2: tokens: expected each token once, got"),
    ],
)
def test_a_wrong_access_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    (file := tmp_path / "access.toml").write_text(text)
    with pytest.raises(ConfigError) as wrong:
        Access(file)
    assert expected in str(wrong.value)
    assert str(file) in str(wrong.value)


def test_the_command_makes_a_token_that_lets_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token_command(["--days", "2"])
    made, line = capsys.readouterr()
    (file := tmp_path / "access.toml").write_text(f'[[tenant]]\nname = "new"\n{line}')
    access = Access(file)
    assert access.caller(made.strip()).tenant == "new"
    assert not access.caller(made.strip()).may_play("anything")
    with pytest.raises(Unauthenticated):
        access.caller(make_token())
