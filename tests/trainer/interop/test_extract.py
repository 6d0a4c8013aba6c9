"""The largest changes of a full fine-tune become a delta, and what is left behind is said."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from spieldose_kernels.base import Base
from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import read_delta
from spieldose_trainer.errors import ConfigError, ConversionError
from spieldose_trainer.interop import checkpoint_tensors
from spieldose_trainer.interop.checkpoint_tensors import CheckpointTensors
from spieldose_trainer.interop.command_line import extract

from .adapters import delta_model, dense_model, logits

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.fixture
def tuned(tiny_directory: Path, tmp_path: Path) -> Path:
    """The tiny model after changes of different size in its linear layers, and in no other."""
    return changed(tiny_directory, tmp_path / "tuned", change_every_layer)


def changed(base: Path, directory: Path, change: Callable[[PreTrainedModel], None]) -> Path:
    model = dense_model(base)
    with torch.no_grad():
        change(model)
    model.save_pretrained(directory)
    return directory


def change_every_layer(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(6)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "proj" in name:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.01 * (i + 1)


def extracted(base: Path, tuned: Path, *more: str) -> Adapter:
    out = tuned.with_name("out.safetensors")
    extract(["--base", str(base), "--finetuned", str(tuned), "--out", str(out), *more])
    return read_delta(out.read_bytes())


def changes(base: Path, tuned: Path) -> dict[str, torch.Tensor]:
    before, after = dense_model(base).state_dict(), dense_model(tuned).state_dict()
    return {
        name.removesuffix(".weight"): after[name] - before[name]
        for name in before
        if "proj" in name
    }


def test_every_layer_keeps_its_largest_changes(tiny_directory: Path, tuned: Path) -> None:
    adapter = extracted(tiny_directory, tuned, "--density", "0.03")
    for name, change in changes(tiny_directory, tuned).items():
        delta = adapter.modules[name]
        count = int(0.03 * change.numel())
        least = change.abs().flatten().topk(count).values[-1]
        assert delta.nnz == count
        assert torch.equal(delta.dense(torch.float32), change.where(change.abs() >= least, 0.0))


def test_the_largest_changes_of_all_layers_share_one_density(
    tiny_directory: Path, tuned: Path
) -> None:
    adapter = extracted(tiny_directory, tuned, "--density", "0.03", "--allocation", "global")
    whole = changes(tiny_directory, tuned)
    every = torch.cat([change.abs().flatten() for change in whole.values()])
    count = int(0.03 * every.numel())
    least = every.topk(count).values[-1]
    assert adapter.nnz == count
    for name, change in whole.items():
        expected = change.where(change.abs() >= least, 0.0)
        assert (name in adapter.modules) == bool(expected.any())
        if name in adapter.modules:
            assert torch.equal(adapter.modules[name].dense(torch.float32), expected)


@pytest.mark.parametrize("allocation", ["layer", "global"])
def test_weights_read_in_many_pieces_give_the_same(
    tiny_directory: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch, allocation: str
) -> None:
    at_once = extracted(tiny_directory, tuned, "--allocation", allocation)
    monkeypatch.setattr(checkpoint_tensors, "TILE_WEIGHTS", 500)
    in_pieces = extracted(tiny_directory, tuned, "--allocation", allocation)
    assert at_once.modules.keys() == in_pieces.modules.keys()
    for name, delta in at_once.modules.items():
        assert torch.equal(delta.dense(torch.float32), in_pieces.modules[name].dense(torch.float32))


def test_a_checkpoint_in_shards_gives_the_same(
    tiny_directory: Path, tuned: Path, tmp_path: Path
) -> None:
    whole = extracted(tiny_directory, tuned)
    dense_model(tuned).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    sharded = extracted(tiny_directory, tmp_path / "shards")
    for name, delta in whole.modules.items():
        assert torch.equal(delta.values, sharded.modules[name].values)


def test_all_of_the_change_is_the_fine_tune_itself(tiny_directory: Path, tuned: Path) -> None:
    adapter = extracted(tiny_directory, tuned, "--density", "1")
    ours = logits(delta_model(tiny_directory, adapter))
    torch.testing.assert_close(ours, logits(dense_model(tuned)), rtol=1e-4, atol=1e-4)


def test_the_file_fits_the_base(tiny_directory: Path, tiny_base: Base, tuned: Path) -> None:
    extracted(tiny_directory, tuned, "--density", "0.03", "--description", "from a fine-tune")
    info = read_delta(tuned.with_name("out.safetensors").read_bytes(), tiny_base.spec).info
    assert (info.method, info.description) == ("extract", "from a fine-tune")
    assert info.density == pytest.approx(0.03, rel=0.01)
    assert info.settings["finetuned"] == tuned.name
    assert info.chat_template == ""


def test_a_chat_template_of_the_fine_tune_s_own_goes_along(
    tiny_directory: Path, tuned: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_directory)
    tokenizer.save_pretrained(tuned)
    assert extracted(tiny_directory, tuned).info.chat_template == ""
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tuned)
    assert extracted(tiny_directory, tuned).info.chat_template == "{{ messages[0].content }}"


def test_a_fine_tune_stored_in_fewer_bits_is_told(
    tiny_directory: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense_model(tuned).bfloat16().save_pretrained(tmp_path / "rounded")
    extracted(tiny_directory, tmp_path / "rounded")
    warnings = capsys.readouterr().err.splitlines()
    said = "spieldose extract: the base is stored in F32, the fine-tune in BF16: what that rounds"
    assert warnings[-1].startswith(said)


def test_what_did_not_change_is_no_entry(tiny_directory: Path, tmp_path: Path) -> None:
    def three_weights(model: PreTrainedModel) -> None:
        model.get_submodule(Q).weight[3, 5:8] += 0.5

    tuned = changed(tiny_directory, tmp_path / "tuned", three_weights)
    adapter = extracted(tiny_directory, tuned, "--density", "0.1")
    assert list(adapter.modules) == [Q]
    assert adapter.modules[Q].rows().tolist() == [3, 3, 3]
    assert adapter.modules[Q].columns.tolist() == [5, 6, 7]


def test_bfloat16_weights_are_subtracted_in_float32(tiny_directory: Path, tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.bfloat16)
    model.save_pretrained(base)
    before = model.get_submodule(Q).weight.detach().clone()
    with torch.no_grad():
        model.get_submodule(Q).weight.mul_(-0.37)  # the difference has more bits than bfloat16
    model.save_pretrained(tuned)
    adapter = extracted(base, tuned, "--density", "1")
    expected = model.get_submodule(Q).weight.detach().float() - before.float()
    assert torch.equal(adapter.modules[Q].dense(torch.float32), expected)


def test_the_share_kept_is_told_overall_and_by_kind(
    tiny_directory: Path,
    tuned: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint_tensors, "TILE_WEIGHTS", 500)  # norms are summed over pieces
    adapter = extracted(tiny_directory, tuned, "--density", "0.03")
    whole = changes(tiny_directory, tuned)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    for kind in ("self_attn.q_proj", "mlp.down_proj", "all"):
        names = [name for name in whole if kind == "all" or name.endswith(kind)]
        norm = math.sqrt(sum(float(whole[name].square().sum()) for name in names))
        kept = math.sqrt(sum(float(adapter.modules[n].values.square().sum()) for n in names))
        entries = sum(adapter.modules[name].nnz for name in names)
        assert lines[kind][1:] == [f"{entries:,}", f"{norm:.3g}", f"{kept / norm:.1%}"]


def test_changes_no_delta_can_carry_are_told_in_one_line(
    tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def embeddings_and_a_norm(model: PreTrainedModel) -> None:
        change_every_layer(model)
        model.get_input_embeddings().weight[7, 3] += 0.1
        model.get_submodule("model.norm").weight += 0.1

    extracted(tiny_directory, changed(tiny_directory, tmp_path / "tuned", embeddings_and_a_norm))
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.endswith("left out (2): model.embed_tokens.weight, model.norm.weight")


def test_a_tensor_that_only_one_checkpoint_has_is_told(
    tiny_directory: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_tensors(tuned, {"lm_head.weight": torch.ones(3)})
    extracted(tiny_directory, tuned)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.endswith("left out (1): lm_head.weight")


def test_tensors_left_out_are_told_by_kind(
    tiny_directory: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"model.layers.{i}.{kind}.bias" for i in (0, 1) for kind in ("k\x1b[2J", "q", "v")]
    add_tensors(tuned, {name: torch.ones(2) for name in names})
    extracted(tiny_directory, tuned)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.endswith(r"left out (6): k\x1b[2J.bias, q.bias, v.bias")


def test_a_model_configured_otherwise_is_told(
    tiny_directory: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tuned / "config.json"
    told = {"rms_norm_eps": 1e-3, "max_position_embeddings": 77}
    file.write_text(json.dumps(json.loads(file.read_text()) | told | {"use_cache": False}))
    extracted(tiny_directory, tuned)
    (warning,) = capsys.readouterr().err.splitlines()
    expected = "a delta plays by the base's: max_position_embeddings, rms_norm_eps"
    assert warning.endswith(expected)


def test_a_fine_tune_of_weights_alone_will_do(tiny_directory: Path, tuned: Path) -> None:
    whole = extracted(tiny_directory, tuned)
    (tuned / "config.json").unlink()
    assert extracted(tiny_directory, tuned).nnz == whole.nnz


def test_nothing_is_told_when_only_target_layers_changed(
    tiny_directory: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extracted(tiny_directory, tuned)
    assert capsys.readouterr().err == ""


# --- pieces of a checkpoint ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (7, 30), (3, 5, 4)])
def test_pieces_are_the_tensor_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(checkpoint_tensors, "TILE_WEIGHTS", 64)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    safetensors.torch.save_file({"t": tensor}, tmp_path / "model.safetensors")
    pieces = list(CheckpointTensors(tmp_path).tiles("t"))
    assert all(piece.numel() <= 64 for piece in pieces)
    assert torch.equal(torch.cat([torch.empty(0), *pieces]), tensor.flatten())


# --- refusals ------------------------------------------------------------------------------------


def refused(base: Path, tuned: Path) -> str:
    with pytest.raises(ConversionError) as caught:
        extracted(base, tuned)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    assert "got" in message
    assert not tuned.with_name("out.safetensors").exists()
    return message


def test_the_same_weights_twice_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    tuned = changed(tiny_directory, tmp_path / "tuned", lambda model: None)
    assert "to differ" in refused(tiny_directory, tuned)


def test_a_fine_tune_of_another_shape_is_refused(tiny_directory: Path, tuned: Path) -> None:
    replace_weight(tuned, Q, torch.ones(64, 60))
    message = refused(tiny_directory, tuned)
    assert f"expected {Q}.weight of shape [64, 64], not quantised, got [64, 60]" in message


def test_a_fine_tune_without_one_of_the_layers_is_refused(
    tiny_directory: Path, tuned: Path
) -> None:
    replace_weight(tuned, UP, None)
    message = refused(tiny_directory, tuned)
    assert f"expected {UP}.weight of shape [160, 64], not quantised, got none" in message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(
    tiny_directory: Path, tuned: Path, value: float
) -> None:
    weight = dense_model(tuned).get_submodule(Q).weight.detach().clone()
    weight[2, 2] = value
    replace_weight(tuned, Q, weight)
    assert f"{Q}.weight: expected finite weights" in refused(tiny_directory, tuned)


def test_a_quantised_base_is_refused(tiny_base: Base, tuned: Path, tmp_path: Path) -> None:
    tiny_base.model.save_pretrained(tmp_path / "nf4")
    tiny_base.tokenizer.save_pretrained(tmp_path / "nf4")
    assert "not quantised, got [2048, 1]" in refused(tmp_path / "nf4", tuned)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_fine_tune_in_8_bits_is_refused(
    tiny_directory: Path, tuned: Path, dtype: torch.dtype
) -> None:
    weight = dense_model(tuned).get_submodule(Q).weight.detach()
    replace_weight(tuned, Q, (weight * 100).to(dtype))
    said = f"expected {Q}.weight of shape [64, 64], not quantised, got [64, 64] in "
    assert said in refused(tiny_directory, tuned)


def test_a_place_that_cannot_be_written_is_refused_first(
    tiny_directory: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointTensors, "__init__", None)
    tuned.with_name("file").touch()
    for out in (tuned.with_name("file") / "a.safetensors", tuned.with_name("d.safetensors")):
        tuned.with_name("d.safetensors").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=r"^out: expected a "):
            extract(f"--base {tiny_directory} --finetuned {tuned} --out {out}".split())


@pytest.mark.parametrize("model", ["base", "finetuned"])
def test_neither_model_is_written_over(
    tiny_directory: Path, tuned: Path, tmp_path: Path, model: str
) -> None:
    base = shutil.copytree(tiny_directory, tmp_path / "base")
    out = {"base": base, "finetuned": tuned}[model] / "model.safetensors"
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=f"^out: expected another file than those of {model}"):
        extract(["--base", str(base), "--finetuned", str(tuned), "--out", str(out)])
    assert out.read_bytes() == before


def test_a_fine_tune_without_safetensors_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "tuned" / "pytorch_model.bin")
    assert "*.safetensors weights in" in refused(tiny_directory, tmp_path / "tuned")


def test_a_broken_fine_tune_is_refused(tiny_directory: Path, tuned: Path) -> None:
    weights = tuned / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "model.safetensors: expected safetensors" in refused(tiny_directory, tuned)


@pytest.mark.parametrize("density", ["0", "-0.1", "1.5", "nan"])
def test_a_density_out_of_range_is_refused(tiny_directory: Path, density: str) -> None:
    with pytest.raises(ConfigError, match="density must be above 0 and at most 1, got"):
        extracted(tiny_directory, tiny_directory, f"--density={density}")


def add_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = directory / "model.safetensors"
    whole = safetensors.torch.load_file(path) | tensors
    safetensors.torch.save_file(whole, path, {"format": "pt"})


def replace_weight(directory: Path, module: str, weight: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors.pop(f"{module}.weight")
    if weight is not None:
        tensors[f"{module}.weight"] = weight
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
