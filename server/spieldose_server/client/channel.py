"""How a client's channel behaves, and what every call says of who asks."""

from typing import Any

from spieldose_server.config import MESSAGE_BYTES, TENANT


def channel_options() -> list[tuple[str, Any]]:
    """Return the options of a client's channel."""
    return [("grpc.max_receive_message_length", MESSAGE_BYTES)]


def call_metadata(tenant: str, token: str) -> tuple[tuple[str, str], ...]:
    """Return what calls say of who asks."""
    bearer = (("authorization", f"Bearer {token}"),) if token else ()
    return ((TENANT, tenant), *bearer)
