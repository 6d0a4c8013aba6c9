"""The official `openai` client, unchanged, against a running server."""

import asyncio
import contextlib
import gc
import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import jsonschema
import openai
import pytest
import trustme
from pydantic import ValidationError
from tokenizers.decoders import DecodeStream

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.errors import InvalidRequest
from spieldose_server.openai_http import bodies

from ..conftest import Running, eventually
from .test_access import table
from .test_process import free_port, process
from .test_tls import Files, issue

SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["count"],
    "additionalProperties": False,
}
HI: Any = [{"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
GREEDY_12 = pb.SamplingParams(max_tokens=12)

LISTENING: dict[str, Any] = {"http_listen": "127.0.0.1:0", "max_message_bytes": 100_000}


@pytest.fixture
def served(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Iterator[Running]:
    """A server with the adapters a1 and a2 that OpenAI's clients may use."""
    for seed in (1, 2):
        write_delta(tmp_path / f"a{seed}.safetensors", make_adapter(seed))
    yield from serve_tiny(tmp_path, **LISTENING)


@pytest.fixture
def patient(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Iterator[Running]:
    """The same with an adapter a1 alone; a drain cuts off nothing, however slow the machine."""
    write_delta(tmp_path / "a1.safetensors", make_adapter(1))
    yield from serve_tiny(tmp_path, **LISTENING, drain_seconds=120.0)


def settings(running: Running, **more: Any) -> dict[str, Any]:
    url = f"http://127.0.0.1:{running.server.http_port}/v1"
    return {"base_url": url, "api_key": "none", "max_retries": 0} | more


@pytest.fixture
def client(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(**settings(served)) as client:
        yield client


def base_of(running: Running) -> str:
    return running.client.model().model


def test_models_are_the_base_and_its_adapters(served: Running, client: openai.OpenAI) -> None:
    base = base_of(served)
    (served.directory / "bad.safetensors").write_bytes(b"no delta")
    eventually(lambda: "rejected" in served.state("bad"))
    assert [model.id for model in client.models.list()] == [base, "a1", "a2"]
    assert client.models.retrieve("a2").id == "a2"
    assert client.models.retrieve(base).id == base


def test_an_adapter_by_the_bases_name_is_not_offered(
    serve_tiny: Callable[..., Iterator[Running]],
    tiny_directory: Path,
    tmp_path: Path,
    make_adapter: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny_directory.parent)
    name = tiny_directory.name
    for seed, adapter in enumerate((name, "z1")):
        write_delta(tmp_path / f"{adapter}.safetensors", make_adapter(seed))
    serving = contextlib.contextmanager(serve_tiny)
    with (
        serving(tmp_path, http_listen="127.0.0.1:0", base=name) as running,
        openai.OpenAI(**settings(running)) as client,
    ):
        assert [model.id for model in client.models.list()] == [name, "z1"]


@pytest.mark.parametrize("adapter", ["a1", "a2", ""])
def test_completions_equal_grpcs(served: Running, client: openai.OpenAI, adapter: str) -> None:
    sampling = pb.SamplingParams(max_tokens=12)
    expected = served.client.generate("hello", adapter=adapter, sampling=sampling)
    model = adapter or base_of(served)
    whole = client.completions.create(model=model, prompt="hello", **GREEDY)
    assert whole.choices[0].text == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 12)
    assert whole.usage.total_tokens == 17
    stream = client.completions.create(model=model, prompt="hello", stream=True, **GREEDY)
    parts = list(stream)
    assert "".join(part.choices[0].text for part in parts) == expected.text
    assert [part.choices[0].finish_reason for part in parts][-1] == "length"
    assert len(parts) > 2


def test_chats_equal_grpcs(served: Running, client: openai.OpenAI) -> None:
    turns = [pb.ChatMessage(role=role, content=role[::-1]) for role in ("system", "user")]
    expected = served.client.generate(
        turns, adapter="a1", sampling=pb.SamplingParams(max_tokens=12)
    )
    messages: Any = [
        {"role": "developer", "content": "metsys"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "re"}, {"type": "text", "text": "su"}],
        },
    ]
    whole = client.chat.completions.create(model="a1", messages=messages, **GREEDY)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].message.role == "assistant"
    options: Any = {"stream_options": {"include_usage": True}}
    parts = list(
        client.chat.completions.create(
            model="a1", messages=messages, stream=True, **GREEDY, **options
        )
    )
    *answers, last = parts
    assert "".join(part.choices[0].delta.content or "" for part in answers) == expected.text
    assert answers[0].choices[0].delta.role == "assistant"
    assert not last.choices
    assert whole.usage is not None
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
        whole.usage.total_tokens,
    )


