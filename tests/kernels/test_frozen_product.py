"""A delta that stays as it is: y + Δ·x and its gradient in x, in float64; nothing of x is kept."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from spieldose_kernels.linear import FrozenDelta

from .random_deltas import random, random_delta

SHAPES = [  # tokens, R, C, density
    pytest.param((7,), 5, 9, 0.3, id="odd"),
    pytest.param((3, 47), 33, 65, 0.05, id="three-blocks"),
    pytest.param((130,), 16, 48, 1.0, id="full"),
    pytest.param((5,), 4, 6, 0.0, id="no-entries"),
    pytest.param((0,), 5, 9, 0.3, id="no-tokens"),
]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float64: 1e-6}


@pytest.mark.parametrize("dtype", list(TOLERANCES))  # float64 is not the CPU's own product's
@pytest.mark.parametrize(("tokens", "height", "width", "density"), SHAPES)
def test_the_sum_and_its_gradients_are_a_dense_float64_models(
    tokens: tuple[int, ...], height: int, width: int, density: float, dtype: torch.dtype
) -> None:
    delta = random_delta(height, width, density=density)
    x = random(*tokens, width).to(dtype).requires_grad_()
    y = random(*tokens, height).to(dtype).requires_grad_()
    before, dy = y.detach().clone(), random(*tokens, height).to(dtype)
    out = FrozenDelta(delta).add_to(y, x)
    found = torch.autograd.grad(out, (y, x), dy)
    assert [tensor.dtype for tensor in (out, *found)] == [dtype] * 3
    dense = delta.dense(torch.float64)
    close(out, y.double() + x.double() @ dense.t(), dtype)
    assert torch.equal(found[0], dy)
    close(found[1], dy.double() @ dense, dtype)
    assert torch.equal(y.detach(), before)


def test_no_activation_is_kept_for_backward() -> None:
    kept: list[torch.Tensor] = []
    x = random(7, 9).requires_grad_()
    frozen = FrozenDelta(random_delta(5, 9, density=0.3))
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
        frozen.add_to(random(7, 5), x)
    assert kept == []


def test_activations_and_gradients_need_not_be_contiguous() -> None:
    delta = random_delta(5, 9, density=0.4)
    x, y, dy = random(9, 70).t().requires_grad_(), random(5, 70).t(), random(5, 70).t()
    out = FrozenDelta(delta).add_to(y, x)
    (dx,) = torch.autograd.grad(out, x, dy)
    dense = delta.dense(torch.float64)
    close(out, y.double() + x.double() @ dense.t(), torch.float32)
    close(dx, dy.double() @ dense, torch.float32)


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    y = random(7, 5).requires_grad_()
    out = FrozenDelta(random_delta(5, 9, density=0.3)).add_to(y, random(7, 9))
    out.sum().backward()
    assert torch.equal(y.grad, torch.ones(7, 5))


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    rtol = TOLERANCES[dtype]
    torch.testing.assert_close(found.detach().double(), expected, rtol=rtol, atol=1e-5)
