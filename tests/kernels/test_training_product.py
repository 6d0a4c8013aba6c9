"""Training's products on the CPU, in blocks of tokens: y + Δ·x and its gradients in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels.cpu import training
from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.support_product import add_support_product

from .random_deltas import random, random_delta

SHAPES = [  # tokens, R, C, density
    pytest.param((7,), 5, 9, 0.3, id="odd"),
    pytest.param((3, 47), 33, 65, 0.05, id="three-blocks"),
    pytest.param((64,), 48, 32, 0.02, id="one-block-and-many-empty-rows"),
    pytest.param((130,), 16, 48, 1.0, id="full-support"),
    pytest.param((1,), 1, 1, 1.0, id="one-everything"),
    pytest.param((5,), 4, 6, 0.0, id="no-entries"),
    pytest.param((0,), 5, 9, 0.3, id="no-tokens"),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "height", "width", "density"), SHAPES)
def test_the_sum_and_its_gradients_are_a_dense_float64_models(
    monkeypatch: pytest.MonkeyPatch,
    tokens: tuple[int, ...],
    height: int,
    width: int,
    density: float,
    dtype: torch.dtype,
    threads: int,
) -> None:
    monkeypatch.setattr(training, "threads_for", lambda _: threads)
    check(random_delta(height, width, density=density), tokens=tokens, dtype=dtype)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_support_is_a_dense_float64_models(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
    chosen = sorted(data.draw(st.sets(st.integers(0, height * width - 1), max_size=60)))
    values = random(len(chosen))
    delta = SparseDelta.from_flat(
        torch.tensor(chosen, dtype=torch.int64), values, shape=(height, width)
    )
    check(delta, tokens=(data.draw(st.integers(1, 140)),), dtype=torch.float32)


def test_the_sum_is_rounded_once() -> None:
    """256 + 16 halves: added one by one in bfloat16 they would vanish."""
    delta = SparseDelta.from_flat(torch.arange(16), torch.full((16,), 0.5), shape=(1, 16))
    y = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    assert apply(delta, y, torch.ones(1, 16, dtype=torch.bfloat16)).item() == 264.0


def test_the_base_output_is_left_as_it_was() -> None:
    delta = random_delta(5, 9, density=0.5)
    y = random(7, 5)
    before = y.clone()
    apply(delta, y, random(7, 9))
    assert torch.equal(y, before)


def test_activations_and_gradients_need_not_be_contiguous() -> None:
    delta = random_delta(5, 9, density=0.4)
    x, y, dy = random(9, 70).t().requires_grad_(), random(5, 70).t(), random(5, 70).t()
    values = delta.values.clone().requires_grad_()
    out = apply(delta, y, x, values)
    dx, dvalues = torch.autograd.grad(out, (x, values), dy)
    dense = delta.dense(torch.float64)
    close(out, y.double() + x.double() @ dense.t(), torch.float32)
    close(dx, dy.double() @ dense, torch.float32)
    expected = (dy.double().t() @ x.double())[delta.rows(), delta.columns.long()]
    close(dvalues, expected, torch.float32)


def check(delta: SparseDelta, *, tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    height, width = delta.shape
    x = random(*tokens, width).to(dtype).requires_grad_()
    y = random(*tokens, height).to(dtype).requires_grad_()
    dy = random(*tokens, height).to(dtype)
    values = delta.values.clone().requires_grad_()
    out = apply(delta, y, x, values)
    found = torch.autograd.grad(out, (y, x, values), dy)
    assert [tensor.dtype for tensor in (out, *found)] == [dtype, dtype, dtype, torch.float32]

    dense = delta.dense(torch.float64)
    flat_x, flat_dy = x.detach().double().reshape(-1, width), dy.double().reshape(-1, height)
    dvalues = (flat_dy.t() @ flat_x)[delta.rows(), delta.columns.long()]
    close(out, y.detach().double() + x.detach().double() @ dense.t(), dtype)
    assert torch.equal(found[0], dy)
    close(found[1], dy.double() @ dense, dtype)
    close(found[2], dvalues, torch.float32)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2**-8, 1e-5)
    torch.testing.assert_close(found.detach().double(), expected, rtol=rtol, atol=atol)


def apply(
    delta: SparseDelta, y: torch.Tensor, x: torch.Tensor, values: torch.Tensor | None = None
) -> torch.Tensor:
    return add_support_product(
        y,
        x,
        delta.values if values is None else values,
        row_starts=delta.row_starts,
        columns=delta.columns.int(),
    )
