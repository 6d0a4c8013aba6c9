"""Training's Δ·x: it and its gradients are those of a dense float64 model, at the support."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels.base import Base, dense_weight
from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.linear import DeltaLinear, TrainableDelta
from spieldose_kernels.support_product import (
    sampled_product,
    support_product,
    support_product_reference,
)

TOLERANCE = 1e-6  # of norms, against float64

SHAPES = [  # T, R, C, density
    pytest.param(7, 5, 9, 0.3, id="odd"),
    pytest.param(17, 33, 65, 0.05, id="odd-large"),
    pytest.param(1, 5, 9, 0.3, id="one-token"),
    pytest.param(7, 1, 9, 0.3, id="one-row"),
    pytest.param(7, 5, 1, 0.6, id="one-column"),
    pytest.param(1, 1, 1, 1.0, id="one-everything"),
    pytest.param(3, 4, 6, 0.0, id="no-entries"),
    pytest.param(3, 4, 6, 1.0, id="full-support"),
    pytest.param(64, 48, 32, 0.02, id="many-empty-rows"),
    pytest.param(0, 5, 9, 0.3, id="no-tokens"),
]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "height", "width", "density"), SHAPES)
def test_the_product_is_a_dense_float64_models(
    tokens: int, height: int, width: int, density: float, dtype: torch.dtype
) -> None:
    delta = random_delta(height, width, density=density)
    assert_like_dense(delta, x=random(tokens, width).to(dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_support_in_one_row_and_one_column_leaves_the_others_empty(dtype: torch.dtype) -> None:
    delta = SparseDelta.from_flat(torch.tensor([2 * 7 + 3]), torch.tensor([1.5]), shape=(5, 7))
    x = random(4, 7).to(dtype)
    y, dx, dvalues = run(delta, x, torch.ones(4, 5, dtype=dtype), dtype=dtype)
    assert y[:, 2].count_nonzero() == 4
    assert y[:, [0, 1, 3, 4]].count_nonzero() == 0
    assert dx[:, [0, 1, 2, 4, 5, 6]].count_nonzero() == 0
    assert dvalues.shape == (1,)
    assert relative_error(dvalues, x[:, 3].double().sum()[None]) <= TOLERANCE


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_support_is_a_dense_float64_models(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    chosen = sorted(data.draw(st.sets(st.integers(0, height * width - 1))))
    positions = torch.tensor(chosen, dtype=torch.int64)
    delta = SparseDelta.from_flat(positions, random(len(chosen)), shape=(height, width))
    x = random(data.draw(st.integers(1, 5)), width)
    # float64 sums: in float32 a few entries may cancel to any relative error
    assert_like_dense(delta, x=x, dtype=torch.float64)


def test_bfloat16_activations_are_multiplied_in_float32() -> None:
    delta = random_delta(9, 33, density=0.5)
    x, dy = random(5, 33).bfloat16(), random(5, 9)
    y, dx, dvalues = run(delta, x, dy, dtype=torch.float32)
    true_y, true_dx, true_dvalues = run_dense(delta, x.double(), dy)
    assert y.dtype == torch.float32
    assert relative_error(y, true_y) <= TOLERANCE
    assert relative_error(dvalues, true_dvalues) <= TOLERANCE
    assert dx.dtype == torch.bfloat16
    torch.testing.assert_close(dx.double(), true_dx, rtol=2**-8, atol=1e-6)  # rounded once


def test_activations_need_not_be_contiguous() -> None:
    delta = random_delta(5, 9, density=0.4)
    assert_like_dense(delta, x=random(9, 7).t(), dtype=torch.float32)
    assert_like_dense(delta, x=random(7, 18)[:, ::2], dtype=torch.float32)


def test_the_upstream_gradient_need_not_be_contiguous() -> None:
    delta = random_delta(5, 9, density=0.4)
    x, dy = random(7, 9), random(5, 7).t()
    assert_close(run(delta, x, dy, dtype=torch.float32), run_dense(delta, x.double(), dy))


def test_the_reference_is_the_product() -> None:
    delta = random_delta(5, 9, density=0.4)
    x = random(7, 9)
    support = {"row_starts": delta.row_starts, "columns": delta.columns.int()}
    reference = support_product_reference(x, delta.values, **support)
    assert relative_error(support_product(x, delta.values, **support), reference) <= TOLERANCE


def test_gradients_pass_autograds_own_check() -> None:
    delta = random_delta(4, 5, density=0.5)
    support = {"row_starts": delta.row_starts, "columns": delta.columns.int()}
    x, values = random(3, 5).double().requires_grad_(), delta.values.double().requires_grad_()
    torch.autograd.gradcheck(lambda x, v: support_product(x, v, **support), (x, values))


def test_a_probe_sees_the_activations_and_the_gradient_features_first() -> None:
    delta = random_delta(5, 9, density=0.4)
    x, dy = random(7, 9), random(7, 5)
    seen: list[torch.Tensor] = []
    values = delta.values.clone().requires_grad_()
    support = {"row_starts": delta.row_starts, "columns": delta.columns.int()}
    y = support_product(x, values, probe=lambda *both: seen.extend(both), **support)
    y.backward(dy)
    assert torch.equal(seen[0], x.t())
    assert torch.equal(seen[1], dy.t())


def test_the_sampled_product_is_the_dense_gradient_at_the_support() -> None:
    delta = random_delta(5, 9, density=0.4)
    x, dy = random(9, 7), random(5, 7)
    sampled = sampled_product(dy, x, row_starts=delta.row_starts, columns=delta.columns.int())
    dense = dy.double() @ x.double().t()
    assert relative_error(sampled, dense[delta.rows(), delta.columns.long()]) <= TOLERANCE


# --- through a quantised layer -------------------------------------------------------------------


def test_gradients_through_every_layer_of_a_base_are_a_dense_float64_models(
    tiny_base: Base,
) -> None:
    for layer in tiny_base.layers.values():
        delta = random_delta(layer.out_features, layer.in_features, density=0.03)
        assert_layer_like_dense(layer, delta, random(11, layer.in_features))


@pytest.mark.parametrize(("height", "width"), [(7, 10), (33, 66), (31, 64), (1, 130), (5, 9)])
def test_gradients_through_an_odd_layer_are_a_dense_float64_models(height: int, width: int) -> None:
    delta = random_delta(height, width, density=0.3)
    assert_layer_like_dense(quantised_layer(height, width), delta, random(5, width))


def test_gradients_through_a_layer_without_entries_are_the_bases() -> None:
    delta = random_delta(7, 10, density=0.0)
    assert_layer_like_dense(quantised_layer(7, 10), delta, random(5, 10))


def test_leading_dimensions_are_kept(tiny_base: Base) -> None:
    layer = tiny_base.layers["model.layers.0.self_attn.q_proj"]
    delta = random_delta(64, 64, density=0.1)
    x = random(2, 3, 64)
    y = trainable(layer, delta)(x)
    assert y.shape == (2, 3, 64)
    assert relative_error(y, x.double() @ whole_weight(layer, delta).t()) <= TOLERANCE


def test_a_fresh_delta_is_the_base(tiny_base: Base) -> None:
    layer = tiny_base.layers["model.layers.0.self_attn.q_proj"]
    delta = random_delta(64, 64, density=0.1)
    x = random(5, 64)
    fresh = DeltaLinear(
        layer, TrainableDelta(delta.row_starts, delta.columns.int(), width=delta.width)
    )
    assert torch.equal(fresh(x), layer(x))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_delta(height: int, width: int, *, density: float) -> SparseDelta:
    generator = torch.Generator().manual_seed(height * width)
    positions = torch.randperm(height * width, generator=generator)
    positions = positions[: round(height * width * density)]
    values = torch.randn(positions.numel(), generator=generator)
    return SparseDelta.from_flat(positions, values, shape=(height, width))


def run(
    delta: SparseDelta, x: torch.Tensor, dy: torch.Tensor, *, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the product and the gradients of x and of the values."""
    x, values = x.detach().requires_grad_(), delta.values.to(dtype).clone().requires_grad_()
    y = support_product(x, values, row_starts=delta.row_starts, columns=delta.columns.int())
    dx, dvalues = torch.autograd.grad(y, (x, values), dy.to(dtype))
    return y.detach(), dx, dvalues


