"""`spieldose repair`: an untrained delta brings an NF4 base nearer to what it was."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spieldose_kernels.base import Base, dense_weight
from spieldose_kernels.delta_file import read_delta
from spieldose_trainer.errors import ConfigError, DataError
from spieldose_trainer.model import SparseModel
from spieldose_trainer.repair import command_line
from spieldose_trainer.repair import repair as module
from spieldose_trainer.repair.config import RepairConfig
from spieldose_trainer.repair.grams import input_grams
from spieldose_trainer.repair.repair import repair

Configure = Callable[..., RepairConfig]


@pytest.fixture
def configure(tiny_directory: Path, tmp_path: Path) -> Configure:
    data = tmp_path / "text.jsonl"
    lines = [{"text": f"{a} and {a * 7} make {a * 8}"} for a in range(20)]
    data.write_text("\n".join(map(json.dumps, lines)))
    config = RepairConfig(
        base=str(tiny_directory),
        data=data,
        out=tmp_path / "out" / "repair.safetensors",
        compute_dtype="float32",
        device="cpu",
    )
    return lambda **changes: replace(config, **changes)


def test_a_full_delta_gives_the_unquantised_model_back(
    configure: Configure, tiny_base: Base, plain: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spieldose_trainer.repair.sparse_rows.RIDGE", 1e-6)
    config = configure(density=1.0)
    tokens = torch.tensor([module._read(config, Path(config.base))[0].tokens])

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=tokens).logits
        return found

    rounded = logits(tiny_base.model)
    mended = logits(SparseModel.of(tiny_base, repair(config).adapter).model)
    exact = logits(plain.model)
    assert float((mended - exact).norm()) < 0.05 * float((rounded - exact).norm())


def test_the_more_entries_the_nearer(configure: Configure) -> None:
    def error(density: float) -> float:
        return sum(e.after for e in repair(configure(density=density)).energies.values())

    few, some, many = (error(density) for density in (0.02, 0.1, 0.5))  # 1, 6 and 32 a row of 64
    before = sum(e.before for e in repair(configure()).energies.values())
    assert many < some < few < before


def test_the_file_holds_as_many_entries_in_every_row(configure: Configure) -> None:
    config = configure(density=0.05, description="what NF4 took")
    made = repair(config)
    file = read_delta(config.out.read_bytes())
    assert (file.info.method, file.info.description) == ("repair", "what NF4 took")
    for name, delta in file.modules.items():
        assert set(delta.row_starts.diff().tolist()) == {int(0.05 * delta.width)}
        assert torch.equal(delta.values, made.adapter.modules[name].values)
    weights = sum(delta.shape[0] * delta.shape[1] for delta in file.modules.values())
    assert file.info.density == pytest.approx(file.nnz / weights)


def test_what_it_says_of_errors_is_so(configure: Configure, tiny_base: Base, plain: Base) -> None:
    config = configure(density=0.1)
    made = repair(config)
    grams = dict(
        input_grams(tiny_base, list(tiny_base.layers), module._read(config, Path(config.base)))
    )
    for name, energies in made.energies.items():
        weight = plain.layers[name].weight.double()
        error = weight - dense_weight(tiny_base.layers[name], torch.float32)
        left = error - made.adapter.modules[name].dense(torch.float64)
        gram = grams[name].double()
        for said, rows in zip(
            (energies.output, energies.before, energies.after), (weight, error, left), strict=True
        ):
            assert said == pytest.approx(float(((rows @ gram) * rows).sum()), rel=1e-3)


def test_only_the_samples_are_read(configure: Configure) -> None:
    first = repair(configure(samples=2)).adapter
    config = configure(samples=2)
    lines = config.data.read_text().splitlines()
    config.data.write_text("\n".join([*lines[:2], '{"text": "something else"}']))
    second = repair(config).adapter
    for name, delta in first.modules.items():
        assert torch.equal(delta.values, second.modules[name].values)


def test_the_command_prints_what_was_mended(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure()
    command_line.repair(
        f"--base {config.base} --data {config.data} --out {config.out} "
        "--density 0.1 --device cpu".split()
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "module entries error in NF4 repaired".split()
    _, entries, before, after = lines[-2].split()
    assert int(entries.replace(",", "")) == read_delta(config.out.read_bytes()).nnz
    assert float(after.rstrip("%")) < float(before.rstrip("%"))
    assert lines[-1].startswith(f"{config.out}: ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"density": 0.0}, "^density must be above 0 and at most 1, got 0.0$"),
        ({"samples": 0}, "^samples must be between 1 and 2147483647, got 0$"),
        ({"max_length": 0}, "^max_length must be between 1 and 2147483647, got 0$"),
        ({"out": Path("repair.bin")}, r"^out must end in \.safetensors, got repair\.bin$"),
        ({"description": "a\nb"}, "^description "),
    ],
)
def test_wrong_settings_are_named(
    configure: Configure, change: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        configure(**change)


def test_wrong_input_is_refused_before_the_base_is_loaded(
    configure: Configure, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(module, "load_base")
    config = configure()
    config.data.write_text('{"text": "fine"}\n{"words": "not"}')
    with pytest.raises(DataError, match=rf"^{config.data}:2: expected "):
        repair(config)
    packed = tmp_path / "packed"
    shutil.copytree(tiny_directory, packed)
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(5120, 1, dtype=torch.uint8)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    said = r"not quantised, got \[5120, 1\] in U8: they tell what NF4 rounds away$"
    with pytest.raises(ConfigError, match=said):
        repair(configure(base=str(packed)))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^out: expected a place to write to, got "):
        repair(configure(out=tmp_path / "file" / "below.safetensors"))


def test_the_base_is_not_written_over(
    configure: Configure, tiny_directory: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_directory, tmp_path / "base")
    out = base / "model.safetensors"
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=r"^out: expected another file than those of base"):
        repair(configure(base=str(base), out=out))
    assert out.read_bytes() == before


def test_a_layer_that_text_does_not_reach_is_left_as_it_is(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def grams(*arguments: Any, **settings: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, gram in input_grams(*arguments, **settings):
            yield name, gram * (not name.endswith("layers.1.mlp.up_proj"))

    monkeypatch.setattr(module, "input_grams", grams)
    config = configure()
    words = f"--base {config.base} --data {config.data} --out {config.out} --device cpu"
    command_line.repair(words.split())
    modules = read_delta(config.out.read_bytes()).modules
    assert len(modules) == 13 and "model.layers.1.mlp.up_proj" not in modules
