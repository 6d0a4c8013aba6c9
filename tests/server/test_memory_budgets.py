"""Budgets that the configuration leaves open follow what memory is free."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig

from spieldose_server import memory_budgets
from spieldose_server.config import ServerConfig
from spieldose_server.errors import ConfigError
from spieldose_server.memory_budgets import budgeted, free_memory, kv_bytes

from ..conftest import Running

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Model:
    """Stand for a model of 2 layers with a key and a value of 6 numbers of 2 bytes: 48 a token."""

    dtype = torch.bfloat16

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.config = LlamaConfig(
            num_hidden_layers=2,
            hidden_size=20,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=6,
        )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budgets, "free_memory", lambda: 8000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (600, 1000))


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [
        ({}, CPU, (3952, 1000)),  # 96 bytes go to the KV cache
        ({}, CUDA, (252, 2000)),
        ({"adapter_memory": 7}, CPU, (7, 1000)),
        ({"host_memory": 7}, CUDA, (252, 7)),
        ({"adapter_memory": 9000, "host_memory": 9001}, CPU, (9000, 9001)),
    ],
)
def test_what_is_not_given_is_a_share_of_what_is_free(
    tmp_path: Path, given: dict[str, int], device: torch.device, expected: tuple[int, int]
) -> None:
    config = ServerConfig(base="b", adapters=tmp_path, kv_tokens=2, **given)  # type: ignore[arg-type]
    found = budgeted(config, Model(device))
    assert (found.adapter_memory, found.host_memory) == expected
    assert found.kv_tokens == 2


@pytest.mark.usefixtures("free")
def test_where_the_kv_cache_takes_all_the_server_does_not_start(tmp_path: Path) -> None:
    config = ServerConfig(base="b", adapters=tmp_path, kv_tokens=15)
    with pytest.raises(ConfigError, match=r"free memory on cuda .* beside 15 kv_tokens, got 0 and"):
        budgeted(config, Model(CUDA))
    budgeted(replace(config, adapter_memory=1), Model(CUDA))


def test_the_kv_cache_takes_what_the_engine_allocates(running: Running) -> None:
    cache = running.server.engine._manager.batch_processor.cache
    held = kv_bytes(running.base.model, running.server.config.kv_tokens)
    assert held <= cache.cache_tensor.nbytes <= 1.1 * held  # a little of it is nobody's


@pytest.mark.parametrize("name", ["adapter_memory", "host_memory"])
def test_less_than_nothing_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must not be negative, got -1$"):
        ServerConfig(base="b", adapters=tmp_path, **{name: -1})  # type: ignore[arg-type]


class Groups:
    """Lay out control groups as the kernel does."""

    def __init__(self, root: Path) -> None:
        self.process, self.root = root / "process", root / "groups"
        self.process.write_text("9:memory:/elsewhere\n0::/slice/unit\n")
        (self.root / "slice" / "unit").mkdir(parents=True)

    def limit(self, group: str, limit: object, *, used: int, cache: int = 0) -> None:
        """Limit a group's memory."""
        folder = self.root / group
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        stat = f"anon 5\ninactive_file {cache}\nactive_file 7\n"
        (folder / "memory.stat").write_text(stat)

    def free(self) -> int:
        """Return what is free in them."""
        return free_memory(self.process, self.root)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    machine = psutil.virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    return Groups(tmp_path)


def test_without_limits_the_machine_s_free_memory_counts(groups: Groups) -> None:
    assert groups.free() == 1 << 20
    groups.limit("slice/unit", "max", used=3)
    groups.limit("elsewhere", 10, used=3)
    groups.limit("slice", 1 << 30, used=3)
    assert groups.free() == 1 << 20


def test_a_group_s_limit_counts_and_its_files_cache_is_free(groups: Groups) -> None:
    groups.limit("slice/unit", 5000, used=3000, cache=400)
    assert groups.free() == 2400
    groups.limit("slice", 4000, used=3500)
    assert groups.free() == 500
    groups.limit("slice", 4000, used=4500)
    assert groups.free() == 0


def test_a_container_s_group_is_its_root(groups: Groups) -> None:
    groups.process.write_text("0::/\n")
    groups.limit("", 5000, used=3000)
    assert groups.free() == 2000


def test_a_system_without_groups_has_the_machine_s(groups: Groups, tmp_path: Path) -> None:
    assert free_memory(tmp_path / "none", tmp_path / "nowhere") == 1 << 20


def test_this_machine_has_some() -> None:
    assert 1 << 20 < free_memory() <= psutil.virtual_memory().total
