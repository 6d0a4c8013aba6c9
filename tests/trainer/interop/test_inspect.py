"""What `spieldose inspect` prints is what the file holds, and no file that does not hold passes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spieldose_kernels.delta import Adapter, SparseDelta
from spieldose_kernels.delta_file import write_delta
from spieldose_kernels.errors import BaseMismatch, DeltaError, NotADelta, TruncatedDelta
from spieldose_trainer.interop.command_line import inspect
from spieldose_trainer.interop.inspect import block_ranges, concentration
from spieldose_trainer.module_kind import module_kind


@pytest.fixture
def file(make_adapter: Callable[..., Adapter], tmp_path: Path) -> Path:
    adapter = make_adapter(1, density=0.05)
    info = replace(adapter.info, description="writes [verse]", settings={"epochs": "3", "a": "b"})
    write_delta(tmp_path / "disc.safetensors", replace(adapter, info=info))
    return tmp_path / "disc.safetensors"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """Run the command; return what it printed, by the first word of the line."""
    inspect(arguments)
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line.strip() for line in lines if line.strip()}


def test_the_metadata_are_printed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, str(file))
    assert lines["method"].endswith("random")
    assert lines["density"].endswith("5.00% of the target layers' weights")
    assert lines["values"].endswith("float32 in 14 modules")
    assert lines["description"].endswith("writes [verse]")  # brackets are no markup
    assert lines["settings"].endswith("a=b epochs=3")


def test_what_a_file_says_does_not_steer_the_terminal(
    make_adapter: Callable[..., Adapter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, path = make_adapter(1), tmp_path / "a.safetensors"
    evil = "x\x1b]0;mine\x07\nchecks: whole, and signed\x1b[2J"
    info = replace(adapter.info, base_model=evil, method=evil, description=evil)
    info = replace(info, settings={"a": evil}, chat_template=f"{{{{ 1 }}}}\n{evil}")
    write_delta(path, replace(adapter, info=info))
    for more in ([], ["--modules"]):
        lines = printed(capsys, str(path), *more)
        assert not any("\x1b" in line or "\x07" in line for line in lines.values())
        assert r"x\x1b]0;mine\x07\nchecks: whole, and signed\x1b[2J" in lines["description"]
        assert lines["checks:"].startswith("checks: whole, well-formed")


def test_a_layer_said_to_be_wide_takes_no_more_memory() -> None:
    delta = SparseDelta.from_flat(torch.tensor([3, 5]), torch.ones(2), shape=(1, (1 << 31) - 1))
    assert concentration([delta]) == (pytest.approx(1 / (1 << 31)), 1.0)


def test_a_kind_of_module_has_one_line_with_its_blocks(
    make_adapter: Callable[..., Adapter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(1)
    first, second = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    modules = dict(adapter.modules)
    modules[first] = entries({0: 3.0, 70: -4.0}, shape=(64, 64))
    modules[second] = entries({9: 0.0}, shape=(64, 64))
    write_delta(tmp_path / "a.safetensors", replace(adapter, modules=modules))
    lines = printed(capsys, str(tmp_path / "a.safetensors"))
    assert lines["module"].split()[1:] == ["entries", "density", "0", "1", "‖Δ‖", "max", "|δ|"]
    assert lines["self_attn.q_proj"].split() == (
        ["self_attn.q_proj", "3", "0.04%", "0.05%", "0.02%", "5", "4"]
    )
    assert lines["checks:"] == "checks: whole, well-formed; 1 entries have the value 0"


def test_the_last_line_of_the_table_sums_up(
    file: Path, make_adapter: Callable[..., Adapter], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(1, density=0.05)
    values = torch.cat([delta.values for delta in adapter.modules.values()])
    cells = printed(capsys, str(file))["all"].split()
    assert cells[1] == f"{adapter.nnz:,}"
    assert cells[-2:] == [f"{values.norm():.3g}", f"{values.abs().max():.3g}"]


def test_every_module_has_a_line_when_asked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, str(file), "--modules")
    assert lines["model.layers.1.mlp.gate_proj"].split()[1:4] == ["160×64", "512", "5.00%"]
    assert sum(name.startswith("model.layers") for name in lines) == 14


def test_the_lines_fit_eighty_characters(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect([str(file)])
    table = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert len(table) == 10
    assert all(len(line) <= 80 for line in table)


def test_a_file_is_held_against_the_base_when_asked(
    file: Path, tiny_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        f"fits {tiny_directory};"
        in printed(capsys, str(file), "--base", str(tiny_directory))["checks:"]
    )


def test_a_delta_of_another_base_is_refused(
    make_adapter: Callable[..., Adapter], tiny_directory: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(1)
    foreign = replace(adapter, info=replace(adapter.info, base_fingerprint="0" * 64))
    write_delta(tmp_path / "a.safetensors", foreign)
    inspect([str(tmp_path / "a.safetensors")])  # by itself it is whole
    with pytest.raises(BaseMismatch, match=r"a\.safetensors: expected base"):
        inspect([str(tmp_path / "a.safetensors"), "--base", str(tiny_directory)])


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda payload: payload[:-1], TruncatedDelta),
        (lambda payload: b"\x80\x02}q\x00." + bytes(20), NotADelta),
        (lambda payload: payload[:-4] + b"\x00\x00\xc0\x7f", DeltaError),  # ends in a NaN
        (lambda payload: b"", DeltaError),
    ],
)
def test_a_damaged_file_ends_in_one_line(
    file: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
    error: type[DeltaError],
) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(error) as caught:
        inspect([str(file)])
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    assert "got" in message
    assert capsys.readouterr().out == ""


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADelta, match=r"expected a readable delta file, got: .*nothing"):
        inspect([str(tmp_path / "nothing.safetensors")])


# --- names and blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj", 3),
        ("transformer.h.11.mlp.c_fc", "mlp.c_fc", 11),
        ("model.layers.3.mlp.experts.5.up_proj", "mlp.experts.*.up_proj", 3),
        ("model.projector", "model.projector", None),
    ],
)
def test_a_name_tells_kind_and_block(name: str, kind: str, block: int | None) -> None:
    assert module_kind(name) == (kind, block)


@pytest.mark.parametrize(
    ("blocks", "ranges"),
    [
        ([0], [range(0, 1)]),
        ([4, 5], [range(4, 5), range(5, 6)]),
        (list(range(30)), [range(0, 10), range(10, 20), range(20, 30)]),
        (list(range(7)), [range(0, 2), range(2, 4), range(4, 7)]),
    ],
)
def test_blocks_are_cut_into_at_most_three_ranges(
    make_adapter: Callable[..., Adapter], blocks: list[int], ranges: list[range]
) -> None:
    delta = entries({0: 1.0}, shape=(4, 4))
    modules = {f"model.layers.{block}.q_proj": delta for block in blocks}
    assert block_ranges(replace(make_adapter(1), modules=modules)) == ranges


def test_modules_outside_blocks_need_no_ranges(make_adapter: Callable[..., Adapter]) -> None:
    modules = {"projector": entries({0: 1.0}, shape=(4, 4))}
    assert block_ranges(replace(make_adapter(1), modules=modules)) == []


def test_clustering_is_the_share_of_columns_and_rows_that_hold_half_of_the_entries(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    column = entries({8 * row: 1.0 for row in range(8)}, shape=(8, 8))
    assert concentration([column]) == (1 / 8, 4 / 8)
    row = entries({i: 1.0 for i in range(8)}, shape=(8, 8))
    starts, columns = torch.zeros(9, dtype=torch.int32), torch.zeros(0, dtype=torch.uint16)
    empty = SparseDelta(starts, columns, torch.zeros(0), 8)
    assert concentration([row, empty]) == (4 / 8, 1 / 8)
    assert concentration([column, row, row]) == (4 / 8, 1 / 8)
    assert concentration([empty]) == (0.0, 0.0)
    assert " of the columns, " in printed(capsys, str(file))["clustering:"]


def entries(values: dict[int, float], *, shape: tuple[int, int]) -> SparseDelta:
    return SparseDelta.from_flat(
        torch.tensor(list(values)), torch.tensor(list(values.values())), shape=shape
    )
