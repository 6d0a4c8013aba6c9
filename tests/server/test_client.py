"""What the clients make of a server's answers and refusals, and what they leave behind."""

import asyncio
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server import client as library
from spieldose_server.client import AsyncClient, Client, ClientError, InvalidArgument
from spieldose_server.connect import connect
from spieldose_server.errors import ConfigError

from ..conftest import Running, eventually
from .fake_server import FakeServer, fails
from .test_access import table
from .test_adapters import Stream

SHORT = pb.SamplingParams(max_tokens=4)


@pytest.fixture
def serving(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Any:
    """Return a context manager: a server with the adapter a1 and these settings."""
    (directory := tmp_path / "adapters").mkdir()
    write_delta(directory / "a1.safetensors", make_adapter(1))
    return lambda **settings: contextmanager(serve_tiny)(directory, **settings)


def test_importing_it_is_light() -> None:
    heavy = "torch transformers numba triton numpy rich tyro".split()
    found = "import spieldose_server.client, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & set(heavy)


def test_a_server_refuses_with_errors_of_their_own(serving: Any) -> None:
    with serving() as running:
        (running.directory / "bad.safetensors").write_bytes(b"no delta")
        eventually(lambda: running.state("bad").startswith("rejected"))
        client = running.client
        for kind, call in (
            (library.NotFound, lambda: client.generate("x", adapter="nobody")),
            (library.NotFound, lambda: client.adapter("nobody")),
            (library.FailedPrecondition, lambda: client.generate("x", adapter="bad")),
            (library.Forbidden, lambda: client.pin("a1")),
        ):
            with pytest.raises(kind, match=rf"^{kind.code.name}: .*expected") as caught:
                call()
            assert type(caught.value) is kind


def test_a_wrong_field_is_named(serving: Any) -> None:
    with serving() as running:
        sampling = pb.SamplingParams(top_p=2.0)
        with pytest.raises(library.InvalidArgument, match=r"^INVALID_ARGUMENT: ") as caught:
            next(running.client.stream("x", sampling=sampling))
        assert caught.value.field == "sampling_params.top_p"
        with pytest.raises(library.InvalidArgument) as caught:
            running.client.tokenize("")
        assert caught.value.field == "text"


def test_a_call_after_the_end_is_cancelled(fake: FakeServer) -> None:
    client = Client(fake.address)
    client.close()
    for call in (client.model, lambda: next(client.stream("x"))):
        with pytest.raises(library.Cancelled, match="CANCELLED: the client was closed"):
            call()

    async def work() -> None:
        late = AsyncClient(fake.address)
        await late.close()
        with pytest.raises(library.Cancelled, match="CANCELLED: the client was closed"):
            await late.model()
        with pytest.raises(library.Cancelled, match="CANCELLED: the client was closed"):
            await anext(late.stream("x"))

    asyncio.run(work())


@pytest.mark.parametrize("said", ["secret\n", "sécret", "sec\x00ret"])
@pytest.mark.parametrize("field", ["token", "tenant"])
def test_what_no_call_can_say_is_refused_and_not_repeated(field: str, said: str) -> None:
    with pytest.raises(library.InvalidArgument, match=f"^{field}: expected printable") as caught:
        Client(**{field: said})  # type: ignore[arg-type]
    assert caught.value.field == field and "ret" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "ask"),
    [
        ("text", lambda client: client.generate("\ud800")),
        ("adapter_id", lambda client: client.generate("x", adapter="\ud800")),
        ("adapter_id", lambda client: client.tokenize("x", adapter="\ud800")),
        ("adapter_id", lambda client: client.adapter("\ud800")),
        ("adapter_id", lambda client: client.pin("\ud800")),
        ("timeout", lambda client: client.generate("x", timeout=math.nan)),
        ("timeout", lambda client: client.adapter("x", timeout=math.nan)),
    ],
)
def test_what_no_message_holds_is_refused_by_name(
    field: str, ask: Callable[[Client], object]
) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidArgument) as refused:
        ask(client)
    assert refused.value.field == field


@pytest.mark.parametrize("seconds", [math.inf, 1e300])
def test_a_timeout_without_end_is_none(serving: Any, seconds: float) -> None:
    with serving() as running:
        assert running.client.adapter("a1", timeout=seconds).name == "a1"
        assert running.client.generate("x", sampling=SHORT, timeout=seconds).token_ids


def test_a_key_needs_its_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pem").write_text("some key")
    for name in ("KEY", "CERTIFICATE"):
        with monkeypatch.context() as environment:
            environment.setenv(f"SPIELDOSE_{name}", str(tmp_path / "a.pem"))
            with pytest.raises(ConfigError, match="expected SPIELDOSE_KEY and SPIELDOSE_CERT"):
                connect("127.0.0.1:1")


def test_a_full_server_says_when_to_come_back(serving: Any) -> None:
    with serving(max_requests=1) as running, Stream(running, "a1"):
        with pytest.raises(library.Busy, match=r"^RESOURCE_EXHAUSTED: ") as caught:
            running.client.generate("x", sampling=SHORT)
        assert caught.value.retry_after is not None
        assert 0 < caught.value.retry_after <= 60


def test_a_forged_token_is_refused_and_a_tenants_counts(serving: Any, tmp_path: Path) -> None:
    (tmp_path / "access.toml").write_text(table("red", "red-token", adapters='["a1"]'))
    with serving(access=str(tmp_path / "access.toml")) as running:
        address = f"127.0.0.1:{running.server.port}"
        with Client(address, token="forged") as client, pytest.raises(library.Unauthenticated):
            client.adapters()
        with Client(address, token="red-token") as client:
            assert [adapter.name for adapter in client.adapters()] == ["a1"]
            with pytest.raises(library.Forbidden):
                client.generate("x")


def test_every_status_is_an_error_with_its_code(fake: FakeServer) -> None:
    with Client(fake.address, retries=0) as client:
        for code in set(grpc.StatusCode) - {grpc.StatusCode.OK}:
            fake.plan = [fails(code)]
            with pytest.raises(ClientError) as caught:
                client.model()
            assert caught.value.code is code
            assert str(caught.value) == f"{code.name}: as planned"
            named = [kind for kind in ClientError.__subclasses__() if kind.code is code]
            assert [type(caught.value)] == (named or [ClientError])


def test_details_that_are_none_hide_no_error(fake: FakeServer) -> None:
    with Client(fake.address, retries=0) as client:
        fake.plan = [fails(grpc.StatusCode.INVALID_ARGUMENT, grpc_status_details_bin=b"\xff")]
        with pytest.raises(library.InvalidArgument) as caught:
            client.model()
        assert caught.value.field == ""


def test_errors_travel_between_processes(serving: Any) -> None:
    with serving() as running:
        with pytest.raises(library.InvalidArgument) as caught:
            running.client.tokenize("")
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (type(copy), str(copy), copy.code, copy.field) == (
            library.InvalidArgument,
            str(caught.value),
            grpc.StatusCode.INVALID_ARGUMENT,
            "text",
        )


def test_tokens_are_what_an_answer_would_be_to(serving: Any) -> None:
    with serving() as running:
        messages = [pb.ChatMessage(role="user", content="hello")]
        for prompt in ("hello", messages):
            tokens = running.client.tokenize(prompt, adapter="a1")
            reply = running.client.generate(prompt, adapter="a1", sampling=SHORT)
            assert len(tokens) == reply.prompt_tokens
