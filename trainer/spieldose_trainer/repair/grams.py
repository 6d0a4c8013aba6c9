"""What a model's linear layers are fed: the Gram matrix of each one's inputs."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from spieldose_kernels.base import Base
from spieldose_trainer.data import Example, collate
from spieldose_trainer.evaluation import evaluating
from spieldose_trainer.groups import BUDGET, groups


def input_grams(
    base: Base, names: Sequence[str], examples: Sequence[Example], *, budget: int = BUDGET
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield Σ x·xᵀ over the examples' tokens for each of these layers, [C, C] float32.

    As many are summed at once as `budget` numbers allow, one at least; more layers take another
    round over the examples.
    """
    sizes = {name: base.layers[name].in_features ** 2 for name in names}
    for group in groups(sizes, budget=budget):
        grams = _sums({name: base.layers[name] for name in group}, base, examples)
        for name in group:
            yield name, grams.pop(name)


def _sums(
    layers: Mapping[str, nn.Linear], base: Base, examples: Sequence[Example]
) -> dict[str, torch.Tensor]:
    device = base.model.device
    grams = {
        name: torch.zeros(layer.in_features, layer.in_features, device=device)
        for name, layer in layers.items()
    }

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def add(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            x = inputs[0].flatten(0, -2).float()
            grams[name].addmm_(x.t(), x)

        return layers[name].register_forward_pre_hook(add)

    handles = [watch(name) for name in layers]
    try:
        with evaluating(base.model):
            for example in examples:  # one at a time: padding is no input
                tokens = collate([example], pad=0)["input_ids"].to(device)
                base.model.base_model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return grams
