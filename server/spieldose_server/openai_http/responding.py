"""A request to generate, answered whole or as a stream of server-sent events."""

import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from spieldose_server.errors import InvalidRequest
from spieldose_server.generation import Completed, Generation, Piece
from spieldose_server.merged import merged
from spieldose_server.observed import Observed
from spieldose_server.openai_http.answers import (
    ChatObjects,
    Choice,
    CompletionObjects,
    Head,
    Usage,
)
from spieldose_server.openai_http.bodies import ChatBody, CompletionBody
from spieldose_server.openai_http.errors import described
from spieldose_server.request import Question

Event = tuple[int, Piece | Completed]  # with the place of its prompt
EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Hold a request, checked and in the server's terms."""

    questions: list[Question]
    head: Head
    objects: ChatObjects | CompletionObjects
    stream: bool
    include_usage: bool

    def choice(self, prompt: int, event: Piece | Completed) -> Choice:
        """Return an event as the part of an answer that it is."""
        answers = self.questions[0].sampling.n
        choice = Choice(prompt * answers + event.index)
        choice.add(event)
        return choice


def ask(
    body: ChatBody | CompletionBody,
    objects: ChatObjects | CompletionObjects,
    *,
    adapter_id: str,
    request_id: str,
    most: int,
) -> Asked:
    """Return what a body asks for, in `most` questions. Raises InvalidRequest."""
    name, prompts = body.prompts()
    if len(prompts) > most:
        raise InvalidRequest(name, f"expected at most {most} prompts, got {len(prompts)}")
    sampling = body.sampling()
    questions = [
        Question(
            id=request_id,
            adapter_id=adapter_id,
            field=name,
            prompt=prompt,
            sampling=sampling,
            default_tokens=body.default_tokens,
            constraint_field=body.constraint_field,
        )
        for prompt in prompts
    ]
    head = Head(objects.prefix + secrets.token_hex(12), body.model, sampling.logprobs is not None)
    usage = body.stream_options.include_usage
    return Asked(
        questions=questions, head=head, objects=objects, stream=body.stream, include_usage=usage
    )


async def events(
    asked: Asked, generation: Generation, observed: Sequence[Observed]
) -> AsyncGenerator[Event]:
    """Yield what comes of every answer to every prompt. Raises ServerError."""

    async def numbered(number: int, question: Question, seen: Observed) -> AsyncGenerator[Event]:
        with seen:
            async with aclosing(generation.answers(question, seen)) as answers:
                async for event in answers:
                    yield number, event

    streams = [
        numbered(number, question, seen)
        for number, (question, seen) in enumerate(zip(asked.questions, observed, strict=True))
    ]
    async with aclosing(merged(streams)) as found:
        async for event in found:
            yield event


async def whole(asked: Asked, found: AsyncIterator[Event]) -> web.Response:
    """Return all answers at once."""
    answers = asked.questions[0].sampling.n
    choices = [Choice(index) for index in range(len(asked.questions) * answers)]
    usage = Usage()
    async for prompt, event in found:
        choices[prompt * answers + event.index].add(event)
        if isinstance(event, Completed):
            usage.add(prompt, event)
    objects, head = asked.objects, asked.head
    made = [objects.choice(choice, logprobs=head.logprobs) for choice in choices]
    return web.json_response(head.of(objects.whole, made, usage=usage.object()))


async def streamed(
    asked: Asked, found: AsyncIterator[Event], request: web.Request, headers: dict[str, str]
) -> web.StreamResponse:
    """Send answers as they come; what goes wrong after the first is sent as the last event."""
    first = await anext(found)  # what goes wrong before is an ordinary error
    response = web.StreamResponse(headers=EVENT_STREAM | headers)
    await response.prepare(request)
    try:
        async for part in _parts(asked, first, found):
            await response.write(_event(json.dumps(part)))
    except ConnectionError:
        raise
    except Exception as error:
        await response.write(_event(json.dumps(described(error)[1])))
    else:
        await response.write(_event("[DONE]"))
    await response.write_eof()
    return response


async def _parts(
    asked: Asked, first: Event, rest: AsyncIterator[Event]
) -> AsyncGenerator[dict[str, Any]]:
    objects, head = asked.objects, asked.head
    usage, begun = Usage(), set[int]()
    none = {"usage": None} if asked.include_usage else {}
    async for prompt, event in _all(first, rest):
        choice = asked.choice(prompt, event)
        if isinstance(event, Completed):
            usage.add(prompt, event)
        elif not event.text and not (head.logprobs and event.token_ids):
            continue  # half a character
        new = choice.index not in begun
        begun.add(choice.index)
        delta = objects.delta(choice, first=new, logprobs=head.logprobs)
        yield head.of(objects.part, [delta], **none)
    if asked.include_usage:
        yield head.of(objects.part, [], usage=usage.object())


async def _all(first: Event, rest: AsyncIterator[Event]) -> AsyncIterator[Event]:
    yield first
    async for event in rest:
        yield event


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
