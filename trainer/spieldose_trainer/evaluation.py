"""How well a model does on held-out examples: its loss, and how often it says the very answer."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from spieldose_trainer.counted_logits import counted_only
from spieldose_trainer.data import IGNORED, Example, collate
from spieldose_trainer.limits import Limits

SPARE = 4  # tokens read beyond an answer's length: a reply may go on after a space


@dataclass(frozen=True, slots=True)
class Measured:
    """Hold what was measured on held-out examples."""

    loss: float  # mean over all tokens that count
    tokens: int  # that count
    exact_match: float | None  # share of the examples; None if it was not asked for


def evaluate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    tokenizer: PreTrainedTokenizerBase,
    pad: int,
    batch_size: int,
    exact_match: bool,
) -> Measured:
    """Measure the loss and, if asked to, how many completions greedy decoding reproduces.

    A reply matches if its text up to its end is the completion's, whitespace around them aside; of
    a chat the assistant's last turn is judged, of a truncated example what is left of it. The model
    keeps its mode, and no random number is drawn.
    """
    loss, tokens, matches = 0.0, 0, 0
    ordered = sorted(examples, key=lambda example: len(example.tokens), reverse=True)
    with evaluating(model):
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            batch_loss, count = _loss(model, batch, pad=pad)
            loss += batch_loss * count
            tokens += count
            if exact_match:
                matches += _matches(model, batch, tokenizer=tokenizer, pad=pad)
    return Measured(loss / tokens, tokens, matches / len(ordered) if exact_match else None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch gradients and training mode off, then give every module its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _loss(model: PreTrainedModel, examples: Sequence[Example], *, pad: int) -> tuple[float, int]:
    """Return the mean loss over a batch's counted tokens, and their number."""
    batch = {k: tensor.to(model.device) for k, tensor in collate(examples, pad=pad).items()}
    count = int((batch["labels"][:, 1:] != IGNORED).sum())
    return float(model(**counted_only(model, batch), use_cache=False).loss), count


def _matches(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    tokenizer: PreTrainedTokenizerBase,
    pad: int,
) -> int:
    """Return how many examples' completions greedy decoding of their prompts reproduces."""
    ends = _ends(model, tokenizer)
    prompts = [example.prompt for example in examples]
    answers = [example.completion for example in examples]
    width, longest = max(map(len, prompts)), max(map(len, answers))
    room = Limits.of(model.config).length(width + longest + SPARE) - width
    if room < longest and len(examples) > 1:  # together, but not each by itself
        return sum(_matches(model, [one], tokenizer=tokenizer, pad=pad) for one in examples)
    replies = _generate(model, prompts, max_new_tokens=max(room, longest), ends=ends, pad=pad)

    def said(tokens: Iterable[int]) -> str:
        words = [token for token in tokens if token not in ends]
        return str(tokenizer.decode(words, skip_special_tokens=True)).strip()

    matches = 0
    for reply, answer in zip(replies, answers, strict=True):
        whole = answer[-1] in ends  # of a truncated answer only what is there can be compared
        reply = reply[: len(answer) + SPARE if whole else len(answer)]
        matches += said(takewhile(lambda token: token not in ends, reply)) == said(answer)
    return matches


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
) -> list[list[int]]:
    """Continue every prompt greedily, padded on the left so that all continue at one place."""
    width = max(map(len, prompts))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(ends),
        pad_token_id=pad,
    )
    # the padding may be the end token, which occurs in chat prompts: the mask says which is which
    tokens = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    generate: Any = model.generate
    with _without_generation_config(model):
        grown: torch.Tensor = generate(
            input_ids=torch.tensor(tokens, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
        )
    replies: list[list[int]] = grown[:, width:].tolist()
    return replies


@contextmanager
def _without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Leave out the checkpoint's generation_config.json, which says what `generate` is not told."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a reply: the one trained on, and those the server stops at."""
    ends = model.generation_config.eos_token_id
    served = [] if ends is None else [ends] if isinstance(ends, int) else ends
    return sorted({tokenizer.eos_token_id, *served})
