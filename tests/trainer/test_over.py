"""A run may build on an adapter: that stays as it is, and the run's file holds both."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spieldose_kernels.base import Base
from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import read_delta, write_delta
from spieldose_kernels.errors import BaseMismatch, ModuleMismatch, NotADelta
from spieldose_kernels.linear import FrozenDelta
from spieldose_trainer import trainer
from spieldose_trainer.errors import ConfigError
from spieldose_trainer.mending import mends_rounding
from spieldose_trainer.model import SparseModel
from spieldose_trainer.planning import make_plan
from spieldose_trainer.support import flat_positions
from spieldose_trainer.trainer import Trainer

from .configuration import Configure
from .runs import adapter_of, assert_same_run, interrupt, run

pytestmark = pytest.mark.usefixtures("no_report")

MakeAdapter = Callable[..., Adapter]
TOKENS = torch.arange(1, 60)[None]


def logits(model: SparseModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.model(input_ids=TOKENS).logits
    return found


@pytest.fixture
def beneath(make_adapter: MakeAdapter, tmp_path: Path) -> Path:
    """A delta file to build on, of a bearable size."""
    write_delta(tmp_path / "beneath.safetensors", make_adapter(1, scale=0.1))
    return tmp_path / "beneath.safetensors"


def test_what_lies_beneath_plays_as_an_adapter_does(
    tiny_base: Base, make_adapter: MakeAdapter
) -> None:
    adapter, nothing = make_adapter(1), torch.empty(0, dtype=torch.int64)
    alone = logits(SparseModel.of(tiny_base, adapter))
    over = SparseModel(tiny_base, dict.fromkeys(adapter.modules, nothing), over=adapter)
    torch.testing.assert_close(logits(over), alone, rtol=1e-5, atol=1e-5)
    base = logits(SparseModel(tiny_base, {}))
    assert float((alone - base).abs().max()) > 0.1  # and nothing is left of earlier models


@pytest.mark.parametrize("method", ["spiel-ag", "spiel-ma", "sgc", "zo", "fisher", "lift"])
def test_the_file_plays_what_was_trained_and_what_lay_beneath(
    configure: Configure, beneath: Path, tiny_base: Base, method: str
) -> None:
    result = run(configure(method=method, over=beneath, max_steps=6))
    trained = logits(result.model)
    file = adapter_of(result)
    torch.testing.assert_close(
        logits(SparseModel.of(tiny_base, file)), trained, rtol=1e-3, atol=1e-3
    )
    frozen, weights = read_delta(beneath.read_bytes()), 0
    for name, delta in file.modules.items():
        own, found = result.model.layers[name].dense(), delta.dense(torch.float32)
        torch.testing.assert_close(found, own + frozen.modules[name].dense(torch.float32))
        weights += found.numel()
    assert file.info.density == pytest.approx(file.nnz / weights)


def test_training_starts_where_the_adapter_ends(
    configure: Configure, beneath: Path, tiny_base: Base
) -> None:
    first = run(configure(over=beneath, max_steps=1)).losses[0]
    other = run(configure(max_steps=1, out=beneath.parent / "other.safetensors")).losses[0]
    assert first != other


def test_modules_that_are_not_trained_keep_what_lay_beneath(
    configure: Configure, beneath: Path
) -> None:
    file = adapter_of(run(configure(over=beneath, modules=("q_proj",), max_steps=2)))
    frozen = read_delta(beneath.read_bytes())
    assert file.modules.keys() == frozen.modules.keys()
    for name, delta in frozen.modules.items():
        if not name.endswith("q_proj"):
            assert torch.equal(file.modules[name].dense(torch.float32), delta.dense(torch.float32))
    assert 0 < file.info.density < 1


@pytest.mark.parametrize("method", ["lift", "magnitude", "row-topk"])
def test_weights_are_compared_as_they_play(
    configure: Configure, beneath: Path, method: str
) -> None:
    """The largest of what lies beneath is larger than any weight: it is in every support."""
    frozen = read_delta(beneath.read_bytes())
    for delta in frozen.modules.values():
        delta.values[0] = 50.0
    write_delta(beneath, frozen)
    config = configure(method=method, over=beneath, max_steps=5, rank=64)
    layers = run(config).model.layers
    for name, delta in frozen.modules.items():
        assert int(delta.flat()[0]) in flat_positions(layers[name]).tolist()


def test_a_resumed_run_is_the_unbroken_one(
    configure: Configure, beneath: Path, tmp_path: Path
) -> None:
    whole = run(configure(over=beneath))
    broken = configure(over=beneath, out=tmp_path / "broken" / "sums.safetensors")
    interrupt(broken, update=7)
    moved = beneath.rename(tmp_path / "moved.safetensors")
    assert_same_run(whole, run(replace(broken, over=moved, resume=True)))


def test_a_run_is_not_resumed_over_another_adapter(
    configure: Configure, beneath: Path, make_adapter: MakeAdapter
) -> None:
    config = configure(over=beneath)
    interrupt(config, update=7)
    write_delta(beneath, make_adapter(2))
    with pytest.raises(ConfigError, match=r"^over: expected [0-9a-f]{12} as in the run to resume"):
        Trainer(replace(config, resume=True))


def test_its_chat_template_is_taken_over(
    configure: Configure, beneath: Path, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(1)
    template = "{{ messages[0].content }}"
    write_delta(beneath, Adapter(replace(adapter.info, chat_template=template), adapter.modules))
    assert adapter_of(run(configure(over=beneath, max_steps=1))).info.chat_template == template


def test_sums_are_rounded_once(configure: Configure, beneath: Path, tmp_path: Path) -> None:
    exact, rounded = (
        adapter_of(
            run(configure(over=beneath, value_dtype=dtype, out=tmp_path / f"{dtype}.safetensors"))
        )
        for dtype in ("float32", "bfloat16")
    )
    for name, delta in exact.modules.items():
        assert torch.equal(rounded.modules[name].values, delta.values.bfloat16())


def test_a_wrong_file_is_refused_before_the_base_is_loaded(
    configure: Configure,
    beneath: Path,
    tiny_base: Base,
    make_adapter: MakeAdapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(trainer, "load_base")
    adapter = make_adapter(1)
    foreign = replace(adapter.info, base_fingerprint="another")
    write_delta(beneath, Adapter(foreign, adapter.modules))
    with pytest.raises(BaseMismatch, match=rf"^{beneath}: expected "):
        Trainer(configure(over=beneath))
    strange = replace(adapter.info, base_fingerprint=tiny_base.spec.fingerprint)
    modules = {f"{name}.other": delta for name, delta in adapter.modules.items()}
    write_delta(beneath, Adapter(strange, modules))
    for refuse in (Trainer, make_plan):
        with pytest.raises(ModuleMismatch, match=rf"^{beneath}: "):
            refuse(configure(over=beneath))
    beneath.unlink()
    for refuse in (Trainer, make_plan):
        with pytest.raises(NotADelta, match=r"^expected a readable delta file, got: .*beneath"):
            refuse(configure(over=beneath))


@pytest.mark.parametrize(
    "made",
    [{"method": "repair"}, {"settings": {"start": "residual"}}, {"settings": {"mends": "nf4"}}],
)
def test_what_mends_a_quantised_base_goes_over_no_other(
    configure: Configure, beneath: Path, make_adapter: MakeAdapter, made: dict[str, Any]
) -> None:
    adapter = make_adapter(1)
    write_delta(beneath, Adapter(replace(adapter.info, **made), adapter.modules))
    assert mends_rounding(adapter_of(run(configure(over=beneath, max_steps=1))).info)
    with pytest.raises(ConfigError, match=r"^over: .* mends a quantised base"):
        Trainer(configure(over=beneath, quantised=False, out=beneath.parent / "b.safetensors"))


def test_residuals_are_not_counted_twice(configure: Configure, beneath: Path) -> None:
    with pytest.raises(ConfigError, match=r"^start=residual needs a base alone"):
        configure(over=beneath, start="residual")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_counts_in_what_lies_beneath(
    configure: Configure, beneath: Path, dtype: str
) -> None:
    config = configure(over=beneath, value_dtype=dtype, max_steps=1)
    over, alone = make_plan(config), make_plan(replace(config, over=None))
    size = run(config).file.stat().st_size
    assert over.file == pytest.approx(size, rel=0.1) and alone.file < 0.8 * size
    frozen = [FrozenDelta(delta) for delta in read_delta(beneath.read_bytes()).modules.values()]
    held = sum(buffer.nbytes for delta in frozen for buffer in delta.buffers())
    assert over.base - alone.base == held
