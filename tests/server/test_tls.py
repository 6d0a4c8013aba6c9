"""TLS on a real socket: certificates change while streams run, strangers stay out."""

import contextlib
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client, ClientError
from spieldose_server.command_line import generate
from spieldose_server.config import ServerConfig
from spieldose_server.errors import ConfigError
from spieldose_server.tls import Certificates

from ..conftest import Running
from .test_access import table

LONG = pb.SamplingParams(max_tokens=300, min_tokens=300)
SHORT = pb.SamplingParams(max_tokens=3)


@dataclass(frozen=True)
class Files:
    """Hold where a server's certificate lies, and put others there."""

    directory: Path

    @property
    def settings(self) -> dict[str, str]:
        return {
            "tls_certificate": str(self.directory / "server.pem"),
            "tls_key": str(self.directory / "server.key"),
        }

    def certificate(self, issued: trustme.LeafCert) -> None:
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        (self.directory / "server.pem").write_bytes(chain)

    def key(self, issued: trustme.LeafCert) -> None:
        (self.directory / "server.key").write_bytes(issued.private_key_pem.bytes())


def issue(authority: trustme.CA, files: Files) -> trustme.LeafCert:
    issued = authority.issue_cert("127.0.0.1")
    files.certificate(issued)
    files.key(issued)
    return issued


@pytest.fixture
def files(tmp_path: Path) -> Files:
    (directory := tmp_path / "tls").mkdir()
    (tmp_path / "adapters").mkdir()
    return Files(directory)


def client(
    running: Running,
    authority: trustme.CA | None,
    own: trustme.LeafCert | None = None,
    *,
    port: int | None = None,
    **more: str,
) -> Client:
    credentials = None
    if authority is not None:
        root = authority.cert_pem.bytes()
        pair = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()) if own else ()
        credentials = grpc.ssl_channel_credentials(root, *pair)
    address = f"127.0.0.1:{port or running.server.port}"
    return Client(address, credentials=credentials, retries=0, **more)


def lets_in(
    running: Running, authority: trustme.CA | None, own: trustme.LeafCert | None = None
) -> bool:
    with client(running, authority, own) as asking:
        try:
            return asking.model().model != ""
        except ClientError as error:
            assert error.code is grpc.StatusCode.UNAVAILABLE
            return False


def test_a_certificate_is_replaced_while_streams_run(
    serve_tiny: Callable[..., Iterator[Running]], files: Files, tmp_path: Path
) -> None:
    before, after = trustme.CA(), trustme.CA()
    issue(before, files)
    with contextlib.contextmanager(serve_tiny)(tmp_path / "adapters", **files.settings) as running:
        assert lets_in(running, before)
        assert not lets_in(running, after)
        assert not lets_in(running, None)
        with client(running, before) as old:
            streams = [old.stream(f"stream {number}", sampling=LONG) for number in range(3)]
            begun = [next(stream) for stream in streams]
            new = after.issue_cert("127.0.0.1")
            files.certificate(new)
            assert lets_in(running, before)  # the key is the old one's: the pair is none
            assert not lets_in(running, after)
            files.key(new)
            assert lets_in(running, after)
            assert not lets_in(running, before)
            with client(running, after, port=running.server.admin_port) as admin:
                assert admin.adapters() == []  # each port asks for itself
            texts = [first + "".join(stream) for first, stream in zip(begun, streams, strict=True)]
            again = [old.generate(f"stream {number}", sampling=LONG) for number in range(3)]
        assert texts == [reply.text for reply in again]
        assert [len(reply.token_ids) for reply in again] == [300] * 3


def test_with_an_authority_only_its_clients_connect(
    serve_tiny: Callable[..., Iterator[Running]], files: Files, tmp_path: Path
) -> None:
    servers, clients, strangers = trustme.CA(), trustme.CA(), trustme.CA()
    issue(servers, files)
    clients.cert_pem.write_to_path(files.directory / "clients.pem")
    settings = files.settings | {"tls_client_ca": str(files.directory / "clients.pem")}
    with contextlib.contextmanager(serve_tiny)(tmp_path / "adapters", **settings) as running:
        assert lets_in(running, servers, clients.issue_cert("someone"))
        assert not lets_in(running, servers, strangers.issue_cert("someone"))
        assert not lets_in(running, servers)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_who_comes_again_shows_its_certificate_again(files: Files, version: str) -> None:
    servers, clients = trustme.CA(), trustme.CA()
    issue(servers, files)
    clients.cert_pem.write_to_path(files.directory / "clients.pem")
    settings = files.settings | {"tls_client_ca": str(files.directory / "clients.pem")}
    config = ServerConfig(base="b", adapters=files.directory, **settings)  # type: ignore[arg-type]
    certificates = Certificates.of(config)
    assert certificates is not None
    context = certificates.context()
    asking = ssl.create_default_context()
    asking.maximum_version = ssl.TLSVersion[version]
    servers.configure_trust(asking)
    clients.issue_cert("client").configure_cert(asking)
    first = shaken_hands(context, asking)
    assert first.session is None or not first.session.has_ticket
    again = shaken_hands(context, asking, first.session)
    assert not again.session_reused


