"""The Gram matrices of what layers are fed, however many are summed at once."""

import pytest
import torch

from spieldose_kernels.base import Base
from spieldose_trainer.data import Example
from spieldose_trainer.repair.grams import input_grams

EXAMPLES = [Example(list(range(a, a + 9 + a)), (range(1, 9),)) for a in (1, 5, 20)]


@pytest.mark.parametrize("budget", [1, 64 * 64 * 3, 1 << 20])
def test_they_are_those_of_the_inputs_at_all_tokens(tiny_base: Base, budget: int) -> None:
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in tiny_base.layers}
    for name, layer in tiny_base.layers.items():
        layer.register_forward_pre_hook(
            lambda _, seen, name=name: inputs[name].append(seen[0][0].float())
        )
    for example in EXAMPLES:
        with torch.no_grad():
            tiny_base.model(input_ids=torch.tensor([example.tokens]))
    expected = {name: torch.cat(seen) for name, seen in inputs.items()}

    found = dict(input_grams(tiny_base, list(expected), EXAMPLES, budget=budget))

    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x.t() @ x, rtol=1e-4, atol=1e-4)


def test_nothing_watches_afterwards(tiny_base: Base) -> None:
    tiny_base.model.train()
    list(input_grams(tiny_base, list(tiny_base.layers), EXAMPLES))
    assert not any(layer._forward_pre_hooks for layer in tiny_base.layers.values())
    assert tiny_base.model.training