def test_prompts_come_as_texts_and_as_tokens(client: openai.OpenAI) -> None:
    def texts(prompt: Any, **more: Any) -> list[str]:
        answer = client.completions.create(model="a1", prompt=prompt, **GREEDY, **more)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    (one,), (other,) = texts("one"), texts("other")
    assert texts(["one", "other"]) == [one, other]
    assert texts(["one", "other"], n=2) == [one, one, other, other]
    several = client.completions.create(model="a1", prompt=["one", "other"], n=2, **GREEDY)
    assert several.usage is not None
    assert several.usage.prompt_tokens == len("one") + len("other")
    assert several.usage.completion_tokens == 4 * 12
    tokens = [ord(letter) - ord("!") for letter in "one"]  # of the tiny byte tokenizer
    assert texts(tokens) == [one]
    assert texts([tokens, tokens]) == [one, one]


def test_parts_of_several_answers_name_theirs_and_are_never_empty(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "a1", "prompt": ["one", "other"], "n": 2, "max_tokens": 40}
    whole = client.completions.create(temperature=0, **asked)
    texts = dict.fromkeys(range(4), "")
    for part in client.completions.create(temperature=0, stream=True, **asked):
        (choice,) = part.choices
        assert choice.text or choice.finish_reason
        texts[choice.index] += choice.text
    assert list(texts.values()) == [choice.text for choice in whole.choices]


def test_defaults_are_openais(client: openai.OpenAI) -> None:
    endless: dict[str, Any] = {"temperature": 0, "extra_body": {"min_tokens": 16}}
    usage = client.completions.create(model="a1", prompt="x", **endless).usage
    assert usage is not None and usage.completion_tokens == 16
    parts = client.chat.completions.create(model="a1", messages=HI, stream=True, **GREEDY)
    roles = [part.choices[0].delta.role for part in parts]
    assert roles == ["assistant", *[None] * (len(roles) - 1)] and len(roles) > 2


def test_several_answers_with_a_seed_differ_and_come_again(client: openai.OpenAI) -> None:
    def answers(seed: int) -> list[str | None]:
        made = client.chat.completions.create(
            model="a2", messages=HI, n=3, seed=seed, max_completion_tokens=8
        )
        return [choice.message.content for choice in made.choices]

    assert answers(7) == answers(7)
    assert len(set(answers(7))) == 3
    assert answers(-7) != answers(7)


