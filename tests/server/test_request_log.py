"""One line of the log for every request: who, what, how, how long, and nothing of its text."""

import json
import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client, ClientError
from spieldose_server.log_format import formatter, printable

from ..conftest import Running, eventually
from .test_process import process

SHORT = pb.SamplingParams(max_tokens=6)
LONG = pb.SamplingParams(max_tokens=300, min_tokens=300)


@pytest.fixture
def served(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Iterator[Running]:
    write_delta(tmp_path / "a1.safetensors", make_adapter(1))
    yield from serve_tiny(tmp_path, http_listen="127.0.0.1:0")


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[Any]]:
    """Return the records of the requests that have ended so far."""
    caplog.set_level(logging.INFO)
    return lambda: [record for record in caplog.records if hasattr(record, "request_id")]


def one(logged: Callable[[], list[Any]]) -> Any:
    eventually(logged)
    (record,) = logged()
    return record


def test_an_answer(served: Running, logged: Callable[[], list[Any]]) -> None:
    with Client(f"127.0.0.1:{served.server.port}", tenant="red") as client:
        reply = client.generate("hello", adapter="a1", sampling=SHORT)
    record = one(logged)
    assert record.code == "OK" and record.levelname == "INFO"
    assert (record.tenant, record.wire) == ("red", "grpc")
    assert record.adapter == "a1" and reply.adapter.startswith(record.version)
    assert (record.prompt_tokens, record.completion_tokens) == (5, len(reply.token_ids))
    assert 0 <= record.queue_seconds <= record.first_token_seconds <= record.seconds < 60
    assert not hasattr(record, "error")
    assert "hello" not in str(vars(record)) and reply.text not in str(vars(record))


def test_an_answer_of_the_base(served: Running, logged: Callable[[], list[Any]]) -> None:
    served.client.generate("hello", sampling=SHORT)
    record = one(logged)
    assert (record.adapter, record.version) == ("", "(base)")
    assert "adapter (base): OK" in record.getMessage()


def test_a_refusal(served: Running, logged: Callable[[], list[Any]]) -> None:
    with pytest.raises(ClientError):
        served.client.generate("hello", adapter="nobody" + "x" * 5000)
    record = one(logged)
    assert (record.code, record.version) == ("NOT_FOUND", "")
    assert record.adapter.startswith("nobody") and len(record.getMessage()) < 1000
    assert "expected a served adapter" in record.error


def test_a_request_that_makes_no_sense(served: Running, logged: Callable[[], list[Any]]) -> None:
    bad = pb.GenerateRequest(
        request_id="mine", text="x", sampling_params=pb.SamplingParams(top_p=7)
    )
    with pytest.raises(Exception, match="top_p"):
        list(served.client.inference.Generate(bad))
    record = one(logged)
    assert (record.request_id, record.code) == ("mine", "INVALID_ARGUMENT")
    assert "top_p" in record.error


def test_a_client_that_goes_away(served: Running, logged: Callable[[], list[Any]]) -> None:
    stream = served.client.stream("hello", adapter="a1", sampling=LONG)
    next(stream)
    stream.close()
    record = one(logged)
    assert record.code == "CANCELLED"
    assert 0 < record.completion_tokens < 300


def test_a_deadline_that_passes(served: Running, logged: Callable[[], list[Any]]) -> None:
    with pytest.raises(ClientError, match="DEADLINE_EXCEEDED"):
        served.client.generate("hello", adapter="a1", sampling=LONG, timeout=0.2)
    assert one(logged).code == "DEADLINE_EXCEEDED"


def test_a_fault_of_ours(
    served: Running, logged: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("the text of a bug")

    monkeypatch.setattr(served.server.engine, "_submit", fail)
    with pytest.raises(ClientError, match="INTERNAL: internal error"):
        served.client.generate("hello", sampling=SHORT)
    record = one(logged)
    assert (record.code, record.levelname) == ("INTERNAL", "ERROR")
    assert record.error == "RuntimeError"


def test_over_http_each_prompt_has_a_line(served: Running, logged: Callable[[], list[Any]]) -> None:
    url = f"http://127.0.0.1:{served.server.http_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        headers = {"x-request-id": "mine"}
        client.completions.create(
            model="a1", prompt=["one", "three"], max_tokens=4, extra_headers=headers
        )
        eventually(lambda: len(logged()) == 2)
        assert {record.prompt_tokens for record in logged()} == {3, 5}
        assert {(record.request_id, record.wire) for record in logged()} == {("mine", "http")}
        for bad in ({"model": "a1", "max_tokens": "many"}, {"model": "nobody"}):
            with pytest.raises(openai.APIError):
                client.completions.create(prompt="x", **bad)
        eventually(lambda: len(logged()) == 4)
        assert [record.code for record in logged()[2:]] == ["INVALID_ARGUMENT", "NOT_FOUND"]


def test_what_goes_wrong_in_an_http_stream_is_told(
    served: Running, logged: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{served.server.http_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="a1", prompt="x", stream=True, max_tokens=300, extra_body={"min_tokens": 300}
        )
        next(stream)
        served.server.engine.stop()
        with pytest.raises(openai.APIError):
            list(stream)
    assert one(logged).code == "UNAVAILABLE"


def test_a_process_logs_json(tiny_directory: Path, tmp_path: Path) -> None:
    with process(tiny_directory, tmp_path, "--log-format", "json") as (server, address):
        with Client(address) as client, pytest.raises(ClientError):
            client.generate("x", adapter='two\nlines "quoted"')
        server.terminate()
        assert server.wait(30) == 0
        assert server.stderr is not None
        lines = [json.loads(line) for line in server.stderr]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    (request,) = [line for line in lines if "request_id" in line]
    assert request["adapter"] == 'two\nlines "quoted"'
    assert request["code"] == "NOT_FOUND" and request["seconds"] > 0


def test_text_stays_on_its_line_but_for_tracebacks() -> None:
    record = logging.makeLogRecord({"msg": "a\nb\x1b[31m%s", "args": ("é",), "levelname": "INFO"})
    assert formatter("text").format(record).endswith(r" INFO a\nb\x1b[31mé")
    try:
        raise ValueError("why")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert formatter("text").format(record).endswith("\nValueError: why")
    assert json.loads(formatter("json").format(record))["exc_info"].endswith("ValueError: why")


def test_what_is_printable_stays_as_it_is() -> None:
    assert printable("Grüße, 世界 ") == "Grüße, 世界 "
    assert printable("\r\n\t\x00\u202e") == r"\r\n\t\x00\u202e"


def test_an_unknown_format_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    from .test_process import command

    done: subprocess.CompletedProcess[str] = command(
        "serve", "--base", str(tiny_directory), "--adapters", str(tmp_path), "--log-format", "xml"
    )
    assert done.returncode and "text" in done.stderr + done.stdout
