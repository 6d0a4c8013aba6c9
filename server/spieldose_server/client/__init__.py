"""Clients for Python programs; the command line uses them too."""

from spieldose_server.client.aio import AsyncClient
from spieldose_server.client.errors import (
    Busy,
    Cancelled,
    ClientError,
    DeadlineExceeded,
    FailedPrecondition,
    Forbidden,
    InternalError,
    InvalidArgument,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from spieldose_server.client.reply import Reply
from spieldose_server.client.sync import Client

__all__ = [
    "AsyncClient",
    "Busy",
    "Cancelled",
    "Client",
    "ClientError",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Forbidden",
    "InternalError",
    "InvalidArgument",
    "NotFound",
    "Reply",
    "Unauthenticated",
    "Unavailable",
]