def test_logprobs(served: Running, client: openai.OpenAI) -> None:
    asked = pb.SamplingParams(max_tokens=6, logprobs=3)
    turn = pb.ChatMessage(role="user", content="hi")
    expected = served.client.generate([turn], adapter="a1", sampling=asked)
    chat = client.chat.completions.create(
        model="a1", messages=HI, logprobs=True, top_logprobs=3, temperature=0, max_tokens=6
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert [each.logprob for each in content] == [each.logprob for each in expected.logprobs]
    for each in content:
        assert len(each.top_logprobs) == 3
        assert each.top_logprobs[0].logprob == each.logprob  # greedy
        assert each.bytes is not None
        assert len(each.bytes) == 1  # the tiny tokenizer's tokens are bytes
    said = bytes(byte for each in content for byte in each.bytes or ())
    assert said.decode(errors="replace") == expected.text
    plain = client.completions.create(model="a1", prompt="hello", logprobs=2, **GREEDY)
    found = plain.choices[0].logprobs
    assert found is not None
    assert found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 12
    ids = list(served.client.generate("hello", adapter="a1", sampling=GREEDY_12).token_ids)
    decoder: Any = DecodeStream(skip_special_tokens=True)
    tokenizer: Any = served.base.tokenizer
    pieces = [decoder.step(tokenizer.backend_tokenizer, token) or "" for token in ids]
    assert found.text_offset == [len("".join(pieces[:n])) for n in range(12)]
    streamed = client.completions.create(
        model="a1", prompt="hello", logprobs=2, stream=True, **GREEDY
    )
    parts = [part.choices[0].logprobs for part in streamed]
    assert [t for part in parts if part for t in part.tokens or ()] == found.tokens
    assert [t for part in parts if part for t in part.text_offset or ()] == found.text_offset


def test_a_json_schema_binds_the_answer(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    for seed in range(3):
        made = client.chat.completions.create(
            model="a1", messages=HI, response_format=wanted, seed=seed, max_tokens=60
        )
        assert made.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(made.choices[0].message.content or ""), SCHEMA)
    made = client.chat.completions.create(
        model="a1",
        messages=HI,
        max_tokens=20,
        extra_body={"structured_outputs": {"regex": "(ja|nein)"}},
    )
    assert made.choices[0].message.content in ("ja", "nein")


def test_vllms_fields_and_neutral_ones_pass(served: Running, client: openai.OpenAI) -> None:
    asked = pb.SamplingParams(
        max_tokens=12, min_tokens=3, repetition_penalty=1.5, temperature=1, top_k=3, seed=5
    )
    expected = served.client.generate("hello", adapter="a1", sampling=asked)
    extra = {"min_tokens": 3, "repetition_penalty": 1.5, "top_k": 3, "tools": [], "echo": False}
    made = client.completions.create(
        model="a1", prompt="hello", max_tokens=12, seed=5, user="someone", extra_body=extra
    )
    assert made.choices[0].text == expected.text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompt": [-2]}, "prompt: expected another value .*: Input should be greater than"),
        ({"prompt": "x", "stop": ["x"] * 17}, "stop: expected another value .* at most 16 items"),
        ({"prompt": "x", "top_k": -2}, "top_k: expected another value: .* greater than or equal"),
    ],
)
def test_it_is_said_what_a_value_should_be(more: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        bodies.read(bodies.CompletionBody, json.dumps({"model": "a1"} | more).encode())


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"temperature": 11}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"temperature": "hot"}}, "temperature"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "nothing"}},
                }
            },
            "response_format",
        ),
        ({"extra_body": {"structured_outputs": {"json": "x"}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "messages",
        ),
    ],
)
def test_what_is_wrong_or_not_served_is_refused_by_name(
    client: openai.OpenAI, more: dict[str, Any], field: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**({"model": "a1", "messages": HI} | more))
    assert refused.value.param == field
    assert refused.value.type == "invalid_request_error"
    assert f"{field}: " in refused.value.message


def test_a_conversation_goes_on_as_openais_clients_write_it(client: openai.OpenAI) -> None:
    asked: Any = client.chat.completions.create
    messages = list(HI)
    for _ in range(2):
        reply = asked(model="a1", messages=messages, **GREEDY)
        messages += [reply.choices[0].message, {"role": "user", "content": "and then?"}]
    messages[1] = messages[1].model_dump()
    assert asked(model="a1", messages=messages, stream_options=None, **GREEDY).choices


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (r'{"model": "a1", "prompt": "half \ud83d"}', "prompt"),
        (r'{"model": "a1", "prompt": "x", "stop": ["\uDC00"]}', "stop"),
        ("[" * 100_000, "body"),
        ('{"model": "a1", "prompt": [' + ",".join(["{}"] * 25_000) + "]}", "prompt"),
        ('{"model": "a1", "prompt": [' + ",".join(['"a"'] * 20_000) + "]}", "prompt"),
        ('{"model": "a1", "prompt": "x", "stop": [' + ",".join(["1"] * 40_000) + "]}", "stop"),
        (json.dumps({"model": "a1", "prompt": "x"} | {f"k{i}": 1 for i in range(6_000)}), "k0"),
        ('{"model": "a1", "prompt": "x", "stream_options": {"odd": 1}}', "stream_options"),
    ],
)
def test_a_body_that_nobody_can_serve_is_refused_soon(
    served: Running, monkeypatch: pytest.MonkeyPatch, body: str, param: str
) -> None:
    told: list[int] = []
    first = bodies._first

    def counted(error: ValidationError) -> Exception:
        told.append(error.error_count())
        return first(error)

    monkeypatch.setattr(bodies, "_first", counted)
    connection = http.client.HTTPConnection("127.0.0.1", served.server.http_port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", body, {"x-request-id": "mine"})
        answer = connection.getresponse()
        said = json.loads(answer.read())["error"]
    assert (answer.status, said["param"]) == (400, param)
    assert answer.headers["x-request-id"] == "mine"
    assert max(told, default=0) <= 4  # one for each kind a prompt may be


def test_completions_fit_their_default_into_the_room_there_is(
    served: Running, client: openai.OpenAI
) -> None:
    room = served.client.model().max_context - 5
    asked: Any = client.completions.create
    made = asked(model="a1", prompt=[7] * room, temperature=0)
    assert made.usage.completion_tokens <= 5
    endless = asked(model="a1", prompt="x", temperature=0, extra_body={"min_tokens": 20})
    assert endless.usage.completion_tokens >= 20


def test_errors_are_openais(served: Running, client: openai.OpenAI) -> None:
    for call in (
        lambda: client.completions.create(model="nobody", prompt="x"),
        lambda: client.completions.create(model="nobody", prompt="x", stream=True),
        lambda: client.models.retrieve("nobody"),
    ):
        with pytest.raises(openai.NotFoundError) as unknown:
            call()
        assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="a1", prompt="x" * 200_000)
    assert large.value.status_code == 413
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="a1", input="x")
    (served.directory / "bad.safetensors").write_bytes(b"no delta")
    eventually(lambda: "rejected" in served.state("bad"))
    with pytest.raises(openai.BadRequestError, match="rejected"):
        client.completions.create(model="bad", prompt="x")


