"""What a request may ask of its answer, over the socket, against transformers' own generate."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch

from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import ClientError, Reply
from spieldose_server.sampling import perturb

from ..conftest import Running, eventually

PROMPT = "hello hello hello"


def ask(running: Running, **sampling: Any) -> Reply:
    return running.client.generate(
        PROMPT, sampling=pb.SamplingParams(**{"max_tokens": 24} | sampling)
    )


def reference(running: Running, **settings: Any) -> tuple[int, ...]:
    """Return what transformers generates greedily with these settings."""
    prompt = running.base.tokenizer(PROMPT, return_tensors="pt")
    model: Any = running.base.model
    whole = model.generate(**prompt, max_new_tokens=24, do_sample=False, **settings)
    return tuple(whole[0, prompt["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("penalty", [0.7, 1.5])
def test_repetition_penalty(running: Running, penalty: float) -> None:
    got = ask(running, repetition_penalty=penalty)
    assert got.token_ids == reference(running, repetition_penalty=penalty)
    assert got.token_ids != ask(running).token_ids


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.4), (-0.5, 1.0)])
def test_presence_and_frequency_penalties(
    running: Running, presence: float, frequency: float
) -> None:
    def penalised(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        for token in set(answer):
            logits[token] -= presence + frequency * answer.count(token)
        return logits

    got = ask(running, presence_penalty=presence, frequency_penalty=frequency)
    assert got.token_ids == step_by_step(running, penalised)
    assert got.token_ids != ask(running).token_ids


def test_sampled_answers_take_the_largest_perturbed_logit(running: Running) -> None:
    prompt = len(running.base.tokenizer(PROMPT)["input_ids"])

    def perturbed(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        return perturb(
            logits[None],
            temperature=torch.tensor([1.3]),
            top_k=torch.tensor([30]),
            top_p=torch.tensor([0.9]),
            min_p=torch.tensor([0.02]),
            seed=torch.tensor([11]),
            position=torch.tensor([prompt + len(answer)]),
        )[0]

    got = ask(running, temperature=1.3, top_k=30, top_p=0.9, min_p=0.02, seed=11)
    assert got.token_ids == step_by_step(running, perturbed)


def step_by_step(
    running: Running, edit: Callable[[torch.Tensor, list[int]], torch.Tensor]
) -> tuple[int, ...]:
    """Take the largest of the edited logits 24 times, each from the whole sequence."""
    prompt: list[int] = running.base.tokenizer(PROMPT)["input_ids"]
    model: Any = running.base.model
    answer: list[int] = []
    while len(answer) < 24 and running.base.tokenizer.eos_token_id not in answer:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, -1].float()
        answer.append(int(edit(logits, answer).argmax()))
    return tuple(answer)


def test_min_p_near_one_is_greedy(running: Running) -> None:
    assert ask(running, temperature=1.0, min_p=0.999).token_ids == ask(running).token_ids
    assert ask(running, temperature=5.0, seed=1).token_ids != ask(running).token_ids


def test_a_stop_token_ends_the_answer_and_has_no_text(running: Running) -> None:
    whole = ask(running)
    stop = whole.token_ids[5]
    first = whole.token_ids.index(stop)
    got = ask(running, stop_token_ids=[stop])
    assert got.token_ids == whole.token_ids[: first + 1]
    assert got.finish_reason == "stop"
    assert got.text == (ask(running, max_tokens=first).text if first else "")


def test_nothing_ends_an_answer_before_min_tokens(running: Running) -> None:
    whole = ask(running)
    stop = whole.token_ids[0]
    assert len(ask(running, stop_token_ids=[stop]).token_ids) == 1
    got = ask(running, stop_token_ids=[stop], min_tokens=10)
    assert len(got.token_ids) >= 10
    assert stop not in got.token_ids[:10]
    text = ask(running, max_tokens=24).text
    late = ask(running, stop=[text[0]], min_tokens=6)
    assert len(late.token_ids) >= 6


def test_log_probabilities_are_the_models_own(running: Running) -> None:
    got = ask(running, logprobs=3, repetition_penalty=1.5)
    assert len(got.logprobs) == len(got.token_ids) == 24
    prompt = running.base.tokenizer(PROMPT)["input_ids"]
    model: Any = running.base.model
    with torch.no_grad():
        logits = model(torch.tensor([prompt + list(got.token_ids)])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for row, token, found in zip(expected, got.token_ids, got.logprobs, strict=True):
        assert found.logprob == pytest.approx(row[token].item(), abs=1e-3)
        values, tokens = row.topk(3)
        assert [each.token_id for each in found.likeliest] == tokens.tolist()
        assert [each.logprob for each in found.likeliest] == pytest.approx(
            values.tolist(), abs=1e-3
        )
    assert ask(running).logprobs == ()
    assert all(not found.likeliest for found in ask(running, logprobs=0).logprobs)


def test_several_answers_are_those_that_one_request_each_would_get(running: Running) -> None:
    sampling = pb.SamplingParams(max_tokens=12, temperature=1.0, seed=7, n=4)
    answers = running.client.answers(PROMPT, adapter="a1", sampling=sampling)
    assert len({answer.token_ids for answer in answers}) == 4
    for index, answer in enumerate(answers):
        alone = pb.SamplingParams(max_tokens=12, temperature=1.0, seed=7 + index)
        assert running.client.generate(PROMPT, adapter="a1", sampling=alone) == answer


def test_closing_a_request_of_several_answers_ends_them_all(running: Running) -> None:
    sampling = pb.SamplingParams(max_tokens=400, temperature=1.0, n=4)
    stream = running.client.stream(PROMPT, adapter="a1", sampling=sampling)
    next(stream)
    stream.close()
    running.client.generate(PROMPT, sampling=pb.SamplingParams(max_tokens=1))
    admission, engine = running.server.admission, running.server.engine
    eventually(lambda: (admission.running, admission.accepted, engine.held_pages) == (0, 0, 0))
    assert not engine._logprobs and not engine._gone


def test_neighbours_with_other_options_change_nothing(running: Running) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.0, "temperature": 0.8, "seed": 4, "min_p": 0.05},
        {"logprobs": 2, "min_tokens": 20},
    ]
    alone = [ask(running, **each) for each in options]
    with ThreadPoolExecutor(10) as pool:
        crowd = list(pool.map(lambda each: ask(running, **each), options * 2))
    assert [reply.token_ids for reply in crowd] == [reply.token_ids for reply in alone] * 2


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"min_p": 1.0}, "min_p: expected at least 0 and below 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected above 0"),
        ({"presence_penalty": 2.5}, "presence_penalty: expected -2 to 2"),
        ({"frequency_penalty": -3.0}, "frequency_penalty: expected -2 to 2"),
        ({"stop_token_ids": [10_000_000]}, "stop_token_ids: expected ids below"),
        ({"min_tokens": 30}, "min_tokens: expected at most max_tokens (24)"),
        ({"n": 17}, "n: expected 1 to 16"),
        ({"n": 0}, "n: expected 1 to 16"),
        ({"logprobs": 21}, "logprobs: expected at most 20"),
    ],
)
def test_what_is_out_of_range_is_refused(
    running: Running, sampling: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ClientError) as caught:
        ask(running, **sampling)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert expected in str(caught.value)
