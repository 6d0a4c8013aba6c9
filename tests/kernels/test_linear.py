"""Deltas lie over a base's layers only while a step plays some."""

from collections.abc import Callable

import torch

from spieldose_kernels.base import Base
from spieldose_kernels.delta import Adapter
from spieldose_kernels.linear import DeltaLinear, ServedLayers
from spieldose_kernels.slab import Slab
from spieldose_kernels.sliced import pack
from spieldose_kernels.token_groups import TokenGroups

CPU = torch.device("cpu")


def test_a_step_that_plays_the_base_runs_its_own_layers(tiny_base: Base) -> None:
    layers = ServedLayers(tiny_base, make_slab(tiny_base))
    assert modules(tiny_base) == list(tiny_base.layers.values())
    layers.play(TokenGroups.of([0], [1], CPU))
    assert all(isinstance(module, DeltaLinear) for module in modules(tiny_base))
    layers.play(None)
    assert modules(tiny_base) == list(tiny_base.layers.values())


def test_each_step_plays_what_was_said_last(
    tiny_base: Base, make_adapter: Callable[[int], Adapter]
) -> None:
    slab = make_slab(tiny_base)
    slots = [slab.put(pack(make_adapter(i), slab.dtype)) for i in range(2)]
    layers = ServedLayers(tiny_base, slab)
    ids = torch.tensor([[65, 66, 67]])

    def logits(slot: int | None) -> torch.Tensor:
        layers.play(TokenGroups.of([slot], [3], CPU))
        with torch.no_grad():
            scores: torch.Tensor = tiny_base.model(ids).logits
        return scores

    base, first, second = logits(None), logits(slots[0]), logits(slots[1])
    assert not torch.allclose(base, first)
    assert not torch.allclose(first, second)
    assert torch.equal(logits(slots[0]), first)
    assert torch.equal(logits(None), base)


def make_slab(base: Base) -> Slab:
    return Slab(base.spec.shapes, slots=2, budget=1 << 20, dtype=torch.float32, device=CPU)


def modules(base: Base) -> list[torch.nn.Module]:
    return [base.model.get_submodule(path) for path in base.layers]
