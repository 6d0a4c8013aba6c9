"""The routes, and what stands before them: who asks, and what went wrong."""

import secrets
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from spieldose_kernels.base import Base
from spieldose_server.access import CALLER
from spieldose_server.callers import Callers
from spieldose_server.errors import InvalidRequest, ServerError, UnknownAdapter
from spieldose_server.generation import Generation
from spieldose_server.observer import Observer
from spieldose_server.openai_http.answers import ChatObjects, CompletionObjects
from spieldose_server.openai_http.bodies import ChatBody, CompletionBody, read
from spieldose_server.openai_http.errors import response
from spieldose_server.openai_http.responding import ask, events, streamed, whole
from spieldose_server.openai_http.token_text import TokenText
from spieldose_server.store import AdapterStore
from spieldose_server.versions import Version

HEALTH = "/health"
WIRE = "http"
REQUEST_ID = "x-request-id"
ID = web.RequestKey("id", str)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class OpenAI:
    """Answer OpenAI's clients."""

    def __init__(
        self,
        base: Base,
        generation: Generation,
        store: AdapterStore,
        observer: Observer,
        callers: Callers,
    ) -> None:
        self._base = base.spec.name
        self._spelling = TokenText(base.tokenizer)
        self._generation = generation
        self._store = store
        self._observer = observer
        self._callers = callers

    def app(self, max_bytes: int) -> web.Application:
        """Return the application; bodies may have `max_bytes`."""
        app = web.Application(
            middlewares=[_in_openais_terms, self._let_in], client_max_size=max_bytes
        )
        complete = partial(self._generate, CompletionBody, CompletionObjects)
        chat = partial(self._generate, ChatBody, ChatObjects)
        app.add_routes(
            [
                web.get(HEALTH, self._health),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                web.post("/v1/completions", complete),
                web.post("/v1/chat/completions", chat),
            ]
        )
        return app

    @web.middleware
    async def _let_in(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer those nobody knows about nothing but health."""
        if request.path == HEALTH:
            return await handler(request)
        try:
            caller = self._callers.of(request.headers)
            CALLER.set(self._callers.certified(_names(request)) if caller is None else caller)
        except ServerError as error:
            self._observer.refused(WIRE, error)
            raise
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        """List the base and the adapters that the caller may play."""
        caller = CALLER.get()
        served = {v.name: v for v in self._store.list() if _served(v) and caller.may_play(v.name)}
        served.pop(self._base, None)  # that name plays the base
        found = [self._object(name, version) for name, version in served.items()]
        if caller.base:
            found.insert(0, self._object(self._base, None))
        return web.json_response({"object": "list", "data": found})

    async def _model(self, request: web.Request) -> web.Response:
        """Show one of them."""
        model = request.match_info["model"]
        adapter_id = self._adapter_id(model)
        caller = CALLER.get()
        if not adapter_id and not caller.base:
            raise UnknownAdapter(model)
        if not adapter_id:
            return web.json_response(self._object(model, None))
        caller.check_play(adapter_id)
        return web.json_response(self._object(model, self._store.resolve(adapter_id)))

    async def _generate(
        self,
        kind: type[CompletionBody] | type[ChatBody],
        objects: type[CompletionObjects] | type[ChatObjects],
        request: web.Request,
    ) -> web.StreamResponse:
        request_id = request[ID]
        given = await _sent(request)
        carrier = {key.lower(): value for key, value in request.headers.items()}
        with self._observer.request(WIRE, request_id, carrier) as observed:
            body: Any = read(kind, given)
            asked = ask(
                body,
                objects(self._spelling),
                adapter_id=self._adapter_id(body.model),
                request_id=request_id,
                most=self._generation.max_questions,
            )
            more = [self._observer.request(WIRE, request_id, carrier) for _ in asked.questions[1:]]
            found = events(asked, self._generation, [observed, *more])
            headers = {REQUEST_ID: request_id}
            async with aclosing(found):
                if asked.stream:
                    return await streamed(asked, found, request, headers)
                answered = await whole(asked, found)
                answered.headers.update(headers)
                return answered

    def _adapter_id(self, model: str) -> str:
        """Return what a model's name plays: an adapter, or "" for the base. Raises InvalidRequest.

        The base's name is the base, even if an adapter is called so.
        """
        if not model:
            raise InvalidRequest("model", "expected the base's or an adapter's name, got none")
        return "" if model == self._base else model

    def _object(self, model: str, version: Version | None) -> dict[str, Any]:
        stamp = None if version is None else version.stamp
        return {
            "id": model,
            "object": "model",
            "created": 0 if stamp is None else stamp.modified // 10**9,
            "owned_by": "spieldose",
            "parent": None if version is None else self._base,
        }


@web.middleware
async def _in_openais_terms(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer with an error what raises one; it names the request, too."""
    request[ID] = _id(request)
    try:
        return await handler(request)
    except ConnectionError:  # nobody is there any more to be told
        raise
    except Exception as error:
        answer = response(error)
        answer.headers[REQUEST_ID] = request[ID]
        return answer


async def _sent(request: web.Request) -> bytes:
    """Return a request's body. Raises InvalidRequest if it is not what its headers say."""
    try:
        return await request.read()
    except (HttpProcessingError, web.RequestPayloadError) as error:
        problem = f"expected a body as the headers say, got another: {type(error).__name__}"
        raise InvalidRequest("body", problem) from None


def _id(request: web.Request) -> str:
    """Return what a request is called: as it says, if that is text."""
    with suppress(UnicodeEncodeError):
        if (given := request.headers.get(REQUEST_ID, "")).encode():
            return given
    return secrets.token_hex(8)


def _served(version: Version) -> bool:
    return version.published and not version.retired and not version.reason


def _names(request: web.Request) -> list[str]:
    """Return the names in a client's certificate, which the connection has verified."""
    transport = request.transport
    found = (transport and transport.get_extra_info("peercert")) or {}
    subject = [pair for part in found.get("subject", ()) for pair in part]
    common = [value for key, value in subject if key == "commonName"]
    return [value for _, value in found.get("subjectAltName", ())] + common
