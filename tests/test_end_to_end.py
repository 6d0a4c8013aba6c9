"""From training data through the delta file to the server, on the real model."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from spieldose_kernels.token_groups import TokenGroups
from spieldose_proto import inference_pb2 as pb
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.data import Example, collate, tokenise
from spieldose_trainer.trainer import Result, train
from tasks import TASKS, split, write_examples

from .conftest import Running

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "places": {"type": "array", "items": {"enum": ["Oslo", "Zürich", "東京"]}, "maxItems": 3},
    },
    "required": ["name", "age", "places"],
    "additionalProperties": False,
}
SCHEMA = json.dumps(PERSON)
PATTERN = r"[A-ZÄÖÜ][a-zß]{1,9}, \d{1,3} (years|Jahre) 🎂?"

TASK = TASKS[1]
UPDATES = 7  # the first reselection is after 5


@pytest.fixture(scope="module")
def trained(real_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    directory = tmp_path_factory.mktemp("end-to-end")
    examples, _ = split(TASK, train=UPDATES * 8, held_out=4)
    write_examples(directory / "data.jsonl", examples)
    return train(
        TrainConfig(
            base=str(real_directory),
            data=directory / "data.jsonl",
            out=directory / "adapters" / "dates.safetensors",
            learning_rate=2e-3,
            compute_dtype="float32",
        )
    )


def test_a_served_adapter_scores_the_loss_it_had_in_the_trainer(
    trained: Result, real_directory: Path, serve_tiny: Callable[..., Iterator[Any]]
) -> None:
    tokenizer = trained.model.base.tokenizer
    _, held_out = split(TASK, train=0, held_out=4)
    examples = [tokenise({"prompt": p, "completion": c}, tokenizer) for p, c in held_out]
    in_trainer = [loss(trained.model.eval(), example) for example in examples]
    settings = {"base": str(real_directory), "adapter_memory": 1 << 25}
    for running in serve_tiny(trained.file.parent, **settings):
        running.admin.pin("dates")
        slot = running.server.store.get("dates").slot
        with running.server.engine._manager.pause():  # the engine's thread owns the model
            served = [played(running, example, slot) for example in examples]
            as_base = [played(running, example, None) for example in examples]
        prompts = [prompt for prompt, _ in held_out]
        sampling = pb.SamplingParams(max_tokens=6)
        said = [running.client.generate(p, adapter="dates", sampling=sampling) for p in prompts]
    torch.testing.assert_close(served, in_trainer, rtol=1e-4, atol=1e-5)
    assert sum(as_base) > 1.5 * sum(served)
    for prompt, reply in zip(prompts, said, strict=True):
        assert list(reply.token_ids) == greedy(trained.model, tokenizer(prompt)["input_ids"], 6)


def test_the_real_model_is_held_to_a_schema_and_a_pattern(
    trained: Result, real_directory: Path, serve_tiny: Callable[..., Iterator[Any]]
) -> None:
    def ask(running: Running, seed: int, **constraint: str) -> str:
        sampling = pb.SamplingParams(temperature=1.5, seed=seed, max_tokens=200, **constraint)
        adapter = ("", "dates")[seed % 2]
        reply = running.client.generate("Ida, 41, of Oslo.", adapter=adapter, sampling=sampling)
        assert reply.finish_reason == "stop", reply.text
        return reply.text

    settings = {"base": str(real_directory), "adapter_memory": 1 << 25}
    with ThreadPoolExecutor(12) as pool:
        for running in serve_tiny(trained.file.parent, **settings):
            persons = [pool.submit(ask, running, seed, json_schema=SCHEMA) for seed in range(6)]
            patterns = [pool.submit(ask, running, seed, regex=PATTERN) for seed in range(6)]
            for person, pattern in zip(persons, patterns, strict=True):
                jsonschema.validate(json.loads(person.result()), PERSON)
                assert re.fullmatch(PATTERN, pattern.result())


def test_the_file_says_where_it_comes_from(trained: Result) -> None:
    payload = trained.file.read_bytes()
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    metadata = header["__metadata__"]
    assert metadata["base_fingerprint"] == trained.model.base.spec.fingerprint
    assert json.loads(metadata["settings"])["learning_rate"] == "0.002"


def played(running: Running, example: Example, slot: int | None) -> float:
    """Return the loss of the server's own model while it plays a slot."""
    layers = running.server.engine._layers
    length = len(example.prompt) + len(example.completion)
    layers.play(TokenGroups.of([slot], [length], torch.device("cpu")))
    try:
        return loss(running.base.model, example)
    finally:
        layers.play(None)


@torch.no_grad()
def loss(model: torch.nn.Module, example: Example) -> float:
    return float(model(**collate([example], pad=0)).loss)


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[len(prompt) :]
