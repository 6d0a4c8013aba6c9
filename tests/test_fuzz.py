"""Whatever a delta file holds, it is refused or valid, and takes at most twice its size."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mutants import Draft, draft, encoded, entries_of, with_header
from spieldose_kernels.delta_header import HEADERS_IN_A_FILE

FUZZ = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
SEEDS = Path(__file__).parent / "seeds"
ROUNDING = 1 << 19  # bytes a process may grow by beside; large files need no other constant


def test_mutated_files_are_refused_or_valid_and_take_little_memory(tmp_path: Path) -> None:
    done = fuzz("--count", "2000", "--keep", str(tmp_path))
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["files"] == 2000
    assert (result["faults"], result["crashes"]) == (0, 0)
    assert result["refused"] > 1000 and result["valid"] > 200
    assert 0.5 < result["worst_memory_ratio"] < 2


def test_files_that_were_once_misread_are_not_any_more() -> None:
    outcomes = replayed(SEEDS)
    assert len(outcomes) == len(list(SEEDS.iterdir())) > 5
    assert {outcome["outcome"] for outcome in outcomes.values()} <= {"refused", "valid"}, outcomes


def test_large_files_take_at_most_twice_their_size_whether_valid_or_not(tmp_path: Path) -> None:
    expected = {}
    for name, (outcome, payload) in large_files().items():
        (tmp_path / f"{name}.safetensors").write_bytes(payload())
        expected[f"{name}.safetensors"] = outcome
    outcomes = replayed(tmp_path)
    assert {name: outcome["outcome"] for name, outcome in outcomes.items()} == expected, outcomes
    for name, outcome in outcomes.items():
        assert outcome["size"] > 10e6, name
        assert outcome["peak"] <= 2 * outcome["size"] + ROUNDING, outcome
    assert outcomes["bf16.safetensors"]["peak"] > outcomes["bf16.safetensors"]["size"] / 2


def large_files() -> dict[str, tuple[str, Callable[[], bytes]]]:
    """Return files of tens of megabytes by name: what becomes of them, and how they are made."""
    fp32 = draft({"huge": 0.2}, "F32", seed=0)
    bf16 = draft({"huge": 0.25}, "BF16", seed=0)
    several = draft({"huge": 0.1, "large": 0.5, "down": 0.2}, "F32", seed=0)
    return {
        "fp32": ("valid", lambda: written(fp32)),
        "bf16": ("valid", lambda: written(bf16)),
        "several": ("valid", lambda: written(several)),
        "last-value": ("refused", lambda: spoilt(fp32, "huge.values", -1, np.nan)),
        "last-column": ("refused", lambda: spoilt(bf16, "huge.columns", -1, 4096)),
        "last-row-start": ("refused", lambda: spoilt(fp32, "huge.row_starts", -2, 2**31 - 1)),
        "half": ("refused", lambda: (whole := written(fp32))[: len(whole) // 2]),
        "long-header": ("refused", lambda: (90_000_000).to_bytes(8, "little") + b"{" * 20_000_000),
        "huge-shape": ("refused", lambda: claiming(bf16, [1 << 20, 1 << 31, 1 << 40])),
        "description": ("refused", lambda: described(bf16, "x" * 20_000_000)),
        "wide-description": ("valid", lambda: described(fp32, "𝄞" + "x" * 1_700_000)),
        "lists": ("refused", lambda: padded('["𝄞",' + "[]," * 600_000 + "0]")),
        "objects": ("refused", lambda: padded('["𝄞",' + '{"a":-9,"":-9}  ,' * 120_000 + "0]")),
        "numbers": ("refused", lambda: padded('["𝄞",' + "-9," * 600_000 + "0]")),
        "names": ("refused", lambda: padded("0," + ",".join(f'"{i}":0' for i in range(180_000)))),
        "arrays": ("refused", lambda: padded("0," + ",".join(map(array_entry, range(35_000))))),
    }


def written(made: Draft) -> bytes:
    return encoded(made, entries_of(made))


def spoilt(made: Draft, name: str, at: int, number: float) -> bytes:
    changed = made.copied()
    changed.arrays[name][at] = number
    return written(changed)


def claiming(made: Draft, shape: list[int]) -> bytes:
    changed = made.copied()
    changed.modules["huge"] = shape
    entries = [
        (k, v.replace(str(made.modules["huge"][2]), str(1 << 40))) for k, v in entries_of(changed)
    ]
    return encoded(changed, entries)


def described(made: Draft, text: str) -> bytes:
    changed = made.copied()
    changed.metadata["description"] = text
    return written(changed)


def padded(value: str) -> bytes:
    """Return a header with a value before just as many bytes as it takes to be read at all."""
    header = f'{{"a":{value}}}'.encode()
    return with_header(header, bytes((HEADERS_IN_A_FILE - 1) * len(header)))


def array_entry(number: int) -> str:
    return f'"{number}.values":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'


def replayed(directory: Path) -> dict[str, dict[str, Any]]:
    """Read a directory's files, and return what became of them by name."""
    done = fuzz("--replay", str(directory))
    assert done.returncode in (0, 1), done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines[:-1]}


def fuzz(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, FUZZ, *arguments], capture_output=True, text=True, timeout=500
    )
