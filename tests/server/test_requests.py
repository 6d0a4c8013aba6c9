"""What a client may ask, and how a wrong request is refused."""

import logging
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client, ClientError
from spieldose_server.request import DEFAULT_MAX_TOKENS, MAX_MESSAGES

from ..conftest import Running, eventually

MAX_CONTEXT = 512


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("prompt", pb.GenerateRequest()),
        ("text", pb.GenerateRequest(text="")),
        ("text", pb.GenerateRequest(text="x" * MAX_CONTEXT)),
        ("text", pb.GenerateRequest(text="x" * (2 << 20))),
        ("text", pb.GenerateRequest(text="x" * (7 << 20))),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds())),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 100_000]))),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * MAX_CONTEXT))),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 2_000_000))),
        ("messages", pb.GenerateRequest(messages=pb.ChatMessages())),
        (
            "messages",
            pb.GenerateRequest(
                messages=pb.ChatMessages(messages=[pb.ChatMessage()] * (MAX_MESSAGES + 1))
            ),
        ),
        (
            "messages",
            pb.GenerateRequest(
                messages=pb.ChatMessages(messages=[pb.ChatMessage(role="judge", content="x")])
            ),
        ),
        *(
            (
                f"sampling_params.{name}",
                pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(**{name: value})),
            )
            for name, value in [
                ("temperature", -0.1),
                ("temperature", 10.5),
                ("temperature", float("nan")),
                ("temperature", float("inf")),
                ("top_p", 0.0),
                ("top_p", 1.1),
                ("top_p", float("nan")),
                ("top_k", 1 << 31),
                ("max_tokens", 0),
                ("max_tokens", MAX_CONTEXT),
                ("stop", [""]),
                ("stop", [str(i) for i in range(17)]),
                ("stop", ["é\n" * 100_000, ""]),
                ("stop", ["x"] * 500_000),
                ("stop_token_ids", [1] * 500_000),
                ("min_tokens", MAX_CONTEXT),
            ]
        ),
    ],
)
def test_a_wrong_field_is_named(running: Running, field: str, request_: pb.GenerateRequest) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(running.client.inference.Generate(request_))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(f"{field}: expected")
    status = rpc_status.from_call(caught.value)
    detail = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(detail)
    assert detail.field_violations[0].field == field
    assert len(caught.value.details().splitlines()) == 1
    assert len(caught.value.details()) <= 1000


def test_an_unknown_adapter_is_not_found(running: Running) -> None:
    for name in ("nobody", "../a1", "a1.safetensors", "A1"):
        with pytest.raises(ClientError) as caught:
            running.client.generate("x", adapter=name)
        assert caught.value.code == grpc.StatusCode.NOT_FOUND


def test_a_refused_request_disturbs_no_running_one(running: Running) -> None:
    sampling = pb.SamplingParams(max_tokens=200)
    alone = running.client.generate("hello", adapter="a1", sampling=sampling)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(running.client.generate, "hello", adapter="a1", sampling=sampling)
        for _ in range(20):
            with pytest.raises(ClientError):
                running.client.generate("x", adapter="nobody")
            with pytest.raises(ClientError):
                running.client.generate("")
    assert stream.result().token_ids == alone.token_ids


def test_min_tokens_alone_is_kept_beyond_the_default_of_max_tokens(running: Running) -> None:
    asked = pb.SamplingParams(min_tokens=DEFAULT_MAX_TOKENS + 10)
    assert len(running.client.generate("x", sampling=asked).token_ids) == DEFAULT_MAX_TOKENS + 10


def test_max_tokens_ends_with_length(running: Running) -> None:
    reply = running.client.generate("hello", sampling=pb.SamplingParams(max_tokens=7))
    assert (len(reply.token_ids), reply.finish_reason, reply.prompt_tokens) == (7, "length", 5)


def test_text_is_the_decoded_tokens(running: Running) -> None:
    reply = running.client.generate("hello", sampling=pb.SamplingParams(max_tokens=60))
    decode = running.base.tokenizer.decode
    assert reply.text == decode(reply.token_ids, skip_special_tokens=True)


def test_a_stop_string_ends_the_text_before_it(running: Running) -> None:
    whole = running.client.generate("hello", sampling=pb.SamplingParams(max_tokens=60)).text
    stop = whole[20:23]
    sampling = pb.SamplingParams(max_tokens=60, stop=["not there", stop])
    reply = running.client.generate("hello", sampling=sampling)
    assert reply.text == whole[: whole.index(stop)]
    assert reply.finish_reason == "stop"


def test_chat_messages_go_through_the_template(running: Running) -> None:
    message = pb.ChatMessage(role="user", content="hello")
    asked = pb.ChatMessages(messages=[message])
    tokens = running.client.inference.Tokenize(pb.TokenizeRequest(messages=asked)).token_ids
    rendered = "<|user|>hello<|end|>\n<|assistant|>"
    assert list(tokens) == running.base.tokenizer(rendered)["input_ids"]
    sampling = pb.SamplingParams(max_tokens=9)
    chat = running.client.generate([message], sampling=sampling)
    assert chat.token_ids == running.client.generate(rendered, sampling=sampling).token_ids


def test_token_ids_are_taken_as_they_are(running: Running) -> None:
    sampling = pb.SamplingParams(max_tokens=9)
    ids = pb.TokenIds(ids=running.base.tokenizer("hello")["input_ids"])
    request = pb.GenerateRequest(request_id="mine", token_ids=ids, sampling_params=sampling)
    responses = list(running.client.inference.Generate(request))
    got = tuple(token for response in responses for token in response.chunk.token_ids)
    assert got == running.client.generate("hello", sampling=sampling).token_ids
    assert {response.request_id for response in responses} == {"mine"}


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(running: Running) -> None:
    alone = [sample(running.client, seed) for seed in range(20)]
    with ThreadPoolExecutor(20) as pool:
        crowd = list(pool.map(sample, [running.client] * 20, range(20)))
    assert crowd == alone
    assert len(set(alone)) == 20


def test_without_a_seed_samples_differ(running: Running) -> None:
    sampling = pb.SamplingParams(max_tokens=20, temperature=2.0)
    replies = {running.client.generate("hello", sampling=sampling).token_ids for _ in range(4)}
    assert len(replies) == 4


def test_greedy_is_the_default_and_top_k_1_is_greedy(running: Running) -> None:
    greedy = running.client.generate("hello", sampling=pb.SamplingParams(max_tokens=20))
    narrow = pb.SamplingParams(max_tokens=20, temperature=1.5, top_k=1)
    assert running.client.generate("hello", sampling=narrow).token_ids == greedy.token_ids


def test_the_model_is_described(running: Running) -> None:
    info = running.client.model()
    assert info.fingerprint == running.base.spec.fingerprint
    assert (info.max_context, info.has_chat_template) == (MAX_CONTEXT, True)


def sample(client: Client, seed: int) -> tuple[int, ...]:
    sampling = pb.SamplingParams(max_tokens=20, temperature=1.5, top_p=0.95, top_k=40, seed=seed)
    return client.generate("hello", adapter=f"a{seed % 4 + 1}", sampling=sampling).token_ids


def test_a_request_id_begins_no_line_of_the_log(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    request = pb.GenerateRequest(
        request_id="mine\nINFO forged", text="x", sampling_params=pb.SamplingParams(max_tokens=2)
    )
    with caplog.at_level(logging.INFO):
        list(running.client.inference.Generate(request))
        eventually(lambda: "forged" in caplog.text)
    assert not any("\n" in record.getMessage() for record in caplog.records)
