"""What cannot be imported ends in one line that names what was expected and what was found."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spieldose_kernels.errors import BaseError, NotADelta, SpieldoseError
from spieldose_trainer.errors import ConfigError, ConversionError
from spieldose_trainer.interop.command_line import convert

from .adapters import PEFT_WARNS, TARGETS, peft_model, saved, write_adapter, write_sft

pytestmark = PEFT_WARNS
Q = "model.layers.0.self_attn.q_proj"
INDICES = f"base_model.model.{Q}.sft_delta.indices"
VALUES = f"base_model.model.{Q}.sft_delta.values"


class Touch:
    """Create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the tiny one's module names and other shapes."""
    directory = tmp_path_factory.mktemp("other-base")
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def refused(source: Path, base: Path, *, error: type[SpieldoseError] = ConversionError) -> str:
    out = source.with_name("refused.safetensors")
    with pytest.raises(error) as caught:
        convert([str(source), str(out), "--base", str(base)])
    message = str(caught.value)
    assert "\n" not in message
    assert ("expected" in message and "got" in message) or "must" in message
    assert not out.exists()
    return message


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LORA"}, "expected peft_type SHIRA, SUPERTUNING, WAVEFT, SFT, got LORA"),
        ({"peft_type": None}, "expected peft_type, got None"),
        ({"num_deltas": None}, "expected num_deltas, got None"),
    ],
)
def test_settings_that_name_no_known_format_are_refused(
    tiny_directory: Path, tmp_path: Path, settings: Mapping[str, Any], message: str
) -> None:
    write_sft(tmp_path / "sft", settings=settings)
    assert message in refused(tmp_path / "sft", tiny_directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "expected PEFT's settings in"),
        ("[]", "expected a JSON object, got list"),
        (r'{"a": "\ud800"}', "expected Unicode text, got half of a character"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(
    tiny_directory: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    write_sft(tmp_path / "sft")
    path = tmp_path / "sft" / "adapter_config.json"
    path.unlink() if text is None else path.write_text(text)
    assert message in refused(tmp_path / "sft", tiny_directory)


@pytest.mark.parametrize("name", ["nothing", "a" * 300])
def test_a_source_that_is_not_there_is_refused(
    tiny_directory: Path, tmp_path: Path, name: str
) -> None:
    message = refused(tmp_path / name, tiny_directory, error=ConfigError)
    assert "source must be the directory of a PEFT adapter or a delta file" in message


def test_a_foreign_file_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    source = tmp_path / "adapter_model.bin"
    torch.save({VALUES: torch.ones(1)}, source)
    with pytest.raises(NotADelta, match=r"adapter_model\.bin: expected .*, got a pickle"):
        convert([str(source), str(tmp_path / "out"), "--base", str(tiny_directory)])


def test_a_delta_file_needs_its_ending(tiny_directory: Path, tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    with pytest.raises(ConfigError, match=r"out must end in \.safetensors, got"):
        convert([str(tmp_path / "sft"), str(tmp_path / "out"), "--base", str(tiny_directory)])


@pytest.mark.parametrize("description", ["a\nb", "\udcff"])
def test_a_description_is_one_line_of_text(
    tiny_directory: Path, tmp_path: Path, description: str
) -> None:
    write_sft(tmp_path / "sft")
    words = [str(tmp_path / "sft"), str(tmp_path / "o.safetensors"), "--base", str(tiny_directory)]
    with pytest.raises(ConfigError, match=r"^description must be "):
        convert([*words, "--description", description])


def test_where_nothing_can_be_written_is_said(tiny_directory: Path, tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    (tmp_path / "file").write_text("a file")
    out = tmp_path / "file" / "out.safetensors"
    with pytest.raises(ConfigError, match=r"^out: expected a place to write to, got .*file"):
        convert([str(tmp_path / "sft"), str(out), "--base", str(tiny_directory)])


def test_a_base_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "sft", tmp_path / "empty", error=BaseError)


# --- files ---------------------------------------------------------------------------------------


def test_settings_without_weights_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    (tmp_path / "sft" / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors or adapter_model.bin, got neither" in refused(
        tmp_path / "sft", tiny_directory
    )


def test_a_pickle_that_runs_code_is_refused_unrun(tiny_directory: Path, tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    torch.save({VALUES: Touch(tmp_path / "ran")}, tmp_path / "sft" / "adapter_model.bin")
    message = refused(tmp_path / "sft", tiny_directory)
    assert "expected a pickle of tensors only" in message
    assert "weights_only" not in message  # torch advises to load it all the same
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected named tensors, got list"),
        ({VALUES: 3.0}, f"expected named tensors, got float at '{VALUES}'"),
        ({5: torch.ones(1)}, "expected named tensors, got Tensor at 5"),
        ({}, "expected at least one tensor, got none"),
        ({"x.sft_delta.values": torch.ones(1)}, "names that begin with base_model.model., got 'x."),
    ],
)
def test_a_pickle_of_other_things_than_named_tensors_is_refused(
    tiny_directory: Path, tmp_path: Path, content: object, message: str
) -> None:
    write_sft(tmp_path / "sft")
    torch.save(content, tmp_path / "sft" / "adapter_model.bin")
    assert message in refused(tmp_path / "sft", tiny_directory)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("sparse_coo", lambda: torch.ones(50).to_sparse()),
        ("meta", lambda: torch.empty(50, device="meta")),
        ("nested", lambda: torch.nested.nested_tensor([torch.ones(20), torch.ones(30)])),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense_are_refused(
    tiny_directory: Path, tmp_path: Path, kind: str, make: Callable[[], torch.Tensor]
) -> None:
    write_sft(tmp_path / "sft", tensors={VALUES: make()})
    message = refused(tmp_path / "sft", tiny_directory)
    assert f"expected dense tensors, got a {kind} one at '{VALUES}'" in message


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip"])
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_file_of_something_else_is_refused(
    tiny_directory: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    write_sft(tmp_path / "sft")
    (tmp_path / "sft" / name).write_bytes(content)
    assert name in refused(tmp_path / "sft", tiny_directory)


# --- modules -------------------------------------------------------------------------------------


def test_a_module_the_base_lacks_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    name = "model.layers.7.self_attn.q_proj"
    pair = {
        f"base_model.model.{name}.sft_delta.indices": torch.tensor([1]),
        f"base_model.model.{name}.sft_delta.values": torch.ones(1),
    }
    write_sft(tmp_path / "sft", tensors=pair)
    message = refused(tmp_path / "sft", tiny_directory)
    assert f"expected a target module of {tiny_directory}, got '{name}'" in message


def test_the_output_head_is_no_target(tiny_directory: Path, tmp_path: Path) -> None:
    pair = {
        "base_model.model.lm_head.sft_delta.indices": torch.tensor([1]),
        "base_model.model.lm_head.sft_delta.values": torch.ones(1),
    }
    write_sft(tmp_path / "sft", tensors=pair)
    assert "expected a target module" in refused(tmp_path / "sft", tiny_directory)


def test_dense_modules_beside_the_entries_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    config = peft.ShiraConfig(r=1, target_modules=TARGETS, modules_to_save=["model.norm"])
    source = saved(peft_model(tiny_directory, config), tmp_path / "peft")
    message = refused(source, tiny_directory)
    assert "only shira_indices and shira_weight of linear layers" in message
    assert "got 'model.norm.weight'" in message


def test_a_module_with_half_its_tensors_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    write_sft(tmp_path / "sft", tensors={INDICES: None})
    assert f"{Q}: expected sft_delta.indices, got none" in refused(tmp_path / "sft", tiny_directory)


def test_a_module_that_only_the_settings_name_is_refused(
    tiny_directory: Path, tmp_path: Path
) -> None:
    write_sft(tmp_path / "sft", tensors={INDICES: None, VALUES: None})
    assert f"expected a delta of '{Q}', got none" in refused(tmp_path / "sft", tiny_directory)


def test_another_number_of_entries_than_declared_is_refused(
    tiny_directory: Path, tmp_path: Path
) -> None:
    write_sft(tmp_path / "sft", tensors={INDICES: torch.arange(49), VALUES: torch.ones(49)})
    message = refused(tmp_path / "sft", tiny_directory)
    assert f"{Q}: expected num_deltas = 50 values, got 49" in message


# --- entries -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({INDICES: torch.tensor([*range(49), 4096])}, "positions below 4096 (shape [64, 64]), got"),
        (
            {INDICES: torch.tensor([*range(49), -1])},
            "positions below 4096 (shape [64, 64]), got -1",
        ),
        ({INDICES: torch.tensor([*range(49), 7])}, "every position once, got row 0 column 7 again"),
        ({INDICES: torch.arange(51)}, "as many positions as values, got 51 and 50"),
        ({INDICES: torch.arange(50)[None]}, "positions: expected one dimension, got shape [1, 50]"),
        ({INDICES: torch.arange(50.0)}, "positions: expected one of int32, int64, got float32"),
        ({VALUES: torch.ones(5, 10)}, "values: expected one dimension, got shape [5, 10]"),
        ({VALUES: torch.ones(50).double()}, "float32, bfloat16, float16, got float64"),
        ({VALUES: torch.full((50,), torch.nan)}, "expected finite values, got NaN or infinity"),
        ({VALUES: torch.full((50,), torch.inf)}, "expected finite values, got NaN or infinity"),
    ],
)
def test_entries_that_do_not_fit_their_layer_are_refused(
    tiny_directory: Path, tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    write_sft(tmp_path / "sft", tensors=tensors)
    found = refused(tmp_path / "sft", tiny_directory)
    assert found.startswith(Q)
    assert message in found


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((0.5, 3.0), "expected whole indices, got 0.5"),
        ((float("nan"), 3.0), "expected whole indices, got nan"),
        ((64, 0), "expected positions inside [64, 64], got [64, 0]"),
        ((0, 64), "expected positions inside [64, 64], got [0, 64]"),  # not row 1, column 0
        ((-1, 3), "expected positions inside [64, 64], got [-1, 3]"),
        ((1, 1), "expected every position once, got row 1 column 1 again"),
    ],
)
def test_rows_and_columns_that_do_not_fit_their_layer_are_refused(
    tiny_directory: Path, tmp_path: Path, place: tuple[float, float], message: str
) -> None:
    indices = torch.zeros(2, 128, dtype=torch.tensor(place).dtype)  # r = 1
    indices[0], indices[1] = torch.arange(128) // 64, torch.arange(128) % 64
    indices[:, 5] = torch.tensor(place)
    tensors = {
        f"base_model.model.{Q}.shira_indices": indices,
        f"base_model.model.{Q}.shira_weight": torch.ones(128),
    }
    write_adapter(tmp_path / "peft", {"peft_type": "SHIRA", "r": 1}, tensors, pickled=False)
    assert f"{Q}: {message}" in refused(tmp_path / "peft", tiny_directory)


