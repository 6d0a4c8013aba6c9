"""Our errors as OpenAI's clients expect them."""

import logging
import math
from typing import Any

import grpc
from aiohttp import web

from spieldose_kernels.errors import SpieldoseError
from spieldose_server.errors import Busy, InvalidRequest, ServerError

log = logging.getLogger(__name__)

Code = grpc.StatusCode
STATUSES = {  # as google.rpc.Code says; clients try those of 409, 429 and 5xx again
    Code.INVALID_ARGUMENT: (400, "invalid_request_error", None),
    Code.FAILED_PRECONDITION: (400, "invalid_request_error", "model_not_usable"),
    Code.UNAUTHENTICATED: (401, "authentication_error", "invalid_api_key"),
    Code.PERMISSION_DENIED: (403, "permission_error", None),
    Code.NOT_FOUND: (404, "invalid_request_error", "model_not_found"),
    Code.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded"),
    Code.UNAVAILABLE: (503, "server_error", None),
    Code.INTERNAL: (500, "server_error", None),
}
FIELDS = {"json_schema": "response_format", "regex": "structured_outputs"}


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return an error's HTTP status and body; of what is unexpected the text stays inside."""
    if isinstance(error, web.HTTPException):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return error.status, _body(error.reason, kind)
    if not isinstance(error, SpieldoseError):
        log.error("unexpected error", exc_info=error)
        return 500, _body("internal error", "server_error")
    status, kind, code = STATUSES[error.code if isinstance(error, ServerError) else Code.INTERNAL]
    if not isinstance(error, InvalidRequest):
        return status, _body(str(error), kind, code)
    field = error.field.removeprefix("sampling_params.")
    field = FIELDS.get(field, field)
    return status, _body(f"{field}: {error.problem}", kind, code, param=field)


def response(error: Exception) -> web.Response:
    """Return an error as a response."""
    status, body = described(error)
    headers = {"Retry-After": str(math.ceil(error.retry))} if isinstance(error, Busy) else {}
    return web.json_response(body, status=status, headers=headers)


def _body(
    message: str, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
