"""A plan says what a run will need before anything is loaded, and what it says comes true."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

from spieldose_kernels.base import Base
from spieldose_kernels.errors import BaseError
from spieldose_trainer.errors import ConfigError, DataError
from spieldose_trainer.memory import measure_memory
from spieldose_trainer.model import SparseModel
from spieldose_trainer.parts import first_support
from spieldose_trainer.plan import Plan
from spieldose_trainer.plan_table import print_plan
from spieldose_trainer.planning import make_plan
from spieldose_trainer.selectors.first_support import random_support, row_support
from spieldose_trainer.updaters.adamw import SparseAdamW

from .configuration import Configure

Planned = Callable[..., Plan]


@pytest.fixture
def planned(configure: Configure) -> Planned:
    """Plan a run on the tiny model; keyword arguments as in TrainConfig."""

    def planned(**changes: Any) -> Plan:
        settings: dict[str, Any] = {"batch_size": 2, "max_length": 32}
        return make_plan(configure(**settings | changes))

    return planned


def printed(plan: Plan) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=200))
    return out.getvalue()


def test_a_plan_counts_what_a_run_then_holds(planned: Planned, tiny_base: Base) -> None:
    model = SparseModel(tiny_base, random_support(tiny_base.spec.shapes, 0.05, seed=0))
    updater = SparseAdamW([layer.values for layer in model.layers.values()], lr=1e-3)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    updater.step()
    table, plan = measure_memory(model.layers, updater, method="spiel-ag"), planned()
    assert (plan.entries, plan.density) == (table.entries, pytest.approx(model.density))
    assert (plan.value, plan.position) == (table.value, table.position)
    assert (plan.gradient, plan.moments) == (table.gradient, table.moments)


def test_layers_of_a_kind_are_one_row(planned: Planned) -> None:
    found = {kind.kind: (kind.layers, kind.shape) for kind in planned().kinds}
    assert found["down_proj"] == (2, (64, 160))
    assert len(found) == 7


def test_layers_left_out_of_training_still_belong_to_the_base(planned: Planned) -> None:
    plan = planned(modules=("q_proj",))
    assert [kind.kind for kind in plan.kinds] == ["q_proj"]
    assert plan.base == planned().base


def test_rows_of_equal_size_are_counted_as_they_are_chosen(
    planned: Planned, tiny_base: Base
) -> None:
    shapes = tiny_base.spec.shapes
    chosen = row_support(shapes, 0.05, weights=lambda name: torch.rand(shapes[name]))
    plan = planned(method="row-topk")
    assert plan.entries == sum(len(positions) for positions in chosen.values())


def test_layers_that_compete_hold_as_many_together_as_the_run_will(
    configure: Configure, planned: Planned, tiny_base: Base
) -> None:
    changes = {"method": "magnitude", "allocation": "global", "density": 0.0213}
    config = configure(**changes)
    shapes = dict(tiny_base.spec.shapes)
    chosen = first_support(config, tiny_base, shapes=shapes, texts=())
    plan = planned(**changes)
    assert plan.entries == sum(map(len, chosen.values()))
    assert "finds each layer's share" in printed(plan)
    assert "finds each layer's share" not in printed(planned(**changes | {"method": "random"}))


def test_a_method_is_planned_at_its_own_density(planned: Planned) -> None:
    assert planned(method="zo", density=None).density == pytest.approx(0.001, rel=0.1)


def test_zeroth_order_needs_no_gradient_and_keeps_no_activations(planned: Planned) -> None:
    first, zeroth = planned(), planned(method="zo")
    assert zeroth.gradient == zeroth.moments == zeroth.selection == 0
    assert first.step is not None and zeroth.step is not None
    assert zeroth.step < first.step / 2


def test_only_what_gathers_gradients_holds_some(planned: Planned) -> None:
    assert planned().selection > 0 and planned(method="sgc").selection > 0
    assert planned(method="random").selection == planned(method="spiel-ma").selection == 0


def test_fisher_scores_take_a_square_of_every_weight_before_the_updates(planned: Planned) -> None:
    plan, weights = planned(method="zo"), 86_016
    assert plan.before > 4 * weights
    assert plan.live == _always(plan) + plan.before
    assert planned(method="random").before == 0


def _always(plan: Plan) -> int:
    assert plan.libraries is not None
    return plan.libraries + plan.base + plan.value + plan.position


def test_a_quantised_base_unpacks_one_layer_at_a_time(planned: Planned) -> None:
    packed, plain = planned(), planned(quantised=False)
    assert packed.step is not None and plain.step is not None
    assert packed.step - plain.step == 160 * 64 * 4
    assert packed.base < plain.base


def test_activations_grow_with_the_batch_and_its_length(planned: Planned) -> None:
    small, large = planned(), planned(batch_size=4, max_length=64)
    assert small.step is not None and large.step is not None
    assert large.step == pytest.approx(4 * small.step, rel=0.15)


def test_no_example_has_more_tokens_than_the_base_has_positions(planned: Planned) -> None:
    assert planned(max_length=513).length == planned(max_length=512).length == 512
    assert planned(max_length=513).step == planned(max_length=512).step


def test_the_peak_is_the_sum_of_its_parts(planned: Planned) -> None:
    plan = planned()
    assert plan.step is not None
    update = plan.gradient + plan.moments + plan.selection + plan.step
    assert plan.live == _always(plan) + update
    assert plan.peak == int(plan.retention * plan.live)


def test_a_plan_is_made_from_the_configuration_alone(
    tiny_directory: Path, tmp_path: Path, planned: Planned
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_directory / "config.json").read_bytes())
    alone, whole = planned(base=str(tmp_path)), planned()
    assert alone.kinds == whole.kinds
    assert (alone.base, alone.step, alone.file) == (whole.base, whole.step, whole.file)


def test_a_base_that_is_not_there_is_said_so(planned: Planned, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="none"):
        planned(base=str(tmp_path / "none"))


@pytest.mark.parametrize("base", ["nobody/nothing", "a b", "a" * 300])
def test_a_name_of_nothing_is_refused_at_once(
    planned: Planned, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # ask no network
    with pytest.raises(BaseError, match=rf"^expected a model directory or hub name, got '{base}'"):
        planned(base=base)


@pytest.mark.parametrize("field", ["data", "eval_data", "fisher_data"])
def test_data_that_is_not_there_is_said_so(planned: Planned, tmp_path: Path, field: str) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: expected a readable UTF-8 JSONL file"):
        planned(method="fisher", **{field: tmp_path / "none.jsonl"})


def test_a_directory_in_the_place_of_the_delta_file_is_said_so(
    planned: Planned, tmp_path: Path
) -> None:
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(ConfigError, match=r"^out: expected a file to write, got the directory"):
        planned(out=tmp_path / "out.safetensors")


def test_a_chat_template_that_is_not_there_is_said_so(planned: Planned, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^chat_template: expected a readable UTF-8 file"):
        planned(chat_template=tmp_path / "none.jinja")


def test_a_module_that_does_not_match_is_said_so(planned: Planned) -> None:
    with pytest.raises(ConfigError, match="x_proj"):
        planned(modules=("x_proj",))


def test_the_tables_say_what_is_trained_and_what_is_estimated(planned: Planned) -> None:
    plan = planned()
    text = printed(plan)
    row = next(line for line in text.splitlines() if "down_proj" in line)
    assert row.replace("│", "").split() == ["down_proj", "2", "64", "×", "160", "5.000%", "1,024"]
    assert f"{plan.entries:,}" in text
    assert "moments (adamw)" in text and "2 examples of 32 tokens" in text
    assert "~" in next(line for line in text.splitlines() if "expected peak" in line)


def test_the_tables_say_when_activations_are_not_known(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spieldose_trainer.planning.rehearse", lambda *_, **__: None)
    plan = planned()
    assert plan.step is None and math.isfinite(plan.peak)
    assert "not known, and left out" in printed(plan)
    assert "activations, logits" not in printed(plan)