def test_rows_and_columns_in_16_bits_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    tensors = {  # bfloat16 has rounded them already
        f"base_model.model.{Q}.shira_indices": torch.zeros(2, 128, dtype=torch.bfloat16),
        f"base_model.model.{Q}.shira_weight": torch.ones(128),
    }
    write_adapter(tmp_path / "peft", {"peft_type": "SHIRA", "r": 1}, tensors, pickled=False)
    said = f"{Q}: indices: expected one of int32, int64, float32, got bfloat16"
    assert said in refused(tmp_path / "peft", tiny_directory)


# --- what a method cannot carry ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False")
def test_super_tuning_without_indices_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    config = peft.SupertuningConfig(
        target_modules=TARGETS, sparsity=0.95, save_precomputed_indices=False
    )
    message = refused(saved(peft_model(tiny_directory, config), tmp_path / "peft"), tiny_directory)
    assert "expected supertuning_indices, got none" in message
    assert "save_precomputed_indices=True" in message


def test_super_tuning_with_a_low_rank_part_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    config = peft.SupertuningConfig(target_modules=TARGETS, sparsity=0.95, r=2)
    message = refused(saved(peft_model(tiny_directory, config), tmp_path / "peft"), tiny_directory)
    assert "expected sparse values alone, got a low-rank part too (r=2)" in message