def test_a_full_server_says_when_to_come_back(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path
) -> None:
    serving = contextlib.contextmanager(serve_tiny)
    with (
        serving(tmp_path, http_listen="127.0.0.1:0", max_requests=1) as running,
        openai.OpenAI(**settings(running)) as client,
    ):
        model = base_of(running)
        long: dict[str, Any] = {"max_tokens": 400, "extra_body": {"min_tokens": 400}}
        with client.completions.create(model=model, prompt="x", stream=True, **long) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as busy:
                client.completions.create(model=model, prompt="x")
        assert int(busy.value.response.headers["retry-after"]) >= 1
        # closing the stream cancelled it: there is room at once, by the client's own retries
        with openai.OpenAI(**settings(running, max_retries=5)) as patient:
            assert patient.completions.create(model=model, prompt="x").choices[0].text


def test_who_goes_away_gives_up_place_and_slot(served: Running, client: openai.OpenAI) -> None:
    long: dict[str, Any] = {"max_tokens": 450, "extra_body": {"min_tokens": 450}}
    with client.completions.create(model="a1", prompt="x", stream=True, **long) as stream:
        next(iter(stream))
        assert served.client.adapter("a1").running == 1
    eventually(lambda: served.client.adapter("a1").running == 0, seconds=2)
    assert served.server.admission.accepted == 0
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model="a1", prompt="x", timeout=0.2, **long)
    eventually(lambda: served.client.adapter("a1").running == 0, seconds=2)
    assert served.server.admission.accepted == 0