def shaken_hands(
    served: ssl.SSLContext, asking: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> ssl.SSLObject:
    """Return a client's side of a connection without a socket, after a message to it."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = served.wrap_bio(up, down, server_side=True)
    client = asking.wrap_bio(down, up, server_hostname="127.0.0.1", session=session)
    unfinished = [client, server]
    while unfinished:
        for side in list(unfinished):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
                unfinished.remove(side)
    server.write(b"hello")
    assert client.read() == b"hello"
    return client


def test_a_certificate_names_its_tenant(
    serve_tiny: Callable[..., Iterator[Running]],
    files: Files,
    tmp_path: Path,
    make_adapter: Callable[..., Any],
) -> None:
    authority = trustme.CA()
    issue(authority, files)
    authority.cert_pem.write_to_path(files.directory / "ca.pem")
    for seed, name in enumerate(("red", "blue"), start=1):
        write_delta(tmp_path / "adapters" / f"{name}.safetensors", make_adapter(seed))
    (tmp_path / "access.toml").write_text(
        table("red", adapters='["red"]', certificates='["red.example", "spiffe://red/one"]')
        + table("blue", "blue-token", adapters='["blue"]', certificates='["blue.example", "Blue"]')
    )
    settings = files.settings | {
        "tls_client_ca": str(files.directory / "ca.pem"),
        "access": str(tmp_path / "access.toml"),
    }

    def sees(own: trustme.LeafCert, **more: str) -> list[str] | grpc.StatusCode:
        with client(running, authority, own, **more) as asking:
            try:
                return [adapter.name for adapter in asking.adapters()]
            except ClientError as error:
                return error.code

    unknown = grpc.StatusCode.UNAUTHENTICATED
    with contextlib.contextmanager(serve_tiny)(tmp_path / "adapters", **settings) as running:
        red = authority.issue_cert("red.example")
        assert sees(red) == ["red"]
        assert sees(authority.issue_cert("other.example", "blue.example")) == ["blue"]
        assert sees(authority.issue_cert(common_name="Blue")) == ["blue"]
        assert sees(authority.issue_cert("other.example")) is unknown
        assert sees(authority.issue_cert("red.example", "blue.example")) is unknown
        assert sees(red, token="blue-token") == ["blue"]
        assert sees(red, token="forged") is unknown
        assert running.refused() == 3
        with client(running, authority, red) as asking:
            assert asking.generate("hi", adapter="red", sampling=SHORT).token_ids
            for call in (asking.adapter, lambda name: asking.generate("hi", adapter=name)):
                with pytest.raises(ClientError) as refused:
                    call("blue")
                assert refused.value.code is grpc.StatusCode.NOT_FOUND
            with pytest.raises(ClientError) as refused:
                asking.load("red")
            assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED


def test_the_command_line_connects_by_tls(
    serve_tiny: Callable[..., Iterator[Running]],
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    authority = trustme.CA()
    issue(authority, files)
    authority.cert_pem.write_to_path(files.directory / "ca.pem")
    monkeypatch.setenv("SPIELDOSE_CA", str(files.directory / "ca.pem"))
    with contextlib.contextmanager(serve_tiny)(tmp_path / "adapters", **files.settings) as running:
        address = f"127.0.0.1:{running.server.port}"
        generate(["--prompt", "hello", "--max-tokens", "3", "--server", address])
        with client(running, authority) as asking:
            assert capsys.readouterr().out == asking.generate("hello", sampling=SHORT).text + "\n"
        monkeypatch.setenv("SPIELDOSE_CA", str(tmp_path / "none.pem"))
        with pytest.raises(ConfigError, match="expected a readable PEM file"):
            generate(["--prompt", "hello", "--server", address])


@pytest.mark.parametrize("spoil", ["certificate", "key", "pair", "none"])
def test_files_that_do_not_fit_are_refused(files: Files, spoil: str) -> None:
    authority = trustme.CA()
    issue(authority, files)
    paths = {name: Path(value) for name, value in files.settings.items()}
    if spoil == "pair":
        files.key(authority.issue_cert("127.0.0.1"))
    elif spoil == "none":
        paths["tls_key"].unlink()
    else:
        paths[f"tls_{spoil}"].write_text("no PEM")
    with pytest.raises(ConfigError, match="expected a certificate and its key, as PEM, in"):
        Certificates(paths["tls_certificate"], paths["tls_key"], None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tls_certificate": "a"}, "expected both or none"),
        ({"tls_key": "a"}, "expected both or none"),
        ({"tls_client_ca": "a"}, "expected a tls_certificate beside it"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        ServerConfig(base="b", adapters=tmp_path, **settings)
