"""Bytes that are no message of their method's type are refused before a service sees them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from spieldose_proto import inference_pb2 as pb

OURS = f"/{pb.DESCRIPTOR.package}."  # every method of these takes one message

Handler = Any  # gRPC's own, or None if there is no such method
Continue = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


class RefuseMalformed(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not at run time
    """Answer them with INVALID_ARGUMENT; gRPC itself says UNKNOWN, and logs a stack each time."""

    async def intercept_service(
        self, continuation: Continue, details: grpc.HandlerCallDetails
    ) -> Handler:
        """Put the check around the handler of a method of ours."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(OURS):
            return handler

        def parse(payload: bytes) -> Any:
            try:
                return handler.request_deserializer(payload)
            except DecodeError as error:
                return error

        async def check(request: Any, context: Any) -> None:
            if isinstance(request, DecodeError):
                problem = f"expected a request message of {details.method}, got other bytes"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)

        async def answer(request: Any, context: Any) -> Any:
            await check(request, context)
            return await handler.unary_unary(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            await check(request, context)
            async with aclosing(handler.unary_stream(request, context)) as responses:
                async for response in responses:
                    yield response

        serialise = handler.response_serializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, parse, serialise)
        return grpc.unary_unary_rpc_method_handler(answer, parse, serialise)
