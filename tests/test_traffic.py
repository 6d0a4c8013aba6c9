"""The load benchmark counts what happened, at its smallest size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from .tiny_base import save_tiny_base

TRAFFIC = Path(__file__).parents[1] / "benchmarks" / "traffic.py"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return the tiny base with as many tokens as the benchmark's random prompts draw from."""
    save_tiny_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(40_000)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_adapters_are_evicted_where_too_many_are_active_and_everyone_is_answered(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "traffic.jsonl"
    command = [sys.executable, TRAFFIC, "--parts", "thrash", "--rounds", "1", "--seconds", "0.5"]
    done = subprocess.run(
        [*command, "--base", str(base), "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [result] = map(json.loads, out.read_text().splitlines())
    figures = result["figures"]
    for kind, clients in (("8 alone", 8), ("8", 16), ("16", 16)):
        assert all(answers >= clients for answers in figures[f"answers {kind}"])
    assert figures["evictions 8 alone"] == [0, 0]
    assert min(figures["evictions 16"]) >= 8  # as many as have no room
