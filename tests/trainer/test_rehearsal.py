"""A rehearsal without data holds what a real pass holds."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, MixtralConfig

from spieldose_kernels.base import load_base
from spieldose_kernels.checkpoint import target_shapes
from spieldose_trainer.live_bytes import LiveBytes
from spieldose_trainer.model import SparseModel
from spieldose_trainer.rehearsal import rehearse
from spieldose_trainer.selectors.first_support import random_support

BATCH_SIZE, LENGTH = 2, 48


@pytest.fixture
def model(tiny_directory: Path) -> SparseModel:
    """The tiny model as it was saved, under training: dequantising is not rehearsed."""
    base = load_base(
        str(tiny_directory),
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        fused=False,
        quantised=False,
    )
    return SparseModel(base, random_support(base.spec.shapes, 0.05, seed=0)).train()


def rehearsed(
    directory: Path, *, backward: bool = True, checkpointing: bool = False, on_cpu: bool = True
) -> int:
    sizes = {
        name: (height, width, int(0.05 * height * width))
        for name, (height, width) in target_shapes(directory).items()
    }
    found = rehearse(
        AutoConfig.from_pretrained(directory),
        sizes,
        batch_size=BATCH_SIZE,
        length=LENGTH,
        dtype=torch.float32,
        backward=backward,
        checkpointing=checkpointing,
        on_cpu=on_cpu,
    )
    assert found is not None
    return found


def played(model: SparseModel, *, backward: bool = True) -> int:
    """Return what a real pass over a batch with padding holds at most."""
    ids = torch.randint(4, 250, (BATCH_SIZE, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, LENGTH // 2 :] = 0
    live = LiveBytes([*model.parameters(), *model.buffers()])
    with live, torch.set_grad_enabled(backward):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        if backward:
            loss.backward()
    return live.peak


def test_a_pass_with_backward(model: SparseModel, tiny_directory: Path) -> None:
    assert rehearsed(tiny_directory) == pytest.approx(played(model), rel=0.005)


def test_a_forward_pass_alone(model: SparseModel, tiny_directory: Path) -> None:
    real = played(model, backward=False)
    assert rehearsed(tiny_directory, backward=False) == pytest.approx(real, rel=0.005)
    assert real < played(model) / 2


def test_a_pass_with_checkpointing(model: SparseModel, tiny_directory: Path) -> None:
    kept = rehearsed(tiny_directory)
    model.model.activation_checkpointing_enable({"use_reentrant": False})
    real = played(model)
    assert rehearsed(tiny_directory, checkpointing=True) == pytest.approx(real, rel=0.005)
    assert real < kept


def test_a_pass_on_a_gpu_makes_float32_copies_besides(tiny_directory: Path) -> None:
    on_gpu = rehearsed(tiny_directory, backward=False, on_cpu=False)
    assert on_gpu > rehearsed(tiny_directory, backward=False)


def test_a_model_that_does_not_run_without_data_cannot_be_rehearsed() -> None:
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    found = rehearse(
        config,
        {"model.layers.0.self_attn.q_proj": (64, 64, 40)},
        batch_size=1,
        length=8,
        dtype=torch.float32,
        backward=True,
        checkpointing=False,
        on_cpu=True,
    )
    assert found is None


def test_live_bytes_forget_the_dead_and_do_not_count_views_twice() -> None:
    held = torch.zeros(10)
    with LiveBytes([held]) as live:
        first = torch.ones(100)
        assert (first.view(10, 10).t() + 0).shape == (10, 10)  # 400 bytes and 400 that die
        assert live.live == 400
        held.view(2, 5).add_(1)
    assert live.peak == 800
