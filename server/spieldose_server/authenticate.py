"""Every call has a caller before a service sees it, or is refused."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from spieldose_server.access import CALLER, Caller
from spieldose_server.callers import Callers
from spieldose_server.errors import ServerError
from spieldose_server.observer import Observer
from spieldose_server.statuses import answering

# What says nothing of tenants or adapters; probes of health have no token.
OPEN = ("/grpc.health.v1.", "/grpc.reflection.")
CHANNELZ = "/grpc.channelz."  # who is connected, and from where
NAMES = ("x509_subject_alternative_name", "x509_common_name")  # of a client's certificate

WIRE = "grpc"

Continue = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Authenticate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not at run time
    """Set CALLER for each call from its metadata or its client's certificate."""

    def __init__(self, callers: Callers, observer: Observer) -> None:
        self._callers = callers
        self._observer = observer

    async def intercept_service(
        self, continuation: Continue, details: grpc.HandlerCallDetails
    ) -> Any:
        """Go on with the call, which runs in this context, or with its refusal."""
        if details.method.startswith(OPEN):
            return await continuation(details)
        metadata = {key: str(value) for key, value in details.invocation_metadata or ()}
        try:
            caller = self._callers.of(metadata)
            if caller is not None:
                _let_in(caller, details.method)
        except ServerError as error:
            self._observer.refused(WIRE, error)
            return _refusing(error)
        handler = await continuation(details)
        if caller is not None or handler is None:
            return handler
        return self._by_certificate(handler, details.method)

    def _by_certificate(self, handler: Any, method: str) -> Any:
        """Put the look at the client's certificate around a method's handler."""

        async def let_in(context: Any) -> None:
            found = context.auth_context()
            names = [name.decode("latin-1") for kind in NAMES for name in found.get(kind, ())]
            async with answering(context):
                try:
                    _let_in(self._callers.certified(names), method)
                except ServerError as error:
                    self._observer.refused(WIRE, error)
                    raise

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


def _let_in(caller: Caller, method: str) -> None:
    """Make someone the caller of the running call. Raises Forbidden."""
    if method.startswith(CHANNELZ):
        caller.check_admin()
    CALLER.set(caller)


def _refusing(error: ServerError) -> Any:
    """Return a handler that refuses a call, whatever it sends."""

    async def refuse(request: object, context: Any) -> None:
        async with answering(context):
            raise error

    return grpc.unary_unary_rpc_method_handler(refuse)
