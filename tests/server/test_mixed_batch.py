"""Many adapters in one forward pass: each request plays its own and no other."""

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import read_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client, Reply

from ..conftest import Running
from .dense import assert_greedy, dense_model

ADAPTERS = ("a1", "a2", "a3", "a4", "", "")
# longer than a forward pass of 64 tokens, so that every prompt is prefilled in chunks
PROMPTS = [f"{i}: " + "the box plays many discs. " * (4 + i) for i in range(len(ADAPTERS))]


def test_every_request_of_a_mixed_batch_gets_what_its_adapter_says_alone(running: Running) -> None:
    alone = [ask(running.client, *job) for job in zip(PROMPTS, ADAPTERS, strict=True)]
    running.server.engine.record.recent.clear()
    mixed = ask_together(running.client)
    assert [reply.token_ids for reply in mixed] == [reply.token_ids for reply in alone]
    steps = running.server.engine.record.recent
    assert any(len(step.slots) >= 3 and step.base_requests for step in steps)
    assert any(step.prefilling for step in steps)


def test_every_request_of_a_mixed_batch_equals_a_dense_model(
    running: Running, tiny_directory: Path
) -> None:
    tokenizer = running.base.tokenizer
    for prompt, name, reply in zip(PROMPTS, ADAPTERS, ask_together(running.client), strict=True):
        model = dense_model(tiny_directory, running.base, read(running.directory, name))
        assert_greedy(model, tokenizer(prompt)["input_ids"], reply.token_ids)


def test_adapters_differ_from_each_other_and_from_the_base(running: Running) -> None:
    said = {name: ask(running.client, PROMPTS[0], name).token_ids for name in ADAPTERS}
    assert len(set(said.values())) == 5


def test_the_reply_names_the_version_that_played(running: Running) -> None:
    played = ask(running.client, "x", "a2").adapter
    assert played == f"a2@{sha256((running.directory / 'a2.safetensors').read_bytes()).hexdigest()}"
    assert ask(running.client, "x", "").adapter == ""


def read(directory: Path, name: str) -> Adapter | None:
    return read_delta((directory / f"{name}.safetensors").read_bytes()) if name else None


def ask(client: Client, prompt: str, adapter: str) -> Reply:
    sampling = pb.SamplingParams(max_tokens=24)
    return client.generate(prompt, adapter=adapter, sampling=sampling)


def ask_together(client: Client) -> list[Reply]:
    with ThreadPoolExecutor(len(ADAPTERS)) as pool:
        return list(pool.map(ask, [client] * len(ADAPTERS), PROMPTS, ADAPTERS))
