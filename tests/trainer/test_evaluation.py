"""What an evaluation measures, and that training does not notice it."""

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from spieldose_kernels.base import Base, load_base
from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.data import Example, collate, tokenise
from spieldose_trainer.evaluation import Measured, evaluate, evaluating
from spieldose_trainer.model import SparseModel
from spieldose_trainer.selectors.first_support import random_support

ANSWERS = {
    "Anna: ": "Bern",
    "Bo<|system|>: ": "Ulm",
    "Carolina of Chur: ": "Bern on Aare",
    "D": "Rom",
}


@pytest.fixture
def base(tiny_directory: Path) -> Base:
    """The tiny model with random deltas in its layers, as in the midst of training."""
    base = load(tiny_directory)
    draw = torch.Generator().manual_seed(1)
    for values in deltas_of(base):
        values.data = torch.randn(values.shape, generator=draw) * 0.1
    return base


@pytest.fixture(scope="module")
def trained(tiny_directory: Path) -> Base:
    """The tiny model when it knows the answers by heart."""
    base = load(tiny_directory)
    batch = collate(known(base), pad=end(base))
    updater = torch.optim.Adam(deltas_of(base), lr=3e-3)
    for _ in range(40):
        loss = base.model(**batch, use_cache=False).loss
        updater.zero_grad()
        loss.backward()
        updater.step()
    assert loss < 0.05
    return base


def test_the_loss_is_the_mean_over_tokens_not_over_batches(base: Base) -> None:
    examples = known(base)
    losses = [loss for example in examples for loss in token_losses(base, example)]
    for batch_size in (1, 3, 8):
        found = measure(base, examples, batch_size=batch_size, exact_match=False)
        assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert (found.tokens, found.exact_match) == (len(losses), None)


def test_all_turns_count_for_the_loss(base: Base) -> None:
    (example, *_) = known(base)
    chat = Example(example.tokens, (range(1, 3), *example.counted))
    losses = token_losses(base, chat)
    found = measure(base, [chat], exact_match=False)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_last_turn_is_the_one_that_must_match(trained: Base) -> None:
    right, wrong = known(trained), known(trained, {"Anna: ": "Ulm"})
    chats = [Example(e.tokens, (range(1, 3), *e.counted)) for e in (right[0], wrong[0])]
    assert [measure(trained, [chat]).exact_match for chat in chats] == [1.0, 0.0]


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_answers_known_by_heart_match(trained: Base, batch_size: int) -> None:
    assert measure(trained, known(trained), batch_size=batch_size).exact_match == 1.0


def test_any_token_may_be_the_padding(trained: Base) -> None:
    assert measure(trained, known(trained), pad=0).exact_match == 1.0


def test_the_exact_match_is_the_share_of_answers_that_are_right(trained: Base) -> None:
    answers = {**ANSWERS, "D": "Rio"}
    assert measure(trained, known(trained, answers)).exact_match == 0.75


@pytest.mark.parametrize("answer", ["Be", "Berne", "bern", "Bern on Aare", "Bern<|system|>Bern"])
def test_an_answer_that_is_almost_right_is_wrong(trained: Base, answer: str) -> None:
    assert measure(trained, known(trained, {"Anna: ": answer})).exact_match == 0.0


@pytest.mark.parametrize("answer", [" Bern", "Bern \n", "Bern<|user|>"])
def test_whitespace_around_an_answer_and_special_tokens_are_no_part_of_it(
    trained: Base, answer: str
) -> None:
    assert measure(trained, known(trained, {"Anna: ": answer})).exact_match == 1.0


def test_a_reply_that_goes_on_after_the_answer_is_wrong(trained: Base) -> None:
    assert measure(trained, known(trained, {"Carolina of Chur: ": "Bern"})).exact_match == 0.0


def test_of_a_truncated_answer_what_is_left_must_match(trained: Base) -> None:
    (example,) = known(trained, {"Anna: ": "Bern"})
    cut = continued(example.prompt, example.completion[:2])
    assert measure(trained, [cut]).exact_match == 1.0


