"""A server under everything at once mixes nothing up and loses nothing."""

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


def test_canaries_say_their_own_marker_while_everything_happens_to_them() -> None:
    done = subprocess.run(
        [sys.executable, SOAK, "--seconds", "60"], capture_output=True, text=True, timeout=300
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["foreign_tokens"], result["lost"], result["hung"]) == (0, 0, 0), done.stdout
    assert result["requests"] > 100 and result["cancelled"] > 0
    assert all(result[what] > 0 for what in ("replace", "remove", "unload", "spoil"))
    assert result["memory_growth"] <= 0.02
    assert done.returncode == 0
