"""Every method and every allowed mix of selector and updater trains; the others are refused."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch

from spieldose_trainer.errors import ConfigError
from spieldose_trainer.methods import METHODS, MethodName, SelectorName, UpdaterName, check_pair
from spieldose_trainer.support import flat_positions

from .configuration import Configure
from .runs import adapter_of, assert_same_deltas, run

pytestmark = pytest.mark.usefixtures("no_report")

PAIRS = list(product(get_args(SelectorName), get_args(UpdaterName)))


def allowed(selector: SelectorName, updater: UpdaterName) -> bool:
    try:
        check_pair(selector, updater)
    except ConfigError:
        return False
    return True


ALLOWED = [pair for pair in PAIRS if allowed(*pair)]
CHANGES = {"gradients": [1], "momentum": [1], "principal": [2], "largest": [2, 3]}
REFUSED = [pair for pair in PAIRS if not allowed(*pair)]


def test_as_many_pairs_are_allowed_as_make_sense() -> None:
    free = ("principal", "fisher", "magnitude", "row-topk", "random")
    steady = [pair for pair in PAIRS if pair[0] in free and pair[1] != "compressed-adam"]
    spiel = [("gradients", "adamw"), ("gradients", "sm3"), ("momentum", "sm3")]
    assert sorted(ALLOWED) == sorted([*steady, *spiel, ("largest", "compressed-adam")])


@pytest.mark.parametrize(("selector", "updater"), ALLOWED)
def test_an_allowed_pair_trains(configure: Configure, selector: str, updater: str) -> None:
    config = configure(
        selector=selector,
        updater=updater,
        max_steps=3,
        reselect_every=2,
        selection_steps=1,
        rank=8,
        fisher_samples=2,
    )
    result = run(config)
    assert len(result.losses) == 3
    changes = [reselection.update for reselection in result.log.reselections]
    assert changes == CHANGES.get(selector, [])
    for delta in adapter_of(result).modules.values():  # read_delta refuses what is not finite
        assert bool(delta.values.any())


@pytest.mark.parametrize(("selector", "updater"), REFUSED)
def test_a_pair_that_makes_no_sense_is_refused_with_what_would(
    configure: Configure, selector: str, updater: str
) -> None:
    with pytest.raises(ConfigError) as error:
        configure(selector=selector, updater=updater)
    said = str(error.value)
    assert selector in said and updater in said and "expects" in said and ": " in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "spiel"),
        ("selector", "gradient"),
        ("updater", "adam"),
        ("schedule", "exponential"),
        ("value_dtype", "float16"),
        ("start", "residuals"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(
    configure: Configure, field: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} must be one of \w.*, \w.*, got {value}$"):
        configure(**{field: value})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"description": "sums\n"}, r"description must be one line, got sums\n"),
        ({"description": "a\u2028b"}, r"description must be one line, got a\u2028b"),
        ({"description": "\udcff"}, r"description must be Unicode text, got \udcff"),
        ({"data": Path("\udcff.jsonl")}, r"data must be Unicode text, got \udcff.jsonl"),
        ({"base": "\udcff"}, r"base must be Unicode text, got \udcff"),
    ],
)
def test_what_a_file_cannot_keep_as_text_is_refused(
    configure: Configure, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        configure(**changes)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [("zo", "clip", 1.0), ("sgc", "clip", 1.0), ("zo", "gradient_checkpointing", True)],
)
def test_what_would_have_no_effect_is_refused(
    configure: Configure, method: MethodName, field: str, value: object
) -> None:
    updater = METHODS[method].updater
    with pytest.raises(ConfigError, match=rf"^{field} .*{updater}"):
        configure(method=method, **{field: value})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chunk": 0}, "chunk must be between"),
        ({"kept": 1024}, "kept must be at least 1 and below"),
    ],
)
def test_a_compression_that_cannot_be_is_no_configuration(
    configure: Configure, changes: dict[str, int], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        configure(method="sgc", **changes)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "zo"])
def test_a_method_lowers_the_loss(configure: Configure, method: MethodName) -> None:
    losses = run(configure(method=method, max_steps=12, rank=8, fisher_samples=4)).losses
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_the_same_seed_gives_the_same_bits(configure: Configure) -> None:
    first, second = (adapter_of(run(configure(method="random", max_steps=3))) for _ in range(2))
    assert_same_deltas(first, second)


def test_another_seed_gives_another_support_and_another_order_of_the_examples(
    configure: Configure,
) -> None:
    first, second = (run(configure(method="random", max_steps=1, seed=seed)) for seed in (0, 1))
    assert first.losses != second.losses  # the values are 0: it is the examples that differ
    for name, layer in first.model.layers.items():
        other = second.model.layers[name]
        assert not torch.equal(flat_positions(layer), flat_positions(other))


def test_values_are_written_as_asked_for(configure: Configure) -> None:
    exact, rounded = (
        adapter_of(run(configure(max_steps=3, value_dtype=dtype)))
        for dtype in ("float32", "bfloat16")
    )
    for name, delta in rounded.modules.items():
        assert delta.values.dtype == torch.bfloat16
        assert torch.equal(delta.values, exact.modules[name].values.bfloat16())


def test_a_base_that_is_not_quantised_trains(configure: Configure) -> None:
    result = run(configure(quantised=False, max_steps=12))
    assert sum(result.losses[-3:]) < 0.9 * sum(result.losses[:3])
    assert all(layer.weight.dtype == torch.float32 for layer in result.model.base.layers.values())


@pytest.mark.parametrize("method", ["spiel-ag", "spiel-ma"])
def test_activations_in_bfloat16_train_values_in_float32(
    configure: Configure, method: MethodName
) -> None:
    result = run(configure(method=method, compute_dtype="bfloat16", max_steps=12))
    assert sum(result.losses[-3:]) < 0.9 * sum(result.losses[:3])
    assert result.model.base.model.dtype == torch.bfloat16
    for layer in result.model.layers.values():
        assert layer.values.dtype == torch.float32
        assert not torch.equal(layer.values, layer.values.bfloat16().float())


def test_only_the_asked_for_modules_are_trained(configure: Configure) -> None:
    modules = adapter_of(run(configure(max_steps=2, modules=("q_proj", "layers.1.mlp.up_proj"))))
    assert [name.split("layers.")[1] for name in modules.modules] == [
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.mlp.up_proj",
    ]


@pytest.mark.parametrize("updater", ["adamw", "sm3", "zeroth-order"])
def test_weight_decay_pulls_deltas_to_zero(configure: Configure, updater: UpdaterName) -> None:
    config = configure(selector="random", updater=updater, max_steps=6, warmup=0.0)
    free, pulled = (
        sum(float(delta.values.square().sum()) for delta in adapter_of(run(asked)).modules.values())
        for asked in (config, replace(config, weight_decay=50.0))  # · lr 1e-2: halved every update
    )
    assert 0 < pulled < 0.5 * free


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("batch_size", "8", "a whole number"),
        ("batch_size", 1.5, "a whole number"),
        ("max_steps", 2.5, "a whole number or None"),
        ("patience", True, "a whole number or None"),
        ("density", "0.1", "a number or None"),
        ("warmup", None, "a number"),
        ("packing", 1, "True or False"),
        ("modules", "q_proj", "a tuple of names"),
        ("modules", ("q_proj", 3), "a tuple of names"),
        ("description", None, "text"),
        ("data", 3, "a path"),
        ("schedule", None, "a name"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(
    configure: Configure, field: str, value: object, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(**{field: value})
    assert str(caught.value) == f"{field} must be {expected}, got {value!r}"


def test_whole_numbers_lists_and_paths_are_taken_where_they_can_be(configure: Configure) -> None:
    config = configure(clip=1, modules=["q_proj"], base=Path("a/b"))
    assert (config.clip, config.modules, config.base) == (1, ("q_proj",), "a/b")
    assert config.settings() == configure(clip=1, modules=("q_proj",), base="a/b").settings()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "spiel-ag"),
        ({"selector": "random"}, "random"),
        ({"method": "fisher", "updater": "zeroth-order"}, "zo"),
        ({"method": "zo", "updater": "adamw"}, "fisher"),
        ({"updater": "sm3"}, "gradients+sm3"),
    ],
)
def test_a_file_is_named_after_what_made_it(
    configure: Configure, changes: dict[str, str], name: str
) -> None:
    config = configure(max_steps=1, fisher_samples=2, **changes)
    assert adapter_of(run(config)).info.method == name


@pytest.mark.parametrize("method", ["spiel-ag", "spiel-ma", "sgc", "zo"])
def test_a_run_of_one_update_makes_one(configure: Configure, method: MethodName) -> None:
    result = run(configure(method=method, max_steps=1, warmup=0.03, fisher_samples=2))
    assert not result.model.is_zero()
