"""The fused NF4 product against the float64 product of the weight that bitsandbytes dequantises."""

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

from spieldose_kernels.gpu.nf4 import FLOAT32_TILE, TILES, nf4_matmul

# of an output, in units of Σ |w|·|x|: both sides have the same inputs, sums are float32, rounded
# once. Triton's interpreter cuts bfloat16 off where a GPU rounds it, weights and outputs.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8 if torch.cuda.is_available() else 2**-6,
    torch.float16: 2**-10,
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN, so that what a kernel leaves out shows."""
    torch.manual_seed(0)
    empty = torch.empty

    def poison(*size, **options) -> torch.Tensor:
        out = empty(*size, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poison)


def quantised(w: torch.Tensor) -> tuple[torch.Tensor, QuantState]:
    return quantize_4bit(w, quant_type="nf4", compress_statistics=True, blocksize=64)


def assert_product(w: torch.Tensor, *, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    packed, state = quantised(w)
    state.dtype = dtype  # what bitsandbytes rounds the dequantised weight to
    x = torch.randn(tokens, w.shape[1]).to(w.device, dtype)
    y = nf4_matmul(x, packed, quant_state=state)
    true_w = dequantize_4bit(packed, state).double()
    scale = x.double().abs() @ true_w.abs().t()
    assert y.dtype == dtype
    assert y.shape == (tokens, w.shape[0])
    assert ((y - x.double() @ true_w.t()).abs() <= TOLERANCE[dtype] * scale).all()
    return y


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 33, 64])
def test_it_is_the_product_with_the_dequantised_weight(device, dtype, tokens) -> None:
    assert_product(torch.randn(70, 192, device=device), tokens=tokens, dtype=dtype)


@pytest.mark.parametrize("width", [64, 128, 320, 576])
@pytest.mark.parametrize("height", [1, 31, 32, 33, 100])
def test_layers_need_not_fill_whole_tiles(device, height, width) -> None:
    assert_product(torch.randn(height, width, device=device), tokens=2, dtype=torch.float32)


def test_more_tokens_than_a_tile_holds_are_all_multiplied(device) -> None:
    w = torch.randn(33, 128, device=device)
    assert_product(w, tokens=max(TILES) + 5, dtype=torch.bfloat16)
    assert_product(w, tokens=FLOAT32_TILE.tokens + 1, dtype=torch.float32)


def test_no_tokens_give_no_rows(device) -> None:
    assert_product(torch.randn(33, 128, device=device), tokens=0, dtype=torch.bfloat16)


def test_every_block_has_its_own_scale(device) -> None:
    # 1040 blocks: scales' own scales, of 256 each, begin amid rows too
    w = torch.randn(80, 13, 64, device=device)
    w *= torch.logspace(-3, 1, 80 * 13, device=device)[torch.randperm(80 * 13)].view(80, 13, 1)
    assert_product(w.view(80, -1), tokens=3, dtype=torch.float32)


def test_a_block_of_zeros_adds_what_bitsandbytes_makes_of_it(device) -> None:
    w = torch.randn(40, 3, 64, device=device)
    w[::2, 1] = 0
    assert_product(w.view(40, -1), tokens=3, dtype=torch.float32)


def test_a_weight_of_zeros_gives_zeros(device) -> None:
    y = assert_product(torch.zeros(40, 128, device=device), tokens=3, dtype=torch.float32)
    assert (y == 0).all()


def test_the_first_of_two_weights_is_in_the_high_half(device) -> None:
    packed, state = quantised(torch.tensor([[1.0, -1.0] * 32], device=device))
    assert packed.unique().tolist() == [0xF0]
    y = nf4_matmul(torch.eye(64, device=device)[:2], packed, quant_state=state)
    torch.testing.assert_close(y.flatten().cpu(), torch.tensor([1.0, -1.0]))


def test_a_token_that_is_not_finite_stays_its_own(device) -> None:
    packed, state = quantised(torch.randn(40, 192, device=device))
    x = torch.randn(3, 192, device=device)
    x[1] = torch.nan
    y = nf4_matmul(x, packed, quant_state=state)
    assert y.isnan().any(1).tolist() == [False, True, False]


def test_a_layers_own_parameter_is_taken_as_it_is(device) -> None:
    layer = Linear4bit(128, 40, bias=False, compute_dtype=torch.float32)
    weight = torch.randn(40, 128)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
    x = torch.randn(2, 128, device=device)
    y = nf4_matmul(x, layer.weight.data, quant_state=layer.weight.quant_state)
    true_w = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(y, x @ true_w.t())


@pytest.mark.parametrize(
    ("width", "options", "got"),
    [
        (96, {"quant_type": "nf4", "compress_statistics": True, "blocksize": 64}, "96"),
        (64, {"quant_type": "fp4", "compress_statistics": True, "blocksize": 64}, "fp4"),
        (64, {"quant_type": "nf4", "compress_statistics": False, "blocksize": 64}, "False"),
        (128, {"quant_type": "nf4", "compress_statistics": True, "blocksize": 128}, "128"),
    ],
)
def test_other_formats_are_refused(device, width, options, got) -> None:
    packed, state = quantize_4bit(torch.randn(4, width, device=device), **options)
    with pytest.raises(AssertionError, match=rf"expected .*got .*{got}"):
        nf4_matmul(torch.randn(1, width, device=device), packed, quant_state=state)
