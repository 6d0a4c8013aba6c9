"""What can go wrong with a request; every class knows its gRPC status.

SpieldoseError
└── ServerError                INTERNAL
    ├── ConfigError            (never leaves the process)
    ├── InvalidRequest         INVALID_ARGUMENT, names the field
    ├── Unauthenticated        UNAUTHENTICATED
    ├── Forbidden              PERMISSION_DENIED
    ├── UnknownAdapter         NOT_FOUND
    ├── NoSuchFile             NOT_FOUND
    ├── RejectedAdapter        FAILED_PRECONDITION
    ├── AdapterTooLarge        FAILED_PRECONDITION
    ├── NoRoom                 FAILED_PRECONDITION
    ├── UnreadableAdapter      UNAVAILABLE
    ├── Busy                   RESOURCE_EXHAUSTED, says when to try again
    └── EngineStopped          UNAVAILABLE
"""

import grpc

from spieldose_kernels.errors import SpieldoseError


class ServerError(SpieldoseError):
    """A request cannot be served."""

    code = grpc.StatusCode.INTERNAL


class ConfigError(ServerError):
    """A setting of the server is out of range."""


class InvalidRequest(ServerError):
    """A field of the request is out of range."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = str(self).removeprefix(f"{field}: ")


class Unauthenticated(ServerError):
    """Nobody knows who asks."""

    code = grpc.StatusCode.UNAUTHENTICATED


class Forbidden(ServerError):
    """Who asks may not do that."""

    code = grpc.StatusCode.PERMISSION_DENIED


class UnknownAdapter(ServerError):
    """No adapter of that name is served, as far as who asks may know."""

    code = grpc.StatusCode.NOT_FOUND

    def __init__(self, adapter_id: str) -> None:
        super().__init__(f"expected a served adapter, got {adapter_id!r}")


class NoSuchFile(ServerError):
    """There is no delta file of that name."""

    code = grpc.StatusCode.NOT_FOUND


class RejectedAdapter(ServerError):
    """There is a file of that name, but it cannot be used."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class AdapterTooLarge(ServerError):
    """An adapter takes more than all the adapter memory."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class NoRoom(ServerError):
    """Pinned adapters leave too little room for another."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class UnreadableAdapter(ServerError):
    """An adapter's file cannot be read now; that need not stay so."""

    code = grpc.StatusCode.UNAVAILABLE


class Busy(ServerError):
    """Too much is asked at once; later it may be served."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, problem: str, *, retry: float) -> None:
        super().__init__(problem)
        self.retry = retry  # seconds


class EngineStopped(ServerError):
    """The engine takes no more requests."""

    code = grpc.StatusCode.UNAVAILABLE
