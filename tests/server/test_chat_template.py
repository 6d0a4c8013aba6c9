"""Messages go through the chat template of the adapter that plays them."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import ClientError

from ..conftest import Running, eventually
from .test_adapters import Stream

MESSAGES = [pb.ChatMessage(role="user", content="hello")]
SHORT = pb.SamplingParams(max_tokens=6)

Write = Callable[[str, str], str]


@pytest.fixture
def write(running: Running, make_adapter: Callable[..., Adapter]) -> Write:
    """Write an adapter with a template of its own and wait for it; return its digest."""

    def write(name: str, template: str) -> str:
        adapter = make_adapter(5)
        info = replace(adapter.info, chat_template=template)
        before = {each.digest for each in running.server.store.list()}
        write_delta(running.directory / f"{name}.safetensors", Adapter(info, adapter.modules))
        eventually(lambda: current(running, name) not in (*before, ""))
        return current(running, name)

    return write


def current(running: Running, name: str) -> str:
    found = [v for v in running.server.store.list() if v.name == name and not v.retired]
    return found[0].digest if found else ""


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def tokens(running: Running, adapter: str) -> list[int]:
    request = pb.TokenizeRequest(messages=pb.ChatMessages(messages=MESSAGES), adapter_id=adapter)
    return list(running.client.inference.Tokenize(request).token_ids)


def test_an_adapters_own_template_is_used_and_no_others(running: Running, write: Write) -> None:
    write("a", "A:{{ messages[0]['content'] }}>")
    write("b", "{% for m in messages %}B:{{ m['content'] }}{% endfor %}")
    encode: Any = running.base.tokenizer
    for adapter, text in [
        ("a", "A:hello>"),
        ("b", "B:hello"),
        ("a1", "<|user|>hello<|end|>\n<|assistant|>"),
        ("", "<|user|>hello<|end|>\n<|assistant|>"),
    ]:
        assert tokens(running, adapter) == encode(text)["input_ids"]
        chat = running.client.generate(MESSAGES, adapter=adapter, sampling=SHORT)
        plain = running.client.generate(text, adapter=adapter, sampling=SHORT)
        assert (chat.token_ids, chat.prompt_tokens) == (plain.token_ids, plain.prompt_tokens)


def test_a_replaced_template_is_used_at_once(running: Running, write: Write) -> None:
    write("a", "one {{ messages[0]['content'] }}")
    write("a", "number two {{ messages[0]['content'] }}")
    reply = running.client.generate(MESSAGES, adapter="a", sampling=SHORT)
    assert reply.prompt_tokens == len("number two hello")


def test_a_request_that_waits_while_its_adapter_is_replaced_gets_the_new_template(
    serve_tiny: Any, tmp_path: Path, make_adapter: Callable[..., Adapter]
) -> None:
    adapter = make_adapter(5)

    def put(template: str) -> None:
        info = replace(adapter.info, chat_template=template)
        write_delta(tmp_path / "a.safetensors", Adapter(info, adapter.modules))

    put("one {{ messages[0]['content'] }}")
    write_delta(tmp_path / "a1.safetensors", make_adapter(1))
    with contextmanager(serve_tiny)(tmp_path, max_adapters=1) as running:
        with Stream(running, "a1"):  # holds the only slot
            call = running.client.inference.Generate(
                pb.GenerateRequest(
                    messages=pb.ChatMessages(messages=MESSAGES),
                    adapter_id="a",
                    sampling_params=SHORT,
                )
            )
            eventually(lambda: running.client.adapter("a").running == 1)
            put("number two {{ messages[0]['content'] }}")
            eventually(lambda: current(running, "a") == digest(tmp_path / "a.safetensors"))
        complete = list(call)[-1].complete
        assert complete.adapter.digest == digest(tmp_path / "a.safetensors")
        assert complete.prompt_tokens == len("number two hello")


def test_a_template_that_refuses_a_conversation_says_so(running: Running, write: Write) -> None:
    write("a", "{{ raise_exception('no such thing, please') }}")
    with pytest.raises(ClientError, match=r"INVALID_ARGUMENT: messages: .*no such thing, please"):
        running.client.generate(MESSAGES, adapter="a", sampling=SHORT)
    assert running.client.generate("x", adapter="a", sampling=SHORT).adapter.startswith("a@")


def test_a_template_without_end_is_ended_and_others_are_rendered(
    running: Running, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spieldose_server.prompts.TEMPLATE_SECONDS", 0.5)
    endless = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"
    )
    write("endless", endless)
    write("a", "A:{{ messages[0]['content'] }}>")
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(tokens, running, "endless") for _ in range(20)]
        assert tokens(running, "a")
        assert running.client.generate("x", sampling=SHORT).token_ids
        for each in asked:
            with pytest.raises(grpc.RpcError) as caught:
                each.result()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "expected an end within 0.5 s" in caught.value.details()


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ 7 / 0 }}", "{{ a.b.c }}", "{% if %}"]
)
def test_a_template_that_is_broken_or_reaches_out_of_its_sandbox_is_the_requests_error(
    running: Running, write: Write, template: str
) -> None:
    write("a", template)
    with pytest.raises(ClientError, match="INVALID_ARGUMENT: messages: the chat template"):
        running.client.generate(MESSAGES, adapter="a", sampling=SHORT)