def run_dense(
    delta: SparseDelta, x: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the same from a dense float64 model, its weight's gradient read at the support."""
    x, weight = x.detach().double().requires_grad_(), delta.dense(torch.float64).requires_grad_()
    y = x @ weight.t()
    dx, dweight = torch.autograd.grad(y, (x, weight), dy.double())
    return y.detach(), dx, dweight[delta.rows(), delta.columns.long()]


def assert_like_dense(delta: SparseDelta, *, x: torch.Tensor, dtype: torch.dtype) -> None:
    dy = random(x.shape[0], delta.shape[0])
    got, expected = run(delta, x, dy, dtype=dtype), run_dense(delta, x, dy)
    assert got[0].dtype == dtype
    assert got[1].dtype == x.dtype
    assert_close(got, expected)


def assert_layer_like_dense(layer: Linear4bit, delta: SparseDelta, x: torch.Tensor) -> None:
    module = trainable(layer, delta)
    dy = random(x.shape[0], layer.out_features)
    x = x.requires_grad_()
    y = module(x)
    dx, dvalues = torch.autograd.grad(y, (x, module.delta.values), dy)

    true_x = x.detach().double().requires_grad_()
    weight = whole_weight(layer, delta).requires_grad_()
    true_y = true_x @ weight.t()
    true_dx, dweight = torch.autograd.grad(true_y, (true_x, weight), dy.double())
    true_dvalues = dweight[delta.rows(), delta.columns.long()]
    assert_close((y.detach(), dx, dvalues), (true_y.detach(), true_dx, true_dvalues))


def whole_weight(layer: Linear4bit, delta: SparseDelta) -> torch.Tensor:
    return dense_weight(layer, torch.float64) + delta.dense(torch.float64)


def trainable(layer: Linear4bit, delta: SparseDelta) -> DeltaLinear:
    module = TrainableDelta(delta.row_starts, delta.columns.int(), width=delta.width)
    module.values.data.copy_(delta.values)
    return DeltaLinear(layer, module)


def quantised_layer(height: int, width: int) -> Linear4bit:
    torch.manual_seed(height)
    layer = Linear4bit(width, height, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(
        "cpu"
    )  # quantises
    layer.support_avx512bf16_for_cpu = False  # as load_base does where float32 means float32
    return layer.requires_grad_(False)


def assert_close(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for left, right in zip(got, expected, strict=True):
        assert left.shape == right.shape
        assert relative_error(left, right) <= TOLERANCE


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    norm = expected.double().norm().item()
    distance = (got.double() - expected.double()).norm().item()
    return distance / norm if norm else distance
