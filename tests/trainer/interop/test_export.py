"""PEFT loads what is exported as SHiRA, and computes the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spieldose_kernels.base import Base
from spieldose_kernels.checkpoint import checkpoint_spec
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.delta_file import read_delta, write_delta
from spieldose_kernels.errors import BaseMismatch
from spieldose_trainer.errors import ConfigError, ConversionError
from spieldose_trainer.interop.command_line import convert
from spieldose_trainer.interop.shira import smallest_rank

from .adapters import PEFT_WARNS, delta_model, dense_model, logits, peft_deltas

pytestmark = PEFT_WARNS
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def exported(adapter: Adapter, directory: Path, base: Path) -> Path:
    file, out = directory / "disc.safetensors", directory / "shira"
    write_delta(file, adapter)
    convert([str(file), str(out), "--base", str(base)])
    return out


def adapter_of(
    base: Base, entries: dict[str, int], *, dtype: torch.dtype = torch.float32
) -> Adapter:
    generator = torch.Generator().manual_seed(2)
    modules = {}
    for name, count in entries.items():
        height, width = base.spec.shapes[name]
        positions = torch.randperm(height * width, generator=generator)[:count]
        values = torch.randn(count, generator=generator).to(dtype)
        modules[name] = SparseDelta.from_flat(positions, values, shape=(height, width))
    info = AdapterInfo(
        base_model="tiny", base_fingerprint=base.spec.fingerprint, method="random", density=0.1
    )
    return Adapter(info, modules)


def test_peft_s_logits_are_ours(
    tiny_directory: Path, tmp_path: Path, make_adapter: Callable[..., Adapter]
) -> None:
    adapter = make_adapter(4, scale=0.1)
    out = exported(adapter, tmp_path, tiny_directory)
    loaded = peft.PeftModel.from_pretrained(dense_model(tiny_directory), out).eval()
    ours = logits(delta_model(tiny_directory, adapter))
    torch.testing.assert_close(logits(loaded), ours, rtol=1e-4, atol=1e-4)
    assert (logits(dense_model(tiny_directory)) - ours).abs().max() > 0.1


def test_peft_s_weights_are_ours_in_every_layer(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny_base, {Q: 300, K: 5})  # K is nearly all padding
    out = exported(adapter, tmp_path, tiny_directory)
    loaded = peft.PeftModel.from_pretrained(dense_model(tiny_directory), out)
    found = peft_deltas(loaded)
    assert found.keys() == {Q, K}
    for name, delta in adapter.modules.items():
        assert torch.equal(found[name], delta.dense(torch.float32))


def test_bfloat16_values_arrive_unrounded(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny_base, {Q: 300}, dtype=torch.bfloat16)
    out = exported(adapter, tmp_path, tiny_directory)
    loaded = peft.PeftModel.from_pretrained(dense_model(tiny_directory), out)
    assert torch.equal(peft_deltas(loaded)[Q], adapter.modules[Q].dense(torch.float32))


def test_peft_finds_the_base_by_itself(
    tiny_directory: Path, tmp_path: Path, make_adapter: Callable[..., Adapter]
) -> None:
    adapter = make_adapter(4, scale=0.1)
    out = exported(adapter, tmp_path, tiny_directory)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = logits(delta_model(tiny_directory, adapter))
    torch.testing.assert_close(logits(loaded), ours, rtol=1e-4, atol=1e-4)


def test_peft_can_go_on_training_what_is_exported(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny_base, {Q: 300})
    out = exported(adapter, tmp_path, tiny_directory)
    with pytest.warns(UserWarning, match="mask_type='spieldose' is not recognized"):
        config = peft.ShiraConfig(mask_type="spieldose")  # PEFT's only complaint
    assert config.mask_fn is None
    model = dense_model(tiny_directory)
    loaded = peft.PeftModel.from_pretrained(model, out, is_trainable=True)
    loaded(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    trained = [name for name, p in loaded.named_parameters() if p.grad is not None]
    assert trained == [f"base_model.model.{Q}.shira_weight.default"]


def test_more_modules_than_peft_lists_one_by_one_are_loaded(tmp_path: Path) -> None:
    directory = tmp_path / "base"  # PEFT shortens lists of 20 names and more
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    spec = checkpoint_spec(str(directory))
    left_out = "model.layers.2.mlp.up_proj"
    modules = {
        name: SparseDelta.from_flat(torch.tensor([7, 3]), torch.tensor([0.5, -0.25]), shape=shape)
        for name, shape in spec.shapes.items()
        if name != left_out
    }
    info = AdapterInfo(
        base_model="b", base_fingerprint=spec.fingerprint, method="random", density=0.1
    )
    out = exported(Adapter(info, modules), tmp_path, directory)
    found = peft_deltas(peft.PeftModel.from_pretrained(dense_model(directory), out))
    assert found.keys() == modules.keys()
    for name, delta in modules.items():
        assert torch.equal(found[name], delta.dense(torch.float32))


def test_what_was_exported_is_imported_unchanged(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny_base, {Q: 300, K: 5})
    out = exported(adapter, tmp_path, tiny_directory)
    convert([str(out), str(tmp_path / "back.safetensors"), "--base", str(tiny_directory)])
    back = read_delta((tmp_path / "back.safetensors").read_bytes(), tiny_base.spec)
    for name, delta in adapter.modules.items():
        assert torch.equal(back.modules[name].row_starts, delta.row_starts)
        assert torch.equal(back.modules[name].columns.int(), delta.columns.int())
        assert torch.equal(back.modules[name].values, delta.values)


@pytest.mark.parametrize(("entries", "rank"), [(1, 1), (128, 1), (129, 2), (384, 3)])
def test_r_is_the_smallest_that_fits(tiny_base: Base, entries: int, rank: int) -> None:
    assert smallest_rank(adapter_of(tiny_base, {Q: entries, K: 1})) == rank


def test_a_layer_without_entries_is_left_out(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path
) -> None:
    out = exported(adapter_of(tiny_base, {Q: 10, K: 0}), tmp_path, tiny_directory)
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == [Q]


def test_densities_too_different_for_one_r_are_refused(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny_base, {Q: 3000, K: 5})  # K, 32×64, holds no 24·(32 + 64) entries
    with pytest.raises(ConversionError, match=r"24, the r of .*q_proj.*got 2304 .* 2048 weights"):
        exported(adapter, tmp_path, tiny_directory)
    assert not (tmp_path / "shira").exists()


def test_a_delta_without_entries_is_refused(tiny_base: Base) -> None:
    with pytest.raises(ConversionError, match="at least one entry, got none"):
        smallest_rank(adapter_of(tiny_base, {Q: 0}))


def test_a_delta_of_another_base_is_refused(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny_base, {Q: 10})
    foreign = replace(adapter, info=replace(adapter.info, base_fingerprint="0" * 64))
    with pytest.raises(BaseMismatch, match=r"disc\.safetensors: expected base"):
        exported(foreign, tmp_path, tiny_directory)


def test_a_directory_with_anything_in_it_is_not_overwritten(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path
) -> None:
    (tmp_path / "shira").mkdir()
    (tmp_path / "shira" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="out must be a new directory or an empty one, got "):
        exported(adapter_of(tiny_base, {Q: 10}), tmp_path, tiny_directory)
    assert [path.name for path in (tmp_path / "shira").iterdir()] == ["notes.txt"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("out", "error", "said"),
    [
        ("file/below", ConversionError, "expected to write a new directory"),
        (".", ConfigError, "out must be a new directory or an empty one, got"),
        ("file", ConfigError, "out must be a new directory or an empty one, got file"),
        ("/", ConfigError, "out must be a directory for a PEFT adapter, got /"),
        ("b.safetensors", ConfigError, "out must be a directory for a PEFT adapter, got b"),
    ],
)
def test_where_nothing_can_be_written_is_said(
    tiny_directory: Path,
    tiny_base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str,
    error: type[Exception],
    said: str,
) -> None:
    (tmp_path / "file").write_text("a file")
    write_delta(tmp_path / "disc.safetensors", adapter_of(tiny_base, {Q: 10}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=f"^{said}"):
        convert(["disc.safetensors", out, "--base", str(tiny_directory)])


def test_an_empty_directory_is_taken(tiny_directory: Path, tiny_base: Base, tmp_path: Path) -> None:
    (tmp_path / "shira").mkdir()
    out = exported(adapter_of(tiny_base, {Q: 10}), tmp_path, tiny_directory)
    assert (out / "adapter_config.json").exists()


def test_what_mends_nf4_is_not_for_peft_which_plays_the_original_weights(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny_base, {Q: 10})
    for made in ({"method": "repair"}, {"settings": {"start": "residual"}}):
        mending = replace(adapter, info=replace(adapter.info, **made))
        with pytest.raises(ConversionError, match="got some that make up for what NF4 rounds away"):
            exported(mending, tmp_path, tiny_directory)
        assert not (tmp_path / "shira").exists()


def test_a_chat_template_goes_there_and_back(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path
) -> None:
    template = "{% for m in messages %}é {{ m.content }}\n{% endfor %}"
    adapter = adapter_of(tiny_base, {Q: 10})
    adapter = replace(adapter, info=replace(adapter.info, chat_template=template))
    out, back = exported(adapter, tmp_path, tiny_directory), tmp_path / "back.safetensors"
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == template
    convert([str(out), str(back), "--base", str(tiny_directory)])
    assert read_delta(back.read_bytes()).info.chat_template == template


def test_another_base_s_name_is_told(
    tiny_directory: Path, tiny_base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = exported(adapter_of(tiny_base, {Q: 10}), tmp_path, tiny_directory)
    words = [str(out), str(tmp_path / "back.safetensors"), "--base", str(tiny_directory)]
    convert(words)
    assert capsys.readouterr().err == ""
    file = out / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "org/other"}
    file.write_text(json.dumps(settings))
    convert(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spieldose convert: the adapter names org/other as its base and was ")


def test_a_delta_file_is_not_turned_into_itself(tiny_base: Base, tmp_path: Path) -> None:
    write_delta(tmp_path / "a.safetensors", adapter_of(tiny_base, {Q: 10}))
    paths = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    with pytest.raises(ConfigError, match="format must be shira for a delta file, got delta"):
        convert([*paths, "--base", "tiny", "--format", "delta"])
