"""The base is NF4 whatever checkpoint it comes from, and is known by its content."""

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from spieldose_kernels.base import Base, dense_weight, load_base, load_tokenizer, pick_device
from spieldose_kernels.base_spec import fingerprint_checkpoint
from spieldose_kernels.checkpoint import target_shapes
from spieldose_kernels.errors import BaseError

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def test_every_linear_layer_but_the_head_is_nf4_with_double_quantisation(tiny_base: Base) -> None:
    for layer in tiny_base.layers.values():
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.weight.dtype == torch.uint8
    assert len(tiny_base.layers) == 2 * 7


def test_the_spec_names_every_layer_with_its_shape(tiny_base: Base) -> None:
    assert set(tiny_base.spec.shapes) == set(tiny_base.layers)
    assert tiny_base.spec.shapes["model.layers.1.mlp.gate_proj"] == (160, 64)
    assert tiny_base.spec.shapes["model.layers.0.self_attn.k_proj"] == (32, 64)


def test_the_base_is_frozen(tiny_base: Base) -> None:
    assert not any(p.requires_grad for p in tiny_base.model.parameters())
    assert not tiny_base.model.training


def test_the_base_is_near_the_checkpoint(tiny_base: Base, tiny_directory: Path) -> None:
    assert_near_checkpoint(tiny_base, tiny_directory, whole_blocks(tiny_base))


def test_rows_that_end_inside_a_block_are_near_the_checkpoint(
    tiny_base: Base, tiny_directory: Path
) -> None:
    assert_near_checkpoint(tiny_base, tiny_directory, set(tiny_base.layers))


@pytest.mark.parametrize("fused", [False, True])
def test_float32_means_float32(tiny_directory: Path, *, fused: bool) -> None:
    base = load(tiny_directory, fused=fused)  # bitsandbytes' fused CPU product rounds to bfloat16
    for layer in base.layers.values():
        x = random(5, layer.in_features)
        y = layer(x)
        expected = x.double() @ dense_weight(layer, torch.float64).t()
        assert y.dtype == torch.float32
        assert relative_error(y, expected) <= 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_layers_multiply_by_their_weights(tiny_directory: Path, *, fused: bool) -> None:
    plain = load(tiny_directory, compute_dtype=torch.bfloat16)  # a repacked one tells no weights
    base = load(tiny_directory, compute_dtype=torch.bfloat16, fused=fused)
    for path in whole_blocks(base):  # the fused product crashes on others
        layer = base.layers[path]
        x = random(5, layer.in_features).bfloat16()
        expected = x.double() @ dense_weight(plain.layers[path], torch.float64).t()
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert relative_error(y, expected) <= 1e-2


# --- fingerprint ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fingerprint_does_not_depend_on_the_compute_dtype(
    tiny_directory: Path, tiny_base: Base, dtype: torch.dtype
) -> None:
    fingerprint = load(tiny_directory, compute_dtype=dtype).spec.fingerprint
    assert fingerprint == tiny_base.spec.fingerprint == fingerprint_checkpoint(tiny_directory)


def test_the_fingerprint_does_not_depend_on_sharding(tiny_directory: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_directory)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert fingerprint_checkpoint(tmp_path) == fingerprint_checkpoint(tiny_directory)


def test_the_fingerprint_does_not_depend_on_file_names_or_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.arange(4)}
    one, other = tmp_path / "one", tmp_path / "other"
    save(one, "model.safetensors", tensors)
    save(other, "weights.safetensors", tensors, metadata={"format": "pt"})
    assert fingerprint_checkpoint(one) == fingerprint_checkpoint(other)


