"""Write the report of a run."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from spieldose_kernels.delta import Adapter
from spieldose_trainer.memory import MemoryTable
from spieldose_trainer.report.numbers import as_json
from spieldose_trainer.report.page import page
from spieldose_trainer.report.summary import summarise
from spieldose_trainer.run_log import RunLog


def write_report(
    folder: Path,
    *,
    adapter: Adapter,
    log: RunLog,
    born: Mapping[str, torch.Tensor],
    settings: Mapping[str, str],
    processes: int,
    memory: MemoryTable,
) -> None:
    """Write `report.json` and `report.html`, each whole or not at all.

    `born` is [Z] int16 by module, aligned with the adapter's entries: the number of the reselection
    at which each joined, 0 for the first support. `settings` are the fields of a TrainConfig as
    text. The keys of `report.json`: `numbers.as_json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarise(
        adapter, log, born=born, settings=settings, processes=processes, memory=memory
    )
    text = json.dumps(as_json(summary), allow_nan=False, ensure_ascii=False, indent=1)
    _write(folder / "report.json", text + "\n")
    _write(folder / "report.html", page(summary))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
