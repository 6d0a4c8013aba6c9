"""The definition a server is compared with: a dense float32 model with dequantised W + Δ."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from spieldose_kernels.base import Base, dense_weight
from spieldose_kernels.delta import Adapter

NEAR_TIE = 1e-3  # logits closer than this may swap by the order of float32 sums


def dense_model(directory: Path, base: Base, adapter: Adapter | None) -> PreTrainedModel:
    """Build the dense model; `base` must not be repacked."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    weights = dict(model.named_modules())
    for name, layer in base.layers.items():
        weight = dense_weight(layer, torch.float32)
        if adapter is not None and name in adapter.modules:
            weight += adapter.modules[name].dense(torch.float32)
        weights[name].weight = torch.nn.Parameter(weight)
    return copy.deepcopy(model)


@torch.no_grad()
def assert_greedy(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """Assert that `tokens` is the greedy continuation, or leaves it at a proven near-tie."""
    assert tokens
    ids = torch.tensor([[*prompt, *tokens]])
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
    best = logits.argmax(-1)
    differing = (best != torch.tensor(tokens)).nonzero().flatten()
    if differing.numel():
        first = int(differing[0])
        gap = float(logits[first, best[first]] - logits[first, tokens[first]])
        assert gap < NEAR_TIE, f"token {first} is {tokens[first]}, expected {int(best[first])}"
