"""What a checkpoint says of itself is what the loaded base says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from spieldose_kernels.base import Base, load_base
from spieldose_kernels.checkpoint import checkpoint_spec, target_shapes
from spieldose_kernels.errors import BaseError


def test_the_spec_is_the_loaded_base_s(tiny_base: Base, tiny_directory: Path) -> None:
    assert checkpoint_spec(str(tiny_directory)) == tiny_base.spec


def test_the_layers_come_in_the_model_s_order(tiny_base: Base, tiny_directory: Path) -> None:
    assert list(target_shapes(tiny_directory)) == list(tiny_base.spec.shapes)


def test_an_output_head_of_its_own_is_no_target(tiny_directory: Path, tmp_path: Path) -> None:
    untied = LlamaConfig.from_pretrained(tiny_directory)
    untied.tie_word_embeddings = False
    LlamaForCausalLM(untied).save_pretrained(tmp_path)
    assert list(target_shapes(tmp_path)) == list(target_shapes(tiny_directory))


def test_layers_that_store_their_weights_transposed_are_named_by_output_and_input(
    tiny_directory: Path, tmp_path: Path
) -> None:
    config = GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=40)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert target_shapes(tmp_path)["transformer.h.0.attn.c_attn"] == (96, 32)


def test_a_base_saved_as_nf4_has_the_same_layers(tiny_base: Base, tmp_path: Path) -> None:
    tiny_base.model.save_pretrained(tmp_path)
    tiny_base.tokenizer.save_pretrained(tmp_path)
    spec = checkpoint_spec(str(tmp_path))
    again = load_base(
        str(tmp_path), device=torch.device("cpu"), compute_dtype=torch.float32, fused=False
    )
    assert spec == again.spec
    assert spec.shapes == tiny_base.spec.shapes


def test_shapes_need_no_weights(tiny_directory: Path, tmp_path: Path) -> None:
    settings = (tiny_directory / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(settings)
    assert target_shapes(tmp_path) == target_shapes(tiny_directory)


def test_another_quantisation_than_nf4_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    settings = json.loads((tiny_directory / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BaseError, match="expected linear layers quantised to nf4, got fp4"):
        target_shapes(tmp_path)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="expected a causal language model") as caught:
        target_shapes(tmp_path)
    assert "\n" not in str(caught.value)
