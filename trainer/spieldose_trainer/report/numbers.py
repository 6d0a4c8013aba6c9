"""The report as plain data, for programs: what `report.json` holds."""

import dataclasses
import importlib.metadata
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from spieldose_trainer.report.command import command
from spieldose_trainer.report.magnitudes import Magnitudes
from spieldose_trainer.report.summary import ModuleSummary, Summary


def as_json(summary: Summary) -> dict[str, Any]:
    """Return the summary as plain data, numbers that are not finite as None.

    - format, format_version: "spieldose.report", 1
    - versions: of python, torch, transformers and spieldose; hardware: processor, threads, gpu
    - adapter: base_model, base_fingerprint, method, density, description, entries
    - settings: of the run, as text; processes: that shared its batches; command: makes it again
    - time: seconds, tokens, tokens_per_second, updates; see `Summary.seconds` for what counts
    - log: updates, reselections, evaluations, each with one list per field (`RunLog.state_dict`)
    - ages: [share of the final support that joined at reselection 0, 1, …], 0 the first support;
      null if the support never changed
    - modules: by name: kind, block (null outside the decoder), shape [R, C], entries, density, norm
    - magnitudes: `all` and by kind: log10_edges [n + 1], counts [n] of |δ|, zeros
    - memory: entries, then bytes: value, position, gradient, moments, total, peak;
      paper: bytes per active value (total, moments), or null
    """
    adapter, memory = summary.adapter, summary.memory
    info = dataclasses.asdict(adapter.info)
    del info["settings"]  # the run's own are above them
    return _finite(
        {
            "format": "spieldose.report",
            "format_version": 1,
            "versions": versions(),
            "hardware": hardware(),
            "adapter": info | {"entries": adapter.nnz},
            "settings": dict(summary.settings),
            "processes": summary.processes,
            "command": command(summary.settings, processes=summary.processes),
            "time": {
                "seconds": summary.seconds,
                "tokens": summary.tokens,
                "tokens_per_second": summary.tokens / summary.seconds if summary.seconds else None,
                "updates": len(summary.log.updates),
            },
            "log": summary.log.state_dict(),
            "ages": summary.ages,
            "modules": {name: _module(module) for name, module in summary.modules.items()},
            "magnitudes": {
                "all": _magnitudes(summary.all_magnitudes),
                "by_kind": {kind: _magnitudes(m) for kind, m in summary.magnitudes.items()},
            },
            "memory": dataclasses.asdict(memory) | {"total": memory.total},
        }
    )


def versions() -> dict[str, str]:
    """Return the versions that decide what a run does."""
    return {
        "spieldose": importlib.metadata.version("spieldose"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def hardware() -> dict[str, str | int | None]:
    """Return what the run ran on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _module(module: ModuleSummary) -> dict[str, Any]:
    height, width = module.shape
    return {
        "kind": module.place.kind,
        "block": module.place.block,
        "shape": [height, width],
        "entries": module.entries,
        "density": module.entries / (height * width),
        "norm": module.norm,
    }


def _magnitudes(magnitudes: Magnitudes) -> dict[str, Any]:
    edges, counts = magnitudes.occupied()
    return {"log10_edges": edges, "counts": counts, "zeros": magnitudes.zeros}


def _finite(data: dict[str, Any]) -> dict[str, Any]:
    """Replace numbers that JSON has no name for."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return _finite(value)
        if isinstance(value, list):
            return [finite(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: finite(value) for key, value in data.items()}
