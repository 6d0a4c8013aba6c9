"""Measure what `spieldose repair` gives back: held-out losses in 16 bit, in NF4, and mended.

`python benchmarks/repair.py --data DIR`, with DIR as for quality.py; 5 minutes on 2 cores. Deltas
are made from a task's training examples and judged on the held-out ones of both tasks. Every figure
is a line of --out. Prints the table of the README.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from demo_base import demo_base
from quality import BASES, CPU, TASKS, Task, base_loss, held_out_loss, write_data
from spieldose_kernels.base import load_base, pick_compute_dtype
from spieldose_kernels.delta import Adapter
from spieldose_kernels.quiet import quiet_libraries
from spieldose_trainer.data import read_examples
from spieldose_trainer.model import SparseModel
from spieldose_trainer.repair.config import RepairConfig
from spieldose_trainer.repair.repair import repair

DENSITIES = (0.002, 0.01, 0.03)
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arguments:
    """Measure what a repair gives back."""

    data: Path  # directory of banking77_*.csv and gsm8k_*.jsonl
    out: Path = Path("build/repair.jsonl")  # gets the figures


def main() -> None:
    """Measure both tasks and print the table."""
    arguments = tyro.cli(Arguments)
    quiet_libraries()
    base = demo_base()
    files = {task.name: write_data(task, arguments.data) for task in TASKS}
    results: list[Result] = [
        {
            "task": task.name,
            "side": side,
            "loss": base_loss(base, task, files[task.name], quantised=q),
        }
        for task in TASKS
        for side, q in BASES.items()
    ]
    for seen in TASKS:
        for density in DENSITIES:
            out = arguments.out.with_name(f"repair-{seen.name}-{density}.safetensors")
            config = RepairConfig(base=base, data=files[seen.name][0], out=out, density=density)
            adapter = repair(config).adapter
            results += [
                {"task": task.name, "side": f"{density} {seen.name}", "loss": loss}
                for task, loss in losses(base, adapter, files)
            ]
    arguments.out.write_text("".join(json.dumps(result) + "\n" for result in results))
    print(markdown(results))


def losses(
    base: str, adapter: Adapter, files: dict[str, tuple[Path, Path]]
) -> list[tuple[Task, float]]:
    """Return each task's held-out loss of the base with an adapter."""
    dtype = pick_compute_dtype("auto", CPU)
    loaded = load_base(base, device=CPU, compute_dtype=dtype, fused=False)
    model, tokenizer = SparseModel.of(loaded, adapter).model, loaded.tokenizer
    found = []
    for task in TASKS:
        held_out = read_examples(
            files[task.name][1], tokenizer, max_length=task.max_length, too_long="truncate"
        )
        found.append((task, held_out_loss(model, tokenizer, held_out)))
    return found


def markdown(results: list[Result]) -> str:
    """Return a line for every side, with each task's loss and how far it is above 16 bit."""
    loss = {(r["task"], r["side"]): r["loss"] for r in results}
    names = [task.name for task in TASKS]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for side in dict.fromkeys(r["side"] for r in results):
        cells = [
            f"{loss[name, side]:.3f} ({loss[name, side] / loss[name, 'base, 16 bit'] - 1:+.1%})"
            for name in names
        ]
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