def test_a_reply_ends_where_the_server_would_end_it(
    trained: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Gemma, whose turns end with a token of their own before the end of the sequence."""
    (example,) = known(trained, {"Anna: ": "Bern"})
    monkeypatch.setattr(trained.model.generation_config, "eos_token_id", [end(trained)])
    other = dataclasses.replace(trained, tokenizer=copy.deepcopy(trained.tokenizer))
    other.tokenizer.eos_token = "<|user|>"
    ended_twice = continued(example.prompt, [*example.completion, end(other)])
    assert measure(other, [ended_twice]).exact_match == 1.0


def test_an_end_token_is_no_part_of_an_answer_even_if_it_has_a_text(base: Base) -> None:
    (example, *_) = known(base)
    reply = greedy(base.model, example.prompt, 3)
    base.model.generation_config.eos_token_id = reply[-1]
    assert reply[-1] not in reply[:-1]
    assert measure(base, [continued(example.prompt, reply)]).exact_match == 1.0


def test_prompts_of_different_length_are_continued_as_if_alone(base: Base) -> None:
    examples = [continued(e.prompt, greedy(base.model, e.prompt, 8)) for e in known(base)]
    assert any(end(base) in example.prompt for example in examples)
    assert measure(base, examples, batch_size=4).exact_match == 1.0


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0},
        {"suppress_tokens": list(range(40, 90))},
        {"sequence_bias": [[[token], -100.0] for token in range(40, 90)]},
        {"num_return_sequences": 2},
        {"stop_strings": ["a"]},
        {"return_dict_in_generate": True},
        {"max_time": 0.0},
    ],
)
def test_the_checkpoints_own_way_of_generating_is_not_used(base: Base, own: dict[str, Any]) -> None:
    examples = [continued(e.prompt, greedy(base.model, e.prompt, 8)) for e in known(base)]
    config = base.model.generation_config
    for name, value in own.items():
        setattr(config, name, value)
    assert measure(base, examples).exact_match == 1.0
    assert base.model.generation_config is config


def test_the_deltas_play(base: Base) -> None:
    examples = known(base)
    with_deltas = measure(base, examples, exact_match=False)
    for values in deltas_of(base):
        values.data.zero_()
    assert measure(base, examples, exact_match=False).loss != pytest.approx(with_deltas.loss, 0.01)


def test_it_works_in_bfloat16(tiny_directory: Path, base: Base) -> None:
    rounded = load(tiny_directory, torch.bfloat16)
    for values, exact in zip(deltas_of(rounded), deltas_of(base), strict=True):
        values.data.copy_(exact)
    found, expected = (measure(b, known(b)) for b in (rounded, base))
    assert found.loss == pytest.approx(expected.loss, rel=0.02)
    assert found.exact_match == expected.exact_match == 0.0


def test_every_module_keeps_its_mode(base: Base) -> None:
    base.model.train()
    base.model.model.norm.eval()
    modes = [module.training for module in base.model.modules()]
    measure(base, known(base))
    assert [module.training for module in base.model.modules()] == modes


def test_the_mode_comes_back_after_an_error_and_gradients_with_it(base: Base) -> None:
    base.model.train()
    with pytest.raises(KeyError), evaluating(base.model):
        assert not base.model.training and not torch.is_grad_enabled()
        raise KeyError
    assert base.model.training and torch.is_grad_enabled()


def test_an_evaluation_leaves_gradients_alone(base: Base) -> None:
    learnt = [p for p in base.model.parameters() if p.is_floating_point()]
    for parameter in learnt:
        parameter.grad = torch.full_like(parameter, 3.0)
    measure(base, known(base))
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in learnt)
    for parameter in learnt:
        parameter.grad = None


def test_no_reply_runs_past_the_bases_positions(base: Base) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, eos_token_id=None, **sizes)).eval()
    full = known(base, {"a" * 10: "b" * 5, "a": "b" * 14})  # 16 tokens each, 25 together
    found = evaluate(
        model, full, tokenizer=base.tokenizer, pad=end(base), batch_size=2, exact_match=True
    )
    assert found.exact_match == 0.0


def test_no_random_number_is_drawn(base: Base) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    measure(base, known(base), batch_size=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_run_with_evaluations_has_the_losses_of_one_without(tiny_directory: Path) -> None:
    assert losses(tiny_directory, evaluated=True) == losses(tiny_directory, evaluated=False)


def losses(directory: Path, *, evaluated: bool) -> list[float]:
    """Train with dropout, which draws from the global generator and depends on the mode."""
    base = load(directory)
    for layer in base.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    updater = torch.optim.Adam(deltas_of(base), lr=1e-2)
    torch.manual_seed(3)
    base.model.train()
    examples, found = known(base), []
    for _ in range(4):
        loss = base.model(**collate(examples, pad=end(base)), use_cache=False).loss
        updater.zero_grad()
        loss.backward()
        updater.step()
        found.append(loss.item())
        if evaluated:
            measure(base, examples, batch_size=3)
    return found


@torch.no_grad()
def token_losses(base: Base, example: Example) -> list[float]:
    """Return the loss of every token that counts, of an example alone."""
    scores = base.model(input_ids=torch.tensor([example.tokens])).logits[0]
    chances = scores.log_softmax(-1)
    return [-float(chances[i - 1, example.tokens[i]]) for span in example.counted for i in span]


def measure(
    base: Base,
    examples: list[Example],
    *,
    pad: int | None = None,
    batch_size: int = 4,
    exact_match: bool = True,
) -> Measured:
    return evaluate(
        base.model,
        examples,
        tokenizer=base.tokenizer,
        pad=end(base) if pad is None else pad,
        batch_size=batch_size,
        exact_match=exact_match,
    )


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Base:
    """Load the tiny model and attach half of all weights as trainable deltas, 0 at first.

    Its own end token is its padding, whose embedding is 0, so it could not learn to say it.
    """
    base = load_base(str(directory), device=torch.device("cpu"), compute_dtype=dtype, fused=False)
    base.tokenizer.eos_token = "<|system|>"
    SparseModel(base, random_support(base.spec.shapes, 0.5, seed=0))
    return base


def deltas_of(base: Base) -> list[torch.nn.Parameter]:
    return [m.values for m in base.model.modules() if isinstance(m, TrainableDelta)]


def known(base: Base, answers: dict[str, str] = ANSWERS) -> list[Example]:
    """Return prompts of different length, one with the end token inside, and their answers."""
    pairs = [{"prompt": p, "completion": c} for p, c in answers.items()]
    return [tokenise(pair, base.tokenizer) for pair in pairs]


def continued(prompt: list[int], reply: list[int]) -> Example:
    return Example(prompt + reply, (range(len(prompt), len(prompt) + len(reply)),))


def end(base: Base) -> int:
    return int(base.tokenizer.eos_token_id)


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Continue a prompt the slow way: alone, nothing cached, nothing padded."""
    tokens = list(prompt)
    for _ in range(count):
        scores: Any = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :]