def test_many_at_once_from_asyncio(served: Running) -> None:
    models = ["a1", "a2", base_of(served)] * 5
    sampling = pb.SamplingParams(max_tokens=12)
    expected = [
        served.client.generate(
            "hello", adapter=name if name != models[2] else "", sampling=sampling
        )
        for name in models[:3]
    ] * 5

    async def ask(client: openai.AsyncOpenAI, model: str, streams: bool) -> str:
        if not streams:
            made = await client.completions.create(model=model, prompt="hello", **GREEDY)
            return made.choices[0].text
        stream = await client.completions.create(model=model, prompt="hello", stream=True, **GREEDY)
        return "".join([part.choices[0].text async for part in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(**settings(served)) as client:
            asking = [ask(client, name, bool(at % 2)) for at, name in enumerate(models)]
            return await asyncio.gather(*asking)

    assert asyncio.run(ask_all()) == [reply.text for reply in expected]


def test_request_ids_come_back(served: Running, client: openai.OpenAI) -> None:
    asked = client.completions.with_raw_response
    made = asked.create(
        model="a1", prompt="x", max_tokens=2, extra_headers={"x-request-id": "mine"}
    )
    assert made.headers["x-request-id"] == "mine"
    with raw(served, b"X-Request-Id: \xff") as response:  # no text: it gets another
        assert response.status == 200 and len(response.headers["x-request-id"]) == 16
    assert asked.create(model="a1", prompt="x", max_tokens=2).headers["x-request-id"]
    with pytest.raises(openai.BadRequestError, match="request_id: expected at most 128"):
        asked.create(model="a1", prompt="x", extra_headers={"x-request-id": "x" * 129})


@contextlib.contextmanager
def raw(
    running: Running, header: bytes, body: bytes = b'{"model": "a1", "prompt": "x"}'
) -> Iterator[http.client.HTTPResponse]:
    """Ask for a completion with one more header."""
    with socket.create_connection(
        ("127.0.0.1", running.server.http_port), timeout=60
    ) as connection:
        lines = [b"POST /v1/completions HTTP/1.1", b"Host: here", header]
        if not header.startswith(b"Transfer-Encoding"):
            lines.append(b"Content-Length: %d" % len(body))
        connection.sendall(b"\r\n".join([*lines, b"", body]))
        response = http.client.HTTPResponse(connection)
        response.begin()
        yield response


@pytest.mark.parametrize(
    "header",
    [
        b"Authorization: Bearer SECRET\x01",
        b"Transfer-Encoding: chunked",  # as which the body is not sent
        b"Content-Encoding: gzip",  # as which it is not sent either
        b"Content-Encoding: deflate",
    ],
)
def test_what_is_no_http_is_refused_and_not_logged(
    served: Running, caplog: pytest.LogCaptureFixture, header: bytes
) -> None:
    caplog.set_level("INFO")
    with raw(served, header, b'{"model": "a1", "prompt": "SECRET"}') as response:
        assert response.status == 400
    time.sleep(0.1)  # it is logged once the connection has gone
    assert "SECRET" not in caplog.text and "Traceback" not in caplog.text
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_tenants_see_and_play_their_own(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> None:
    (directory := tmp_path / "adapters").mkdir()
    for seed, name in enumerate(("red", "blue"), start=1):
        write_delta(directory / f"{name}.safetensors", make_adapter(seed))
    (tmp_path / "access.toml").write_text(
        table("red", "red-token", adapters='["red"]')
        + table("late", "late-token", expires="2025-01-01", adapters='["*"]')
        + table("operator", "operator-token", admin="true", base="true")
    )
    access = str(tmp_path / "access.toml")
    serving = contextlib.contextmanager(serve_tiny)
    with serving(directory, http_listen="127.0.0.1:0", access=access) as running:
        with openai.OpenAI(**settings(running, api_key="red-token")) as red:
            assert [model.id for model in red.models.list()] == ["red"]
            assert red.completions.create(model="red", prompt="x").choices[0].text
            for model in ("blue", "nobody"):
                for call in (
                    lambda model=model: red.completions.create(model=model, prompt="x"),
                    lambda model=model: red.chat.completions.create(model=model, messages=HI),
                    lambda model=model: red.models.retrieve(model),
                ):
                    with pytest.raises(openai.NotFoundError) as unknown:
                        call()
                    assert f"expected a served adapter, got {model!r}" in unknown.value.message
            with pytest.raises(openai.PermissionDeniedError):
                red.completions.create(model=running.base.spec.name, prompt="x")
        for token in ("forged", "late-token"):
            with openai.OpenAI(**settings(running, api_key=token)) as stranger:
                for call in (
                    stranger.models.list,
                    lambda: stranger.completions.create(model="red", prompt="x"),
                ):
                    with pytest.raises(openai.AuthenticationError, match="expected a valid token"):
                        call()
        assert running.refused() == 4
        with openai.OpenAI(**settings(running, api_key="operator-token")) as operator:
            assert [model.id for model in operator.models.list()] == [running.base.spec.name]


def test_a_token_that_is_no_text_is_refused(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path
) -> None:
    (tmp_path / "access.toml").write_text(table("red", "red-token"))
    (tmp_path / "adapters").mkdir()
    more = {"http_listen": "127.0.0.1:0", "access": str(tmp_path / "access.toml")}
    with contextlib.contextmanager(serve_tiny)(tmp_path / "adapters", **more) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.server.http_port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", "/v1/models", headers={"Authorization": b"Bearer \xff\xfe"})
            assert connection.getresponse().status == 401
        assert running.refused() == 1


def test_a_drain_lets_running_answers_end_and_takes_no_more(patient: Running) -> None:
    long: dict[str, Any] = {"max_tokens": 300, "extra_body": {"min_tokens": 300}}
    url = f"http://127.0.0.1:{patient.server.http_port}/health"
    assert urlopen(url, timeout=5).status == 200
    with openai.OpenAI(**settings(patient)) as client:
        expected = client.completions.create(model="a1", prompt="x", temperature=0, **long)
        stream = client.completions.create(
            model="a1", prompt="x", temperature=0, stream=True, **long
        )
        text = next(stream).choices[0].text
        assert patient.server._openai is not None
        stopping = asyncio.run_coroutine_threadsafe(patient.server._openai.stop(), patient.loop)
        eventually(lambda: not reaches(url))
        with pytest.raises(openai.APIError):
            client.completions.create(model="a1", prompt="x")
        assert text + "".join(part.choices[0].text for part in stream) == expected.choices[0].text
    stopping.result(20)


@pytest.mark.parametrize("turns", range(4))
def test_a_connection_accepted_as_the_server_closes_is_closed(served: Running, turns: int) -> None:
    listener = served.server._openai
    assert listener is not None

    async def connect_and_stop() -> None:
        with socket.create_connection(("127.0.0.1", listener.port)):
            for _ in range(turns):  # of the loop, until the connection is accepted
                await asyncio.sleep(0)
            await listener.stop()

    served.do(connect_and_stop())
    gc.collect()  # a lost one warns


def test_sigterm_lets_a_stream_end(
    tiny_directory: Path, tmp_path: Path, make_adapter: Callable[..., Any]
) -> None:
    write_delta(tmp_path / "a1.safetensors", make_adapter(1))
    http = f"127.0.0.1:{free_port()}"
    long: dict[str, Any] = {"model": "a1", "prompt": "x", "temperature": 0, "max_tokens": 200}
    with (
        process(tiny_directory, tmp_path, "--http-listen", http, "--drain-seconds", "120") as (
            server,
            _,
        ),
        openai.OpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=0) as client,
    ):
        expected = client.completions.create(**long).choices[0].text
        stream = client.completions.create(stream=True, **long)
        text = next(stream).choices[0].text
        server.terminate()
        assert text + "".join(part.choices[0].text for part in stream) == expected
        assert server.wait(30) == 0


def no_token(request: Any) -> None:
    del request.headers["Authorization"]


def reaches(url: str) -> bool:
    try:
        return bool(urlopen(url, timeout=5).status == 200)
    except OSError:
        return False


def test_https_takes_replaced_certificates_and_knows_tenants_by_theirs(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> None:
    (directory := tmp_path / "adapters").mkdir()
    (tls := tmp_path / "tls").mkdir()
    write_delta(directory / "red.safetensors", make_adapter(1))
    before, after, clients = trustme.CA(), trustme.CA(), trustme.CA()
    issue(before, Files(tls))
    clients.cert_pem.write_to_path(tls / "clients.pem")
    (tmp_path / "access.toml").write_text(
        table("red", adapters='["red"]', certificates='["red.example"]')
    )

    def client(authority: trustme.CA, *names: str) -> openai.OpenAI:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        if names:
            clients.issue_cert(*names).configure_cert(context)
        return openai.OpenAI(
            base_url=f"https://127.0.0.1:{running.server.http_port}/v1",
            api_key="none",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(
                verify=context, event_hooks={"request": [no_token]}
            ),
        )

    more = {"tls_client_ca": str(tls / "clients.pem"), "access": str(tmp_path / "access.toml")}
    serving = contextlib.contextmanager(serve_tiny)
    with (
        serving(directory, http_listen="127.0.0.1:0", **more, **Files(tls).settings) as running,
        client(before, "red.example") as red,
    ):
        long: dict[str, Any] = {"max_tokens": 200, "extra_body": {"min_tokens": 200}}
        stream = red.completions.create(model="red", prompt="x", stream=True, **long)
        next(stream)
        issue(after, Files(tls))
        with client(after, "red.example") as renewed:
            assert [model.id for model in renewed.models.list()] == ["red"]
        for stranger in (client(before, "red.example"), client(after)):
            with stranger, pytest.raises(openai.APIConnectionError):
                stranger.models.list()
        nobody = client(after, "nobody.example")
        with nobody, pytest.raises(openai.AuthenticationError):
            nobody.models.list()
        assert [part.choices[0].finish_reason for part in stream][-1] == "length"
