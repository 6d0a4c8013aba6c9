"""How commands reach a server: with what the environment says of who asks."""

import os
from pathlib import Path
from typing import TypedDict

import grpc

from spieldose_server.client import AsyncClient, Client
from spieldose_server.client.attempts import RETRIES
from spieldose_server.errors import ConfigError


class WhoAsks(TypedDict):
    """What the environment says of who asks: a flag with a token could be read by all here."""

    token: str
    credentials: grpc.ChannelCredentials | None


def connect(server: str, *, retries: int = RETRIES) -> Client:
    """Connect as the environment says. Raises ConfigError for a PEM file that cannot be read."""
    return Client(server, retries=retries, **_who_asks())


async def connect_loop(server: str) -> AsyncClient:
    """Connect the running event loop, as `connect` does. Raises ConfigError."""
    return AsyncClient(server, **_who_asks())


def _who_asks() -> WhoAsks:
    files = [os.environ.get(f"SPIELDOSE_{name}") for name in ("CA", "KEY", "CERTIFICATE")]
    try:
        pem = [Path(file).read_bytes() if file else None for file in files]
    except OSError as error:
        raise ConfigError(f"expected a readable PEM file, got: {error}") from error
    if bool(pem[1]) != bool(pem[2]):  # gRPC would end the process
        raise ConfigError("expected SPIELDOSE_KEY and SPIELDOSE_CERTIFICATE, or neither, got one")
    credentials = grpc.ssl_channel_credentials(*pem) if any(pem) else None
    token = os.environ.get("SPIELDOSE_TOKEN", "").strip()  # files of secrets end in a newline
    return WhoAsks(token=token, credentials=credentials)
