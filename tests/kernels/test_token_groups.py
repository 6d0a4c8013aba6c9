"""Groups that are long enough are left to scatter, and to nothing else."""

from collections.abc import Callable

import pytest
import torch

from spieldose_kernels import token_groups
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.delta_matmul import delta_matmul, delta_matmul_reference
from spieldose_kernels.slab import Slab
from spieldose_kernels.sliced import pack
from spieldose_kernels.token_groups import SKIPPED, TokenGroups

CPU = torch.device("cpu")


def test_no_group_is_left_to_scatter_where_gather_always_wins() -> None:
    groups = TokenGroups.of([0], [100_000], CPU)
    assert groups is not None
    assert groups.long == ()
    assert groups.slots.tolist() == [0]


def test_groups_of_that_many_tokens_are_left_to_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_groups, "SCATTER_FROM", {"cpu": 3})
    groups = TokenGroups.of([7, None, 4, 7, 2], [2, 1, 2, 1, 3], CPU)
    assert groups is not None
    assert groups.slots.tolist() == [SKIPPED, 4, SKIPPED]
    assert [(slot, tokens.tolist()) for slot, tokens in groups.long] == [
        (2, [6, 7, 8]),
        (7, [0, 1, 5]),
    ]


@pytest.mark.parametrize("multiply", [delta_matmul, delta_matmul_reference])
def test_a_group_that_is_skipped_is_not_gathered(multiply: Callable[..., None]) -> None:
    full = SparseDelta.from_flat(torch.arange(12), torch.ones(12), shape=(3, 4))
    info = AdapterInfo(base_model="", base_fingerprint="", method="", density=1.0)
    packed = pack(Adapter(info, {"m": full, "n": full}), torch.float32)
    shapes = {"m": (3, 4), "n": (3, 4)}
    slab = Slab(shapes, slots=1, budget=1 << 12, dtype=torch.float32, device=CPU)
    slab.put(packed)  # what lies one slot before "n"'s is "m"'s
    groups = TokenGroups(*(torch.tensor(array).int() for array in ([0], [0, 1], [SKIPPED])))
    y = torch.zeros(1, 3)
    multiply(y, torch.ones(1, 4), slab.layer("n"), groups)
    assert torch.equal(y, torch.zeros(1, 3))
