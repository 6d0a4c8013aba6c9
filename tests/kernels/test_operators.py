"""The products are PyTorch operators: schema, fake implementation, and use under torch.compile."""

import pytest
import torch
from torch.library import opcheck

from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.delta_matmul import delta_matmul
from spieldose_kernels.linear import TrainableDelta
from spieldose_kernels.slab import LayerSlab, Slab
from spieldose_kernels.sliced import pack
from spieldose_kernels.token_groups import TokenGroups

CPU = torch.device("cpu")
HEIGHT, WIDTH, TOKENS = 21, 34, 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mixed_batch_product_is_an_operator(dtype: torch.dtype) -> None:
    layer, groups = resident(dtype)
    y, x = torch.randn(TOKENS, HEIGHT).to(dtype), torch.randn(TOKENS, WIDTH).to(dtype)
    arrays = groups.order, groups.starts, groups.slots
    opcheck(torch.ops.spieldose.gather, (y, x, layer.memory, layer.table, *arrays, layer.dtype))


def test_the_operator_adds_what_the_call_does() -> None:
    layer, groups = resident(torch.float32)
    y, x = torch.randn(TOKENS, HEIGHT), torch.randn(TOKENS, WIDTH)
    expected = y.clone()
    delta_matmul(expected, x, layer, groups)
    assert not torch.equal(y, expected)
    arrays = groups.order, groups.starts, groups.slots
    torch.ops.spieldose.gather(y, x, layer.memory, layer.table, *arrays, layer.dtype)
    assert torch.equal(y, expected)


def test_a_compiled_layer_adds_the_same_without_a_graph_break() -> None:
    layer, groups = resident(torch.float32)
    weight, x = torch.randn(HEIGHT, WIDTH), torch.randn(2, TOKENS // 2, WIDTH)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight)
        delta_matmul(y, x, layer, groups)
        return y.relu()

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), forward(x))


@pytest.mark.parametrize("operator", ["product", "transposed_product", "sampled_product"])
def test_the_products_of_training_are_operators(operator: str) -> None:
    delta = random_delta(3)
    support = delta.row_starts, delta.columns.int()
    x, y = torch.randn(WIDTH, TOKENS), torch.randn(HEIGHT, TOKENS)
    arguments: dict[str, tuple[object, ...]] = {
        "product": (x, delta.values, *support),
        "transposed_product": (y, delta.values, *support, WIDTH),
        "sampled_product": (y, x, *support),
    }
    opcheck(getattr(torch.ops.spieldose, operator), arguments[operator])


# torch.compile itself instantiates it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_trainable_delta_has_the_same_gradients() -> None:
    delta = random_delta(4)
    module = TrainableDelta(delta.row_starts, delta.columns.int(), width=delta.width)
    module.values.data.copy_(delta.values)
    x, y = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, HEIGHT)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return module.add_to(y, x).square().sum()

    expected = torch.autograd.grad(loss(x), (x, module.values))
    compiled = torch.compile(loss, backend="aot_eager")
    for actual, wanted in zip(
        torch.autograd.grad(compiled(x), (x, module.values)), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def resident(dtype: torch.dtype) -> tuple[LayerSlab, TokenGroups]:
    """Put two adapters into a slab and have five of six tokens play them."""
    slab = Slab({"m": (HEIGHT, WIDTH)}, slots=2, budget=1 << 16, dtype=dtype, device=CPU)
    info = AdapterInfo(base_model="", base_fingerprint="", method="", density=0.2)
    slots = [slab.put(pack(Adapter(info, {"m": random_delta(i)}), dtype)) for i in range(2)]
    groups = TokenGroups.of([slots[0], None, slots[1], slots[0]], [2, 1, 2, 1], CPU)
    assert groups is not None
    return slab.layer("m"), groups


def random_delta(seed: int) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randperm(HEIGHT * WIDTH, generator=generator)[: HEIGHT * WIDTH // 5]
    values = torch.randn(positions.numel(), generator=generator)
    return SparseDelta.from_flat(positions, values, shape=(HEIGHT, WIDTH))
