"""Our errors as gRPC statuses."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from spieldose_kernels.errors import SpieldoseError
from spieldose_server.errors import Busy, InvalidRequest, ServerError

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


@asynccontextmanager
async def answering(context: Context) -> AsyncIterator[None]:
    """Turn our errors into gRPC statuses; any other is logged, and its text stays inside."""
    try:
        yield
    except SpieldoseError as error:
        code = error.code if isinstance(error, ServerError) else grpc.StatusCode.INTERNAL
        await context.abort(code, str(error), trailing_metadata=_details(error, code))
    except grpc.aio.AbortError:
        raise
    except Exception:
        log.exception("unexpected error")
        await context.abort(grpc.StatusCode.INTERNAL, "internal error")


def _details(error: SpieldoseError, code: grpc.StatusCode) -> tuple[tuple[str, str | bytes], ...]:
    """Return trailing metadata: google.rpc details for programs, and gRPC's own for its retries."""
    detail = any_pb2.Any()
    pushback: tuple[tuple[str, str], ...] = ()
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.problem
        )
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    elif isinstance(error, Busy):
        retry, milliseconds = error_details_pb2.RetryInfo(), round(1000 * error.retry)
        retry.retry_delay.FromMilliseconds(milliseconds)
        detail.Pack(retry)
        pushback = (("grpc-retry-pushback-ms", str(milliseconds)),)
    else:
        return ()
    status = status_pb2.Status(code=code.value[0], message=str(error), details=[detail])
    return (("grpc-status-details-bin", status.SerializeToString()), *pushback)
