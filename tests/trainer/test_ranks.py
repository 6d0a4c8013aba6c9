"""Two processes have one support, and come out where one process with both batches does."""

import importlib
import shutil
from multiprocessing.context import BaseContext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from spieldose_kernels.delta_file import read_delta
from spieldose_trainer.checkpoints import newest_checkpoint
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.errors import ConfigError
from spieldose_trainer.trainer import Trainer

METHODS = ("spiel-ag", "correlation", "spiel-ma", "zo", "lift", "sgc", "fisher")
BOTH = (*METHODS, "cesgc")  # singular vectors that round otherwise choose otherwise than alone


class Ranks(NamedTuple):
    """Hold what two processes left behind, and the module they ran."""

    module: ModuleType
    directory: Path
    found: tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(
    processes: BaseContext, tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Ranks:
    """All runs, made by two processes."""
    directory = tmp_path_factory.mktemp("ranks")
    module = importlib.import_module("two_runs")  # as the processes import it
    module.write_data(directory)
    torch.multiprocessing.start_processes(
        module.rank,
        (tiny_directory, directory),
        nprocs=2,
        start_method=processes.get_start_method(),
    )
    found = (torch.load(directory / "0.pt"), torch.load(directory / "1.pt"))
    return Ranks(module, directory, found)


@pytest.fixture
def alone(ranks: Ranks, tiny_directory: Path, tmp_path: Path, method: str) -> dict[str, Any]:
    """The same run, made by one process with twice the batch."""
    ranks.module.write_data(tmp_path)
    config = ranks.module.asked(method, tiny_directory, tmp_path, processes=1)
    found: dict[str, Any] = ranks.module.one_run(TrainConfig(**config))
    return found


@pytest.mark.parametrize("method", BOTH)
def test_both_processes_have_the_same_support_and_values(ranks: Ranks, method: str) -> None:
    first, second = (found[method] for found in ranks.found)
    assert first["losses"] == second["losses"]
    assert first["held out"] == second["held out"]
    for what in ("positions", "values"):
        for name, tensor in first[what].items():
            assert torch.equal(tensor, second[what][name]), (what, name)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_come_out_where_one_with_twice_the_batch_does(
    ranks: Ranks, alone: dict[str, Any], method: str
) -> None:
    together = ranks.found[0][method]
    # a slope is a small difference of losses over 2e-3: what rounds there counts a thousandfold
    rough = 100 if method == "zo" else 1
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-6 * rough)
    assert together["held out"] == pytest.approx(alone["held out"], rel=1e-6 * rough)
    assert together["tokens"] == alone["tokens"]
    for name, positions in alone["positions"].items():
        assert torch.equal(together["positions"][name], positions)
        torch.testing.assert_close(
            together["values"][name], alone["values"][name], rtol=1e-3, atol=2e-6 * rough
        )


@pytest.mark.parametrize("method", ["cesgc"])
def test_two_processes_that_decompose_lose_what_one_with_twice_the_batch_does(
    ranks: Ranks, alone: dict[str, Any]
) -> None:
    assert ranks.found[0]["cesgc"]["losses"] == pytest.approx(alone["losses"], rel=1e-3)


def test_an_epoch_of_packed_rows_is_divided_among_the_processes(
    ranks: Ranks, tiny_directory: Path, tmp_path: Path
) -> None:
    ranks.module.write_data(tmp_path)
    config = ranks.module.asked("random", tiny_directory, tmp_path, processes=1)
    alone = ranks.module.one_run(TrainConfig(**config))
    first, second = (found["random"] for found in ranks.found)
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert first["tokens"] == alone["tokens"] and len(alone["tokens"]) == 4


def test_only_the_first_process_prints(ranks: Ranks) -> None:
    first, second = ((ranks.directory / f"{rank}.txt").read_text() for rank in range(2))
    assert first.count("6/6") >= len(BOTH)
    assert "update" not in second and "%" not in second
    assert "Warning" not in first + second


def test_only_the_first_process_writes_files_of_the_run(ranks: Ranks) -> None:
    first, second = (found["written"] for found in ranks.found)
    assert "trainer_state.json" in first
    assert second == []
    for method in BOTH:
        delta = read_delta((ranks.directory / f"{method}.safetensors").read_bytes())
        assert delta.info.method == ranks.module.RUNS[method].get("method", method)
        left = {path.name for path in (ranks.directory / f"{method}.run").iterdir()}
        assert not left & {"checkpoints", "best.safetensors"}


def test_ctrl_c_in_one_process_stops_both_after_the_same_update(ranks: Ranks) -> None:
    for found in ranks.found:
        assert found["interrupted"]["said"].startswith("stopped after update 3 of 6")


def test_a_checkpoint_holds_the_random_generators_of_both(ranks: Ranks) -> None:
    (checkpoint,) = (ranks.directory / "checkpoints").glob("checkpoint-*")
    assert newest_checkpoint(ranks.directory / "checkpoints") == checkpoint
    (checkpoint / "rng_state_1.pth").rename(ranks.directory / "rng_state_1.pth")
    assert newest_checkpoint(ranks.directory / "checkpoints") is None
    (ranks.directory / "rng_state_1.pth").rename(checkpoint / "rng_state_1.pth")


def test_two_processes_resume_to_the_same_bits(ranks: Ranks) -> None:
    unbroken, resumed = (ranks.found[0][run] for run in ("spiel-ag", "interrupted"))
    assert resumed["losses"] == unbroken["losses"]
    for name, values in unbroken["values"].items():
        assert torch.equal(resumed["positions"][name], unbroken["positions"][name])
        assert torch.equal(resumed["values"][name], values)


def test_other_processes_than_the_run_began_with_are_refused(
    ranks: Ranks, tiny_directory: Path, tmp_path: Path
) -> None:
    ranks.module.write_data(tmp_path)
    asked = ranks.module.asked("spiel-ag", tiny_directory, tmp_path, processes=2)
    config = TrainConfig(**asked, resume=True)
    shutil.copytree(ranks.directory / "checkpoints", config.checkpoints)
    with pytest.raises(ConfigError, match=r"^processes: expected 2 as in the run to resume, got 1"):
        Trainer(config)