def test_the_fingerprint_does_not_depend_on_which_shard_holds_a_tensor(tmp_path: Path) -> None:
    a, b = {"a": torch.arange(3.0)}, {"b": torch.arange(4)}
    one, other = tmp_path / "one", tmp_path / "other"
    for directory, first, second in ((one, a, b), (other, b, a)):
        save(directory, "model-1.safetensors", first)
        save(directory, "model-2.safetensors", second)
    assert fingerprint_checkpoint(one) == fingerprint_checkpoint(other)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"a": torch.tensor([0.0, 1.0, 2.5]), "b": torch.arange(4)}, id="value"),
        pytest.param({"c": torch.arange(3.0), "b": torch.arange(4)}, id="name"),
        pytest.param({"a": torch.arange(3.0)[None], "b": torch.arange(4)}, id="shape"),
        pytest.param({"a": torch.arange(3.0).view(torch.int32), "b": torch.arange(4)}, id="dtype"),
        pytest.param({"a": torch.arange(3.0)}, id="fewer"),
    ],
)
def test_the_fingerprint_changes_with(tmp_path: Path, changed: dict[str, torch.Tensor]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    save(one, "model.safetensors", {"a": torch.arange(3.0), "b": torch.arange(4)})
    save(other, "model.safetensors", changed)
    assert fingerprint_checkpoint(one) != fingerprint_checkpoint(other)


def test_one_changed_weight_changes_the_fingerprint(tiny_directory: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_directory)
    weight = model.model.layers[1].mlp.down_proj.weight.data
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    model.save_pretrained(tmp_path)
    assert fingerprint_checkpoint(tmp_path) != fingerprint_checkpoint(tiny_directory)


# --- already quantised ---------------------------------------------------------------------------


def test_a_base_saved_as_nf4_has_the_same_weights(tiny_base: Base, tmp_path: Path) -> None:
    back = saved_and_loaded(tiny_base, tmp_path)
    assert set(back.layers) == set(tiny_base.layers)
    for path, layer in tiny_base.layers.items():
        expected = dense_weight(layer, torch.float32)
        assert torch.equal(dense_weight(back.layers[path], torch.float32), expected)


def test_a_base_saved_as_nf4_computes_in_float32_too(tiny_base: Base, tmp_path: Path) -> None:
    back = saved_and_loaded(tiny_base, tmp_path)
    ids = torch.arange(12)[None]
    expected = tiny_base.model(ids).logits
    torch.testing.assert_close(back.model(ids).logits, expected, rtol=1e-5, atol=1e-5)


# --- refusals ------------------------------------------------------------------------------------


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(str(tmp_path))


def test_a_directory_with_settings_but_no_weights_is_refused(
    tiny_directory: Path, tmp_path: Path
) -> None:
    for file in tiny_directory.glob("*.json*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert str(tmp_path) in refused(str(tmp_path))


def test_weights_that_are_not_safetensors_have_no_fingerprint(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BaseError, match=r"expected \*\.safetensors weights in .*, got none"):
        fingerprint_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["spieldose-tests/no-such-model", "no/such/directory", "a b"])
def test_a_name_of_nothing_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # ask no network
    assert repr(name) in refused(name)


def test_a_broken_checkpoint_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    for file in tiny_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert str(tmp_path) in refused(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", None),  # ValueError
        ("tokenizer.json", ""),  # JSONDecodeError
        ("tokenizer.json", "{}"),  # KeyError
        ("tokenizer.json", "[]"),  # TypeError
        ("tokenizer_config.json", "[]"),  # AttributeError
    ],
)
def test_a_broken_tokenizer_is_refused(
    tiny_directory: Path, tmp_path: Path, file: str, content: str | None
) -> None:
    directory = tmp_path / "base"
    shutil.copytree(tiny_directory, directory)
    (directory / file).unlink()
    if content is not None:
        (directory / file).write_text(content)
    said = f"expected a tokenizer at {directory}, got: "
    assert said in refused(str(directory))
    with pytest.raises(BaseError, match=re.escape(said)):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n",
        b"\2\0\0\0\0\0\0\0[]",
        b"\2\0\0\0\0\0\0\0{",
        None,  # the last tensor's last byte is missing
    ],
)
def test_broken_weights_have_no_fingerprint(tmp_path: Path, content: bytes | None) -> None:
    save(tmp_path, "model.safetensors", {"a": torch.arange(3.0)})
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    with pytest.raises(BaseError, match=f"^{file}: expected whole safetensors, got: ") as caught:
        fingerprint_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_index_says_which_files_are_a_checkpoint_s(tmp_path: Path) -> None:
    save(tmp_path, "model-1.safetensors", {"a": torch.arange(3.0)})
    alone = fingerprint_checkpoint(tmp_path)
    save(tmp_path, "consolidated.safetensors", {"w": torch.arange(4)})
    assert fingerprint_checkpoint(tmp_path) != alone
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert fingerprint_checkpoint(tmp_path) == alone
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    with pytest.raises(BaseError, match=r"model-2\.safetensors: expected whole safetensors, got: "):
        fingerprint_checkpoint(tmp_path)
    index.write_text("[]")
    with pytest.raises(BaseError, match=f"^{index}: expected an index of shards, got: "):
        fingerprint_checkpoint(tmp_path)


