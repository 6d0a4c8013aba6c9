"""How a client's channel behaves, and what every call says of who asks."""

from typing import Any

from spieldose_server.client.errors import InvalidArgument
from spieldose_server.config import MESSAGE_BYTES, TENANT

CALL_SECONDS = 60.0  # that a call which makes no text may take, unless it is told otherwise
RECONNECT_SECONDS = 5  # at most between two tries; gRPC's own limit is 2 minutes
SILENCE_SECONDS = 30  # after which a server is asked whether it is still there
PING_SECONDS = 10  # that it has to say so


def channel_options() -> list[tuple[str, Any]]:
    """Return the options of a client's channel."""
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_reconnect_backoff_ms", 1000 * RECONNECT_SECONDS),
        ("grpc.keepalive_time_ms", 1000 * SILENCE_SECONDS),
        # 1 minute otherwise, whatever grpc.keepalive_timeout_ms says: measured with grpcio 1.85
        ("grpc.http2.ping_timeout_ms", 1000 * PING_SECONDS),
        ("grpc.http2.max_pings_without_data", 0),  # a queue may be silent for long
        ("grpc.enable_retries", 0),  # attempts.py makes them
    ]


def call_metadata(tenant: str, token: str) -> tuple[tuple[str, str], ...]:
    """Return what calls say of who asks. Raises InvalidArgument for what no call can say."""
    for name, text in (("tenant", tenant), ("token", token)):
        if not (text.isascii() and (text.isprintable() or not text)):
            raise InvalidArgument.of(name, "expected printable ASCII characters alone")
    bearer = (("authorization", f"Bearer {token}"),) if token else ()
    return ((TENANT, tenant), *bearer)
