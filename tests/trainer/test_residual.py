"""Values may start from what 4 bits rounded away: the support then plays at full precision."""

import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from spieldose_kernels.base import Base, dense_weight
from spieldose_trainer import trainer
from spieldose_trainer.errors import ConfigError
from spieldose_trainer.methods import SelectorName
from spieldose_trainer.support import flat_positions
from spieldose_trainer.trainer import Trainer

from .configuration import Configure
from .runs import adapter_of, run

pytestmark = pytest.mark.usefixtures("no_report")

SELECTORS = get_args(SelectorName)


def updater(selector: str) -> str:
    return {"momentum": "sm3", "largest": "compressed-adam"}.get(selector, "adamw")


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_full_support_with_residuals_is_the_unquantised_model(
    configure: Configure, plain: Base, selector: str
) -> None:
    model, without = (
        Trainer(
            configure(selector=selector, updater=updater(selector), density=1.0, start=start)
        ).model
        for start in ("residual", "zero")
    )
    tokens = torch.arange(1, 60)[None]
    exact, found, rounded = (
        played(input_ids=tokens).logits.detach() for played in (plain.model, model, without)
    )
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert float((rounded - exact).abs().max()) > 1  # or the test shows nothing


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_partial_support_starts_from_its_rounding_errors(
    configure: Configure, plain: Base, selector: str
) -> None:
    config = configure(selector=selector, updater=updater(selector), start="residual", rank=8)
    model = Trainer(config).model
    for name, layer in model.layers.items():
        exact = plain.layers[name].weight
        error = (exact - dense_weight(model.base.layers[name], torch.float32)).flatten()
        expected = error[flat_positions(layer)].detach()
        assert torch.equal(layer.values.detach(), expected)
        assert bool(expected.any())


def test_a_large_layer_is_read_in_pieces(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer(configure(method="random", start="residual")).model
    monkeypatch.setattr("spieldose_trainer.interop.checkpoint_tensors.TILE_WEIGHTS", 1000)
    pieces = Trainer(configure(method="random", start="residual")).model
    for name, layer in whole.layers.items():
        assert torch.equal(layer.values, pieces.layers[name].values)


def test_in_bfloat16_the_error_is_that_of_the_weights_as_they_are_played(
    configure: Configure, plain: Base
) -> None:
    model = Trainer(configure(method="random", start="residual", compute_dtype="bfloat16")).model
    for name, layer in model.layers.items():
        played = dense_weight(model.base.layers[name], torch.bfloat16).float()
        error = (plain.layers[name].weight - played).flatten()[flat_positions(layer)]
        assert torch.equal(layer.values, error)


def test_a_run_trains_from_its_residuals(configure: Configure) -> None:
    config = configure(method="magnitude", start="residual", max_steps=10, density=0.3)
    started = Trainer(config).model.layers
    result = run(config)
    assert result.losses[-1] < result.losses[0]
    for name, delta in adapter_of(result).modules.items():
        moved = (delta.values - started[name].values.detach()).abs()
        assert 0 < float(moved.max()) < 0.2  # ten updates of at most 1e-2, more or less


def test_a_base_that_was_not_quantised_has_no_residuals(configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"^start=residual needs a quantised base"):
        configure(start="residual", quantised=False)


def test_a_checkpoint_without_the_original_weights_is_refused_before_it_is_loaded(
    configure: Configure, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "packed"
    shutil.copytree(tiny_directory, directory)
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.zeros(5120, 1, dtype=torch.uint8)  # as bitsandbytes saves it
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(trainer, "load_base", lambda *_, **__: pytest.fail("it was loaded"))
    said = rf"packed: expected {name} of shape \[160, 64\], not quantised, got \[5120, 1\] in U8: "
    with pytest.raises(ConfigError, match=said):
        Trainer(configure(base=str(directory), start="residual"))
