"""The products of a training step against dense float64 ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_kernels.gpu import sampled
from spieldose_kernels.gpu.sampled import BLOCK_J, BLOCK_T, FLOATS

TOLERANCE = 1e-6  # ‖out - ref‖ / ‖ref‖, float32 sums of inputs that both sides hold exactly


class Support:
    """A mask [R, C] as rows' starts and columns."""

    def __init__(self, mask: torch.Tensor, device: torch.device | str) -> None:
        self.shape = mask.shape
        self.rows, columns = mask.nonzero(as_tuple=True)
        starts = torch.zeros(mask.shape[0] + 1, dtype=torch.int32)
        starts[1:] = mask.sum(1).cumsum(0)
        self.row_starts, self.columns = starts.to(device), columns.int().to(device)
        self.rows = self.rows.to(device)

    def dense(self, values: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(self.shape, dtype=torch.float64, device=values.device)
        return out.index_put((self.rows, self.columns.long()), values.double())


def features(count: int, tokens: int, device: torch.device | str, dtype: torch.dtype):
    return torch.randn(count, tokens).to(device, dtype)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN, so that what a kernel leaves out shows."""
    torch.manual_seed(0)
    empty = torch.empty

    def poison(*size, **options) -> torch.Tensor:
        out = empty(*size, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poison)


def assert_close(out: torch.Tensor, true: torch.Tensor) -> None:
    assert out.dtype == torch.float32
    assert out.shape == true.shape
    assert torch.linalg.norm(out - true) <= TOLERANCE * torch.linalg.norm(true)


def assert_all_products(mask: torch.Tensor, tokens: int, device, dtype=torch.float32) -> None:
    support = Support(mask, device)
    index = {"row_starts": support.row_starts, "columns": support.columns}
    x = features(mask.shape[1], tokens, device, dtype)
    y = features(mask.shape[0], tokens, device, dtype)
    values = torch.randn(support.columns.numel()).to(device, dtype)
    dense = support.dense(values)

    gradient = y.double() @ x.double().t()
    assert_close(
        sampled.sampled_product(y, x, **index), gradient[support.rows, support.columns.long()]
    )
    assert_close(sampled.product(x, values, **index), dense @ x.double())
    starts, columns, places = sampled.transpose_support(**index, width=mask.shape[1])
    dx = sampled.product(y, values[places], row_starts=starts, columns=columns)
    assert_close(dx, dense.t() @ y.double())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 2, 16, BLOCK_T - 1, BLOCK_T, 2 * BLOCK_T + 3])
def test_products_are_the_dense_ones_for_any_number_of_tokens(device, dtype, tokens) -> None:
    assert_all_products(torch.rand(13, 37) < 0.2, tokens, device, dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 65), (65, 2)])
def test_layers_of_any_shape_are_multiplied(device, shape) -> None:
    mask = torch.rand(shape) < 0.5
    mask[0, 0] = True
    assert_all_products(mask, 5, device)


def test_one_row_may_hold_every_column_and_the_others_nothing(device) -> None:
    mask = torch.zeros(7, 3 * BLOCK_J + 5, dtype=torch.bool)
    mask[4] = True
    assert_all_products(mask, 33, device)


def test_one_column_may_be_in_every_row(device) -> None:
    mask = torch.zeros(3 * BLOCK_J + 5, 7, dtype=torch.bool)
    mask[:, 6] = True
    assert_all_products(mask, 33, device)


@pytest.mark.parametrize("entries", [1, BLOCK_J - 1, BLOCK_J, BLOCK_J + 1, 2 * BLOCK_J])
def test_entries_need_not_fill_a_block(device, entries) -> None:
    mask = torch.zeros(4, 2 * BLOCK_J, dtype=torch.bool)
    mask[2, :entries] = True
    assert_all_products(mask, 3, device)


@pytest.mark.parametrize("empty", [[0], [9], [0, 1, 2], [7, 8, 9], [4, 5], list(range(9))])
def test_rows_may_be_empty_wherever_they_lie(device, empty) -> None:
    mask = torch.ones(10, 11, dtype=torch.bool)
    mask[empty] = False
    assert_all_products(mask, 3, device)


def test_a_support_without_entries_gives_zeros(device) -> None:
    assert_all_products(torch.zeros(5, 6, dtype=torch.bool), 3, device)


def test_without_tokens_every_sampled_sum_is_zero(device) -> None:
    assert_all_products(torch.rand(5, 6) < 0.5, 0, device)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_support_gives_the_dense_products(data: st.DataObject) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    # rows' own densities: real supports have rows a hundred times as long as others
    densities = data.draw(st.lists(st.sampled_from([0, 0, 0.05, 0.5, 1]), min_size=1, max_size=8))
    spread = torch.tensor(densities).repeat(height)[:height, None]
    assert_all_products(torch.rand(height, width) < spread, data.draw(st.integers(0, 40)), device)


def test_features_that_no_entry_uses_are_never_read(device) -> None:
    mask = torch.rand(20, 70) < 0.1
    mask[3], mask[:, 0] = False, False  # masked lanes fall back to feature 0
    mask[0] = False
    support = Support(mask, device)
    index = {"row_starts": support.row_starts, "columns": support.columns}
    x, y = features(70, 9, device, torch.float32), features(20, 9, device, torch.float32)
    x[~mask.any(0).to(device)] = torch.nan
    y[~mask.any(1).to(device)] = torch.inf
    values = torch.randn(support.columns.numel()).to(device)
    assert sampled.sampled_product(y, x, **index).isfinite().all()
    assert sampled.product(x, values, **index).isfinite().all()
    starts, columns, places = sampled.transpose_support(**index, width=70)
    assert sampled.product(y, values[places], row_starts=starts, columns=columns).isfinite().all()


def test_an_infinite_token_stays_in_its_own_column(device) -> None:
    support = Support(torch.ones(3, 40, dtype=torch.bool), device)
    x = features(40, 5, device, torch.float32)
    x[7, 2] = torch.inf
    values = torch.ones(support.columns.numel(), device=device)
    y = sampled.product(x, values, row_starts=support.row_starts, columns=support.columns)
    assert y.isinf().nonzero()[:, 1].unique().tolist() == [2]
    assert y.isinf().sum() == 3


def test_sums_of_bfloat16_features_are_not_rounded_on_the_way(device) -> None:
    support = Support(torch.ones(1, 1, dtype=torch.bool), device)
    y = torch.ones(1, 4 * BLOCK_T, dtype=torch.bfloat16, device=device)
    index = {"row_starts": support.row_starts, "columns": support.columns}
    y[0, 0] = 1024  # bfloat16 holds no odd number so large
    assert sampled.sampled_product(y, torch.ones_like(y), **index).item() == 1023 + 4 * BLOCK_T


def test_a_turned_support_names_every_entry_once_in_ascending_order(device) -> None:
    support = Support(torch.rand(30, 20) < 0.3, device)
    starts, columns, places = sampled.transpose_support(
        support.row_starts, support.columns, width=20
    )
    values = torch.arange(1.0, support.columns.numel() + 1, device=device)
    turned = Support(support.dense(values).t().cpu() != 0, device)
    assert torch.equal(starts, turned.row_starts)
    assert torch.equal(columns, turned.columns)
    assert torch.equal(turned.dense(values[places]), support.dense(values).t())


@pytest.mark.parametrize(
    "wrong",
    [
        {"y": torch.float64},
        {"x": torch.bfloat16},
        {"columns": torch.int64},
        {"row_starts": torch.int64},
    ],
)
def test_other_dtypes_are_refused(device, wrong) -> None:
    support = Support(torch.ones(2, 3, dtype=torch.bool), device)
    arguments = {
        "y": features(2, 4, device, torch.float32),
        "x": features(3, 4, device, torch.float32),
        "row_starts": support.row_starts,
        "columns": support.columns,
    }
    arguments |= {name: arguments[name].to(dtype) for name, dtype in wrong.items()}
    with pytest.raises(AssertionError, match="expected"):
        sampled.sampled_product(arguments.pop("y"), arguments.pop("x"), **arguments)
