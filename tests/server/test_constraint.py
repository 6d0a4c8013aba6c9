"""Constrained answers parse, whatever else is asked for, and are what the model likes best."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
import regex
import torch
from llguidance import LLMatcher

from spieldose_proto import inference_pb2 as pb
from spieldose_server import constraint
from spieldose_server.client import ClientError, Reply
from spieldose_server.constraint import Constraint

from ..conftest import Running

SHORT = {"type": "string", "maxLength": 6}
SCHEMAS: dict[str, Any] = {
    "record": {
        "type": "object",
        "properties": {"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "choice": {"enum": ["Grüße", "né\n", '"', "\\", 7, None]},
    "constant": {"const": {"a": [1, {"b": "…"}]}},
    "either": {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 1, "maximum": 9}]},
    "reference": {
        "$defs": {"pair": {"type": "array", "prefixItems": [SHORT, {"type": "null"}],
                           "minItems": 2, "items": False}},
        "type": "object",
        "properties": {"first": {"$ref": "#/$defs/pair"}, "second": {"$ref": "#/$defs/pair"}},
        "required": ["first"],
        "additionalProperties": False,
    },
    "pattern": {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]+x$", "maxLength": 12},
    "date": {"type": "string", "format": "date"},
}  # fmt: skip
PATTERNS = [
    r"(yes|no|maybe)",
    r"[A-Z][a-z]{1,8}( [A-Z][a-z]{1,8}){1,2}",
    r"\d{1,3}(\.\d{1,3}){3}",
    r"(19|20)\d\d/(0[1-9]|1[0-2])/[0-3]\d",
    r"(ü|…|🎵){3}",
    r"\{\"a\": \"[^\"\\\x00-\x1f]{0,9}\"\}",
    r"#[0-9a-f]{6}\n",
    r"[\w.]{4}\s[\d\s]{3}\D\W\\d",
]


def ask(running: Running, *, adapter: str = "", **sampling: Any) -> Reply:
    params = pb.SamplingParams(**{"max_tokens": 400} | sampling)
    return running.client.generate("hello", adapter=adapter, sampling=params)


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_fulfils_its_schema(running: Running, name: str) -> None:
    def sampled(seed: int) -> Reply:
        schema = json.dumps(SCHEMAS[name])
        adapter = ("", "a1", "a2")[seed % 3]
        return ask(running, adapter=adapter, json_schema=schema, temperature=2.0, seed=seed)

    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(sampled, range(12)))
    for reply in replies:
        assert reply.finish_reason == "stop"
        jsonschema.validate(json.loads(reply.text), SCHEMAS[name])
    if name != "constant":
        assert len({reply.text for reply in replies}) > 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_answer_matches_its_pattern_as_a_whole(running: Running, pattern: str) -> None:
    for seed in range(6):
        reply = ask(running, regex=pattern, temperature=3.0, top_k=40, seed=seed)
        assert reply.finish_reason == "stop"
        assert re.fullmatch(pattern, reply.text), reply.text


def test_the_likeliest_of_what_may_come_next_is_taken(running: Running) -> None:
    pattern = r"[a-f]{3,6}-[0-9]{2,4}"
    assert ask(running, regex=pattern).token_ids == reference(running, pattern)


def reference(running: Running, pattern: str) -> tuple[int, ...]:
    """Go through all tokens at every step, the likeliest first; each is one byte here."""
    tokenizer: Any = running.base.tokenizer
    model: Any = running.base.model
    prompt, answer = tokenizer("hello")["input_ids"], list[int]()
    while tokenizer.eos_token_id not in answer:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, -1]
        answer.append(next(token for token in logits.argsort(descending=True).tolist()
                           if may_follow(answer, token, tokenizer, pattern)))  # fmt: skip
    return tuple(answer)


def may_follow(answer: list[int], token: int, tokenizer: Any, pattern: str) -> bool:
    if token == tokenizer.eos_token_id:
        return bool(regex.fullmatch(pattern, tokenizer.decode(answer)))
    if token in tokenizer.all_special_ids:
        return False
    return bool(regex.fullmatch(pattern, tokenizer.decode([*answer, token]), partial=True))


def test_an_empty_schema_is_any_json(running: Running) -> None:
    for seed in range(8):
        reply = ask(running, json_schema="{}", temperature=1.5, seed=seed, max_tokens=200)
        if reply.finish_reason == "stop":
            json.loads(reply.text)
        else:
            assert len(reply.token_ids) == 200


def test_every_one_of_several_answers_is_constrained(running: Running) -> None:
    sampling = pb.SamplingParams(n=4, temperature=3.0, seed=3, regex=r"[0-9]{4}", max_tokens=9)
    answers = running.client.answers("hello", sampling=sampling)
    assert all(re.fullmatch(r"[0-9]{4}", answer.text) for answer in answers)
    assert len({answer.text for answer in answers}) == 4


def test_penalties_and_constraints_go_together(running: Running) -> None:
    reply = ask(running, regex="[ab]{20}", frequency_penalty=2.0, logprobs=1)
    assert re.fullmatch("[ab]{20}", reply.text)
    assert abs(reply.text.count("a") - 10) <= 2
    assert len(reply.logprobs) == len(reply.token_ids)


def test_neighbours_are_free(running: Running) -> None:
    alone = ask(running, max_tokens=60)
    with ThreadPoolExecutor(2) as pool:
        free = pool.submit(ask, running, max_tokens=60)
        bound = pool.submit(ask, running, regex="[0-9]{60}", max_tokens=60)
    assert free.result().token_ids == alone.token_ids
    assert re.fullmatch("[0-9]{60}", bound.result().text)
    assert bound.result().finish_reason == "length"


def test_a_constrained_request_survives_the_loss_of_its_kv_cache(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path
) -> None:
    patterns = [r"([a-z]{9} ){11}", r"([0-9]{9}-){11}"]
    # three pages: both fit at first, then one is begun anew with its answer in its prompt
    for running in serve_tiny(tmp_path, kv_tokens=192):
        limit = partial(ask, running, max_tokens=180)
        with ThreadPoolExecutor(2) as pool:
            streams = [pool.submit(limit, regex=pattern) for pattern in patterns]
        for pattern, stream in zip(patterns, streams, strict=True):
            assert re.fullmatch(pattern, stream.result().text)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"json_schema": ""}, "json_schema: expected a JSON schema: "),
        ({"json_schema": "{"}, "json_schema: expected a JSON schema: "),
        ({"json_schema": '{"type": "frob"}'}, "json_schema: Invalid type: frob"),
        ({"json_schema": '{"uniqueItems": true}'}, "json_schema: Unimplemented keys"),
        ({"json_schema": '{"type": "string", "maxLength": "x"}'}, "json_schema: "),
        ({"json_schema": '{"$ref": "http://127.0.0.1/x"}'}, "json_schema: Resource"),
        ({"json_schema": "[" * 100_000}, "json_schema: "),
        ({"json_schema": " " * (1 << 19)}, "json_schema: expected at most 262144 bytes"),
        ({"regex": "(a"}, "regex: "),
        ({"regex": r"(a)\1"}, "regex: "),
        ({"regex": "(?=a)b"}, "regex: "),
        ({"regex": "((a{1000}){1000}){1000}"}, "regex: "),
        ({"regex": "a" * (1 << 19)}, "regex: expected at most 262144 bytes"),
        ({"regex": "a", "stop": ["b"]}, "stop: expected none"),
        ({"regex": "a", "stop_token_ids": [3]}, "stop_token_ids: expected none"),
        ({"json_schema": "{}", "min_tokens": 2}, "min_tokens: expected none"),
    ],
)
def test_a_wrong_constraint_is_refused_in_one_line(
    running: Running, sampling: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ClientError) as caught:
        ask(running, **sampling)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert f"sampling_params.{expected}" in str(caught.value)


def test_a_grammar_that_cannot_be_followed_fails_its_request_alone(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = Constraint.allowed

    def lost(constraint: Constraint, answer: list[int]) -> torch.Tensor:
        if len(answer) == 3:
            constraint._matcher.consume_token(0)  # not what the pattern has there
        return allowed(constraint, answer)

    monkeypatch.setattr(Constraint, "allowed", lost)
    with pytest.raises(ClientError) as caught:
        ask(running, regex="[x-z]{9}")
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    monkeypatch.undo()
    assert re.fullmatch("[x-z]{9}", ask(running, regex="[x-z]{9}").text)


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", "ab" * 100_000])
def test_what_takes_long_to_follow_is_refused(running: Running, pattern: str) -> None:
    with pytest.raises(ClientError, match=r"INVALID_ARGUMENT: sampling_params\.regex: lexer error"):
        ask(running, regex=pattern)


def test_what_may_begin_an_answer_is_found_out_aside(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longest, and would hold up all who play meanwhile."""
    threads: list[str] = []
    mask = constraint._mask

    def noted(matcher: LLMatcher) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return mask(matcher)

    monkeypatch.setattr(constraint, "_mask", noted)
    reply = ask(running, regex="[a-f]{4}", n=2)
    assert len(reply.token_ids) == 5  # the end of sequence, too
    assert threads[0].startswith("prepare")
    assert not any(name.startswith("prepare") for name in threads[1:])
    assert len(threads) == 1 + 2 * 4
