"""Every call has a caller before a service sees it, or is refused."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
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
CHANNELZ = "/grpc.channelz."  # who is connected, and from where
NAMES = ("x509_subject_alternative_name", "x509_common_name")  # of a client's certificate

Continue = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Authenticate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not at run time
    """Set CALLER for each call from its token or its client's certificate.

    Without access rules everyone is the tenant it says it is.
    """

    def __init__(self, access: Access | None, *, steers: bool) -> None:
        """Take the rules; `steers` says whether administrators are taken for such on this port.

        Without rules all who reach a port that steers are.
        """
        self._access = access
        self._steers = steers

    async def intercept_service(
        self, continuation: Continue, details: grpc.HandlerCallDetails
    ) -> Any:
        """Go on with the call, which runs in this context, or with its refusal."""
        if details.method.startswith(OPEN):
            return await continuation(details)
        metadata = dict(details.invocation_metadata or ())
        try:
            caller = self._of_metadata(metadata)
            if caller is not None:
                self._let_in(caller, details.method)
        except ServerError as error:
            return _refusing(error)
        handler = await continuation(details)
        if caller is not None or handler is None:
            return handler
        return self._by_certificate(handler, details.method)

    def _of_metadata(self, metadata: dict[Any, Any]) -> Caller | None:
        """Return who calls; None: its certificate will tell. Raises ServerError."""
        if self._access is not None:
            given = str(metadata.get("authorization", ""))
            if not given and self._access.knows_certificates:
                return None
            is_token = given.lower().startswith(BEARER)
            return self._access.caller(given[len(BEARER) :].strip() if is_token else "")
        name = str(metadata.get(TENANT, ""))
        if len(name) > MAX_TENANT:
            raise InvalidRequest(
                TENANT, f"expected at most {MAX_TENANT} characters, got {len(name)}"
            )
        return Caller(name, admin=True)

    def _let_in(self, caller: Caller, method: str) -> None:
        """Make someone the caller of the running call. Raises Forbidden."""
        caller = replace(caller, admin=caller.admin and self._steers)
        if method.startswith(CHANNELZ):
            caller.check_admin()
        CALLER.set(caller)

    def _by_certificate(self, handler: Any, method: str) -> Any:
        """Put the look at the client's certificate around a method's handler."""
        access = self._access
        assert access is not None

        async def let_in(context: Any) -> None:
            found = context.auth_context()
            names = [name.decode("latin-1") for kind in NAMES for name in found.get(kind, ())]
            async with answering(context):
                self._let_in(access.named(names), method)

        async def answer(request: Any, context: Any) -> Any:
            await let_in(context)
            return await handler.unary_unary(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            await let_in(context)
            async with aclosing(handler.unary_stream(request, context)) as responses:
                async for response in responses:
                    yield response

        parse, serialise = handler.request_deserializer, handler.response_serializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, parse, serialise)
        return grpc.unary_unary_rpc_method_handler(answer, parse, serialise)


def _refusing(error: ServerError) -> Any:
    """Return a handler that refuses a call, whatever it sends."""

    async def refuse(request: object, context: Any) -> None:
        async with answering(context):
            raise error

    return grpc.unary_unary_rpc_method_handler(refuse)