def test_a_whole_file_is_a_checkpoint_without_others_beside_it(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", {"a": torch.arange(3.0)})
    alone = fingerprint_checkpoint(tmp_path)
    save(tmp_path, "consolidated.safetensors", {"w": torch.arange(4)})
    assert fingerprint_checkpoint(tmp_path) == alone


def test_weights_that_are_missing_are_not_made_up(tiny_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_directory, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    said = refused(str(tmp_path / "base"))
    assert said.endswith("expected weights for model.layers.1.mlp.up_proj.weight, got none")


def test_a_weight_of_another_shape_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_directory, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    assert "up_proj: expected a weight of shape (160, 64), got (3, 3)" in refused(
        str(tmp_path / "base")
    )


def test_code_of_a_checkpoint_never_runs(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to whoever would ask
    shutil.copytree(tiny_directory, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    custom = {"model_type": "ours", "auto_map": {"AutoConfig": "evil.Config"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | custom))
    (tmp_path / "base" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "custom code" in refused(str(tmp_path / "base"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "64"}, {"num_attention_heads": 0}, {"hidden_size": 65}]
)
def test_a_configuration_that_makes_no_model_is_refused(
    tiny_directory: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    shutil.copytree(tiny_directory, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    said = f"expected a causal language model at {tmp_path / 'base'}, got: "
    assert refused(str(tmp_path / "base")).startswith(said)
    with pytest.raises(BaseError, match=f"^{said}"):
        target_shapes(tmp_path / "base")


def test_layers_that_are_not_linear_are_refused_where_they_are_not_quantised(
    tiny_directory: Path, tmp_path: Path
) -> None:
    config = GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=300)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for file in tiny_directory.glob("token*"):
        shutil.copy(file, tmp_path)
    load(tmp_path)  # quantised, they are
    said = rf"^{tmp_path}: expected a linear layer transformer\.h\.0\.attn\.c_attn, got Conv1D$"
    with pytest.raises(BaseError, match=said):
        load_base(
            str(tmp_path), device=CPU, compute_dtype=torch.float32, fused=False, quantised=False
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(BaseError, match=r"^device: expected a CUDA device .*, got none$"):
        pick_device("cuda")


def load(
    directory: Path, *, compute_dtype: torch.dtype = torch.float32, fused: bool = False
) -> Base:
    return load_base(str(directory), device=CPU, compute_dtype=compute_dtype, fused=fused)


def whole_blocks(base: Base) -> set[str]:
    """Name the layers whose rows are whole NF4 blocks, as those of published models are."""
    return {path for path, layer in base.layers.items() if layer.in_features % 64 == 0}


def assert_near_checkpoint(base: Base, directory: Path, paths: set[str]) -> None:
    original = LlamaForCausalLM.from_pretrained(directory)
    for path in sorted(paths):
        weight = original.get_submodule(path).weight.detach()
        error = relative_error(dense_weight(base.layers[path], torch.float32), weight)
        assert 0.01 < error < 0.15  # NF4 of a normal distribution costs about 0.1


def saved_and_loaded(base: Base, directory: Path) -> Base:
    base.model.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)
    return load(directory)


def save(
    directory: Path,
    name: str,
    tensors: dict[str, torch.Tensor],
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    directory.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, directory / name, metadata)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def refused(name: str) -> str:
    with pytest.raises(BaseError) as caught:
        load_base(name, device=CPU, compute_dtype=torch.float32, fused=False)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message
