"""Adapters that PEFT made give the same weights and the same logits as delta files."""

from pathlib import Path

import peft
import pytest
import torch

from spieldose_kernels.base import Base
from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import read_delta
from spieldose_trainer.errors import ConfigError
from spieldose_trainer.interop.command_line import convert

from .adapters import (
    PEFT_WARNS,
    TARGETS,
    delta_model,
    dense_model,
    logits,
    peft_deltas,
    peft_model,
    saved,
    write_sft,
)

pytestmark = PEFT_WARNS
CONFIGS = {
    "shira": peft.ShiraConfig(r=3, target_modules=TARGETS, random_seed=5),
    "super-tuning": peft.SupertuningConfig(target_modules=TARGETS, sparsity=0.95),
    "waveft": peft.WaveFTConfig(
        target_modules=TARGETS, n_frequency=70, use_idwt=False, scaling=3.5, random_loc_seed=11
    ),
    "waveft by pattern": peft.WaveFTConfig(
        target_modules=TARGETS,
        n_frequency=70,
        use_idwt=False,
        n_frequency_pattern={"layers.0.self_attn.q_proj": 30},
    ),
    "waveft in proportion": peft.WaveFTConfig(
        target_modules=TARGETS, n_frequency=70, use_idwt=False, proportional_parameters=True
    ),
}
each_method = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def converted(source: Path, base: Path, *more: str) -> Adapter:
    out = source.with_name("adapter.safetensors")
    convert([str(source), str(out), "--base", str(base), *more])
    return read_delta(out.read_bytes())


def test_an_adapter_of_pefts_is_not_written_over(tiny_directory: Path, tmp_path: Path) -> None:
    source = saved(peft_model(tiny_directory, CONFIGS["shira"]), tmp_path / "peft")
    out = source / "adapter_model.safetensors"
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=r"^out: expected another file than those of source"):
        convert([str(source), str(out), "--base", str(tiny_directory)])
    assert out.read_bytes() == before


@each_method
def test_every_weight_is_what_peft_says(
    config: peft.PeftConfig, tiny_directory: Path, tmp_path: Path
) -> None:
    model = peft_model(tiny_directory, config)
    adapter = converted(saved(model, tmp_path / "peft"), tiny_directory)
    expected = peft_deltas(model)
    assert adapter.modules.keys() == expected.keys()
    assert len(expected) == 4
    for name, delta in adapter.modules.items():
        assert torch.equal(delta.dense(torch.float32), expected[name])


@each_method
def test_logits_are_peft_s(config: peft.PeftConfig, tiny_directory: Path, tmp_path: Path) -> None:
    model = peft_model(tiny_directory, config)
    adapter = converted(saved(model, tmp_path / "peft"), tiny_directory)
    expected = logits(model)
    torch.testing.assert_close(
        logits(delta_model(tiny_directory, adapter)), expected, rtol=1e-4, atol=1e-4
    )
    assert (logits(dense_model(tiny_directory)) - expected).abs().max() > 0.1


@pytest.mark.parametrize("pickled", [True, False])
def test_the_spiel_authors_own_adapters_are_read(
    tiny_directory: Path, tmp_path: Path, *, pickled: bool
) -> None:
    expected = write_sft(tmp_path / "sft", pickled=pickled)
    adapter = converted(tmp_path / "sft", tiny_directory)
    assert adapter.modules.keys() == expected.keys()
    for name, delta in adapter.modules.items():
        assert torch.equal(delta.dense(torch.float32), expected[name])


def test_the_file_fits_the_base_and_says_where_it_comes_from(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path
) -> None:
    source = saved(peft_model(tiny_directory, CONFIGS["shira"]), tmp_path / "peft")
    converted(source, tiny_directory, "--description", "answers in verse")
    info = read_delta((tmp_path / "adapter.safetensors").read_bytes(), tiny_base.spec).info
    assert (info.method, info.description) == ("shira", "answers in verse")
    assert info.settings["r"] == "3"
    assert info.settings["peft_type"] == "SHIRA"
    weights = sum(r * c for r, c in tiny_base.spec.shapes.values())
    assert info.density == 2 * 3 * (64 + 64 + 160 + 64) / weights


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
)
def test_values_keep_their_precision(
    tiny_directory: Path, tmp_path: Path, given: torch.dtype, kept: torch.dtype
) -> None:
    name = "model.layers.0.self_attn.q_proj"
    values = torch.randn(50, generator=torch.Generator().manual_seed(1)).to(given)
    write_sft(tmp_path / "sft", tensors={f"base_model.model.{name}.sft_delta.values": values})
    delta = converted(tmp_path / "sft", tiny_directory).modules[name]
    assert delta.values.dtype == kept
    assert torch.equal(delta.values.float().sort().values, values.float().sort().values)


def test_padding_of_shira_is_no_entry(tiny_directory: Path, tmp_path: Path) -> None:
    model = peft_model(tiny_directory, CONFIGS["shira"])
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.shira_indices["default"][:, 100:] = 0
    layer.shira_weight["default"].data[100:] = 0.0
    adapter = converted(saved(model, tmp_path / "peft"), tiny_directory)
    assert adapter.modules["model.layers.0.self_attn.q_proj"].nnz == 100


def test_shira_indices_from_windows_are_read(tiny_directory: Path, tmp_path: Path) -> None:
    model = peft_model(tiny_directory, CONFIGS["shira"])
    expected = peft_deltas(model)
    for module in model.modules():
        if hasattr(module, "shira_indices"):
            module.shira_indices["default"] = module.shira_indices["default"].float()
    adapter = converted(saved(model, tmp_path / "peft"), tiny_directory)
    for name, delta in adapter.modules.items():
        assert torch.equal(delta.dense(torch.float32), expected[name])


def test_a_peft_adapter_becomes_another_at_once(tiny_directory: Path, tmp_path: Path) -> None:
    model = peft_model(tiny_directory, CONFIGS["super-tuning"])
    source, out = saved(model, tmp_path / "peft"), tmp_path / "shira"
    convert([str(source), str(out), "--base", str(tiny_directory), "--format", "shira"])
    loaded = peft.PeftModel.from_pretrained(dense_model(tiny_directory), out).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
