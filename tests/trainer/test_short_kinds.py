"""Tables and plots name a module's kind as shortly as they can."""

from spieldose_trainer.short_kinds import short_kinds


def test_the_first_number_is_the_block_and_the_last_word_the_kind() -> None:
    name = "model.layers.11.self_attn.q_proj"
    assert short_kinds([name]) == {name: ("q_proj", 11)}


def test_kinds_that_share_their_last_word_are_told_apart() -> None:
    found = short_kinds(["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"])
    assert [kind for kind, _ in found.values()] == ["attn.c_proj", "mlp.c_proj"]


def test_experts_of_a_block_are_one_kind() -> None:
    names = [f"model.layers.3.mlp.experts.{i}.up_proj" for i in range(2)]
    assert set(short_kinds(names).values()) == {("up_proj", 3)}


def test_a_name_without_a_number_is_a_kind_outside_the_blocks() -> None:
    assert short_kinds(["lm_head"]) == {"lm_head": ("lm_head", None)}


def test_a_name_that_ends_in_its_only_number_is_a_kind_outside_the_blocks() -> None:
    assert short_kinds(["first.0"])["first.0"].block is None
