"""What a call to a server can end with; every class knows its gRPC status.

SpieldoseError
└── ClientError              any other status, which `code` tells
    ├── InvalidArgument      INVALID_ARGUMENT, names the field
    ├── Unauthenticated      UNAUTHENTICATED: no token or certificate, or none that counts
    ├── Forbidden            PERMISSION_DENIED
    ├── NotFound             NOT_FOUND: no such adapter, as far as who asks may know
    ├── FailedPrecondition   FAILED_PRECONDITION: an adapter that is there cannot be used
    ├── Busy                 RESOURCE_EXHAUSTED, says when to try again
    ├── Unavailable          UNAVAILABLE: no server answers there now
    ├── DeadlineExceeded     DEADLINE_EXCEEDED: the timeout has passed
    ├── Cancelled            CANCELLED: the client was closed meanwhile
    └── InternalError        INTERNAL: the server's own fault; its log tells more
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from spieldose_kernels.errors import SpieldoseError

CLOSED = "CANCELLED: the client was closed"


class ClientError(SpieldoseError):
    """The server refused or could not be reached; `code` is the gRPC status."""

    code = grpc.StatusCode.UNKNOWN


class InvalidArgument(ClientError):
    """A field of the request is out of range."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    field = ""  # such as sampling_params.top_p; empty if the server names none

    @classmethod
    def of(cls, field: str, problem: str) -> Self:
        """Return the error of a field that is not even sent."""
        error = cls(f"{field}: {problem}")
        error.field = field
        return error


class Unauthenticated(ClientError):
    """The server does not know who asks."""

    code = grpc.StatusCode.UNAUTHENTICATED


class Forbidden(ClientError):
    """Who asks may not do that."""

    code = grpc.StatusCode.PERMISSION_DENIED


class NotFound(ClientError):
    """There is no such adapter, as far as who asks may know."""

    code = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(ClientError):
    """The adapter is there, but was rejected, or is too large."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Busy(ClientError):
    """Too much is asked at once, or by this tenant; later it may be served."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retry_after: float | None = None  # seconds; None for a message too large, which stays so


class Unavailable(ClientError):
    """No server answers there, it is stopping, or it cannot read the adapter's file now."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(ClientError):
    """The timeout has passed; the server has dropped the call."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ClientError):
    """The client was closed while the call ran."""

    code = grpc.StatusCode.CANCELLED


class InternalError(ClientError):
    """The server failed in a way it did not foresee."""

    code = grpc.StatusCode.INTERNAL


KINDS = {kind.code: kind for kind in ClientError.__subclasses__()}


@contextmanager
def translating() -> Iterator[None]:
    """Turn gRPC's errors into ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise _translated(error) from None


def _translated(error: Any) -> ClientError:
    """Return the error of a call that failed, with what google.rpc details tell of it."""
    code: grpc.StatusCode = error.code()
    found = KINDS.get(code, ClientError)(f"{code.name}: {error.details()}")
    found.code = code
    request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in _details(error):
        if isinstance(found, InvalidArgument) and detail.Unpack(request):
            found.field = request.field_violations[0].field if request.field_violations else ""
        elif isinstance(found, Busy) and detail.Unpack(retry):
            found.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return found


def _details(error: Any) -> tuple[any_pb2.Any, ...]:
    status = status_pb2.Status()
    trailers = dict(error.trailing_metadata() or ())
    with suppress(DecodeError):  # what some proxy wrote there
        status.ParseFromString(trailers.get("grpc-status-details-bin", b""))
    return tuple(status.details)
