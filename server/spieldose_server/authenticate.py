"""Every call has a caller before a service sees it, or is refused."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from spieldose_server.access import CALLER, Access, Caller
from spieldose_server.config import TENANT
from spieldose_server.errors import InvalidRequest, ServerError
from spieldose_server.statuses import answering

MAX_TENANT = 128  # characters
BEARER = "bearer "
# What says nothing of tenants or adapters; probes of health have no token.
OPEN = ("/grpc.health.v1.", "/grpc.reflection.")

Continue = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Authenticate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not at run time
    """Set CALLER for each call from its token; without access rules, from the name it gives."""

    def __init__(self, access: Access | None) -> None:
        self._access = access

    async def intercept_service(
        self, continuation: Continue, details: grpc.HandlerCallDetails
    ) -> Any:
        """Go on with the call, which runs in this context, or with its refusal."""
        if not details.method.startswith(OPEN):
            try:
                CALLER.set(self._caller(details))
            except ServerError as error:
                return _refusing(error)
        return await continuation(details)

    def _caller(self, details: grpc.HandlerCallDetails) -> Caller:
        """Return who asks. Raises Unauthenticated or InvalidRequest."""
        metadata = dict(details.invocation_metadata or ())
        if self._access is not None:
            given = str(metadata.get("authorization", ""))
            is_token = given.lower().startswith(BEARER)
            return self._access.caller(given[len(BEARER) :].strip() if is_token else "")
        name = str(metadata.get(TENANT, ""))
        if len(name) > MAX_TENANT:
            raise InvalidRequest(
                TENANT, f"expected at most {MAX_TENANT} characters, got {len(name)}"
            )
        return Caller(name)


def _refusing(error: ServerError) -> Any:
    """Return a handler that refuses a call, whatever it sends."""

    async def refuse(request: object, context: Any) -> None:
        async with answering(context):
            raise error

    return grpc.unary_unary_rpc_method_handler(refuse)