def test_wavelets_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    config = peft.WaveFTConfig(target_modules=TARGETS, n_frequency=70, use_idwt=True)
    message = refused(saved(peft_model(tiny_directory, config), tmp_path / "peft"), tiny_directory)
    assert "expected use_idwt false, got True" in message


def test_wavelets_are_what_is_meant_when_nothing_is_said(
    tiny_directory: Path, tmp_path: Path
) -> None:
    config = peft.WaveFTConfig(target_modules=TARGETS, n_frequency=70, use_idwt=False)
    source = saved(peft_model(tiny_directory, config), tmp_path / "peft")
    settings = json.loads((source / "adapter_config.json").read_text())
    del settings["use_idwt"]  # PEFT's default is True
    (source / "adapter_config.json").write_text(json.dumps(settings))
    assert "expected use_idwt false, got None" in refused(source, tiny_directory)


@pytest.mark.parametrize("sparsity", [-0.5, 1.5, math.inf, math.nan, True])
def test_a_sparsity_that_is_no_share_is_refused(
    tiny_directory: Path, tmp_path: Path, sparsity: float
) -> None:
    config = peft.SupertuningConfig(target_modules=TARGETS, sparsity=0.95)
    source = saved(peft_model(tiny_directory, config), tmp_path / "peft")
    change_settings(source, sparsity=sparsity)
    assert "expected" in refused(source, tiny_directory)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"random_loc_seed": -1}, "expected a random_loc_seed below 2^63, got -1"),
        (
            {"random_loc_seed": 1 << 64},
            "expected a random_loc_seed below 2^63, got 18446744",
        ),
        ({"random_loc_seed": True}, "random_loc_seed"),
        ({"scaling": math.inf}, "scaling"),
        ({"scaling": math.nan}, "scaling"),
        ({"scaling": 10**400}, "expected a scaling that float32 holds, got another"),
    ],
)
def test_a_number_out_of_range_is_refused(
    tiny_directory: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    config = peft.WaveFTConfig(target_modules=TARGETS, n_frequency=70, use_idwt=False)
    source = saved(peft_model(tiny_directory, config), tmp_path / "peft")
    change_settings(source, **changes)
    assert said in refused(source, tiny_directory)


def test_complex_numbers_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    config = peft.WaveFTConfig(target_modules=TARGETS, n_frequency=70, use_idwt=False)
    source = saved(peft_model(tiny_directory, config), tmp_path / "peft")
    file = source / "adapter_model.safetensors"
    tensors = {name: t + 1j for name, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file)
    assert "expected real numbers, got torch.complex64" in refused(source, tiny_directory)


def change_settings(source: Path, **changes: Any) -> None:
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- another base --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            peft.ShiraConfig(r=3, target_modules=TARGETS),
            r"3·(48 + 96) = 432 values and [2, 432] indices, got [672] and [2, 672]",
        ),
        (
            peft.SupertuningConfig(target_modules=TARGETS, sparsity=0.95),
            "expected 230 values of shape [48, 96] at sparsity 0.95, got 512",
        ),
        (
            peft.WaveFTConfig(target_modules=TARGETS, n_frequency=4000, use_idwt=False),
            "expected at most 2304 values, got 4000",
        ),
    ],
)
def test_an_adapter_of_other_shapes_is_refused(
    tiny_directory: Path, other_base: Path, tmp_path: Path, config: peft.PeftConfig, message: str
) -> None:
    source = saved(peft_model(tiny_directory, config), tmp_path / "peft")
    assert message in refused(source, other_base)
