"""Measure what every method learns, against PEFT's LoRA and SHiRA, and what a step costs.

`python benchmarks/quality.py --data DIR` with banking77's and GSM8K's files. Every run trains the
demo's base for the same number of updates on the same batches with as many parameters. A method's
learning rate is the best of three on seed 0; three seeds follow at that rate. Each finished run is
a line of --out, so that a broken-off benchmark goes on where it was. Two methods run at a time,
each on one thread: losses only, times are for --speed. Prints the figures of the README's table.

DIR holds banking77_train.csv and banking77_test.csv (columns text and category; from
github.com/PolyAI-LDN/task-specific-datasets) and gsm8k_train.jsonl and gsm8k_test.jsonl (question
and answer; from github.com/openai/grade-school-math).
"""

import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from peft import LoraConfig, ShiraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainerCallback, TrainingArguments

from demo_base import demo_base
from spieldose_kernels.base import load_base, pick_compute_dtype
from spieldose_kernels.quiet import quiet_libraries
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.data import collate, read_examples
from spieldose_trainer.errors import NonFiniteLoss
from spieldose_trainer.evaluation import evaluate
from spieldose_trainer.repair.config import RepairConfig
from spieldose_trainer.repair.repair import repair
from spieldose_trainer.trainer import Trainer as SparseTrainer

WORK = Path("build/quality")
CPU = torch.device("cpu")
SEEDS = (0, 1, 2)
PER_RANK = 305_280 / 106_168_320  # of SmolLM2-135M's linear weights: Σ (R + C) over Σ R·C

# SpIEL's phases are laid out for thousands of updates: here they are shorter
SHORT = {"reselect_every": 5, "selection_steps": 1, "initial_rate": 0.6}
SPREAD = {
    "method": "spiel-ag",
    "growth": "correlation",
    "first_rate": 0.05,
    "initial_rate": 0.05,
    "reselect_every": 10,
    "seed_momentum": False,
}
RATES = (2e-3, 6e-3, 2e-2)  # of Adam on weights chosen by gradients or magnitude
HIGHER = (6e-3, 2e-2, 6e-2)  # what random weights bear, and SM3, whose steps only shrink

Trained = tuple[dict[str, Any], tuple[float, float, float]]  # and the learning rates to choose from

METHODS: dict[str, Trained] = {
    "spiel-ag": (SPREAD, HIGHER),
    "spiel-ag, 16 bit": (SPREAD | {"quantised": False}, HIGHER),
    "LoRA (PEFT)": ({"peft": "lora"}, (3e-3, 1e-2, 3e-2)),
    "SHiRA random, 16 bit (PEFT)": ({"peft": "shira"}, HIGHER),
    "spiel-ma": ({"method": "spiel-ma"} | SHORT, HIGHER),
    "random": ({"method": "random"}, HIGHER),
    "fisher": ({"method": "fisher"}, RATES),
    "sgc": ({"method": "sgc"}, (3e-5, 1e-4, 3e-4)),
    "zo, 0.1 %": ({"method": "zo", "density": 0.001}, (1e-4, 3e-4, 1e-3)),
}

VARIANTS: dict[str, Trained] = {  # for --only: with them it would be more than 2 hours
    "magnitude": ({"method": "magnitude"}, RATES),
    "row-topk": ({"method": "row-topk"}, RATES),
    "lift": ({"method": "lift", "reselect_every": 20}, RATES),
    "spiel-ag, by gradient": ({"method": "spiel-ag", "seed_momentum": False} | SHORT, RATES),
    "spiel-ag, default settings": ({"method": "spiel-ag"}, (6e-4, 2e-3, 6e-3)),
    "spiel-ag, over a repair": (SPREAD | {"repaired": 0.002}, HIGHER),  # its density
    "spiel-ag, over a repair of 3 %": (SPREAD | {"repaired": 0.03}, HIGHER),
}

BASES = {"base": True, "base, 16 bit": False}  # whether quantised


@dataclass(frozen=True, slots=True)
class Task:
    """A data set, cut to what fits the time."""

    name: str
    updates: int
    batch_size: int
    held_out: int  # examples
    characters: int  # of the longest example
    max_length: int = 384
    rank: int = 11  # LoRA's and SHiRA's; the others have as many parameters


TASKS = (
    Task("banking77", updates=40, batch_size=16, held_out=200, characters=44),
    Task("gsm8k", updates=16, batch_size=4, held_out=60, characters=400),
)
WARMUP = 0.1  # share of the updates


@dataclass(frozen=True, slots=True)
class Run:
    """One training run."""

    task: str
    method: str
    learning_rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class Arguments:
    """Measure what every method learns, against PEFT's LoRA and SHiRA."""

    data: Path | None = None  # directory of banking77_*.csv and gsm8k_*.jsonl
    out: Path = Path("build/quality.jsonl")  # gets every run's result; those in it are not repeated
    minutes: float = 120.0  # after which no further run is begun
    only: tuple[str, ...] = ()  # methods or variants; none: all methods
    speed: bool = False  # measure step times and peak memory instead, up to 23 minutes
    table: bool = False  # print the table of the results there are
    side: str = ""  # one side's steps, in a process of its own; used by --speed
    cell: str = ""  # TASK/METHOD, all its runs, in a process of its own; used by the benchmark


def main() -> None:
    """Run what is missing, then print the table."""
    arguments = tyro.cli(Arguments)
    quiet_libraries()
    base = demo_base()
    results = Results(arguments.out)
    if arguments.table:
        print(markdown(results.runs()))
    elif arguments.data is None:
        sys.exit("quality: expected --data DIR with banking77_*.csv and gsm8k_*.jsonl, got none")
    elif arguments.side:
        print(json.dumps(steps_of(arguments.side, base, arguments.data)))
    elif arguments.cell:
        fill(arguments.cell, base, arguments, results)
    elif arguments.speed:
        speed(arguments.data, results)
    else:
        measure(base, arguments, results)
        print(markdown(results.runs()))


def measure(base: str, arguments: Arguments, results: "Results") -> None:
    """Make every run that has no result yet, two methods at a time, until time is up."""
    assert arguments.data is not None
    begun, before = time.monotonic(), len(results.runs())
    end = begun + 60 * arguments.minutes
    for task in TASKS:
        data = write_data(task, arguments.data)
        done = {(r["task"], r["method"]) for r in results.runs()}
        for method, quantised in BASES.items():
            if (task.name, method) not in done:
                loss = base_loss(base, task, data, quantised=quantised)
                results.append({"task": task.name, "method": method, "loss": loss})

    def run(cell: str) -> None:
        left = (end - time.monotonic()) / 60
        if left > 0 and next_run(cell, results) is not None:
            command = [sys.executable, __file__, "--cell", cell, "--minutes", str(left)]
            command += ["--data", str(arguments.data), "--out", str(arguments.out)]
            one_thread = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
            subprocess.run(command, check=True, env=os.environ | one_thread)

    cells = [f"{task.name}/{name}" for task in TASKS for name in arguments.only or METHODS]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, cells))
    minutes = round((time.monotonic() - begun) / 60, 1)
    results.append({"results": len(results.runs()) - before, "minutes": minutes})


def fill(cell: str, base: str, arguments: Arguments, results: "Results") -> None:
    """Make all runs of one method on one task, the learning rates first."""
    end = time.monotonic() + 60 * arguments.minutes
    task = next(task for task in TASKS if task.name == cell.partition("/")[0])
    folder = WORK / cell.replace("/", "-").replace(" ", "-")
    while time.monotonic() < end and (run := next_run(cell, results)) is not None:
        begun = time.perf_counter()
        try:
            result = train(run, task, base, files_of(task), folder)
        except NonFiniteLoss:
            result = {"loss": math.inf}
        if math.isnan(result["loss"]):
            result["loss"] = math.inf  # a rate that diverges is never the best
        results.append(asdict(run) | result | {"seconds": round(time.perf_counter() - begun, 1)})
        print(run, round(result["loss"], 4), flush=True)


def next_run(cell: str, results: "Results") -> Run | None:
    """Return the first run of a method that is missing."""
    task, _, method = cell.partition("/")
    done = [r for r in results.runs() if (r["task"], r["method"]) == (task, method)]
    for rate in (METHODS | VARIANTS)[method][1]:
        if not any((r["learning_rate"], r["seed"]) == (rate, 0) for r in done):
            return Run(task, method, rate, 0)
    best = min((r for r in done if r["seed"] == 0), key=lambda r: r["loss"])["learning_rate"]
    for seed in SEEDS:
        if not any((r["learning_rate"], r["seed"]) == (best, seed) for r in done):
            return Run(task, method, best, seed)
    return None


def train(run: Run, task: Task, base: str, data: tuple[Path, Path], folder: Path) -> dict[str, Any]:
    """Make one run; return its held-out loss, and what else is worth keeping."""
    shutil.rmtree(folder, ignore_errors=True)
    settings, _ = (METHODS | VARIANTS)[run.method]
    if "peft" in settings:
        return train_peft(settings["peft"], run, task, base, data, folder)
    settings = {"density": task.rank * PER_RANK} | settings
    if density := settings.pop("repaired", None):  # besides the trained weights
        settings["over"] = repaired(base, data[0], density)
    config = TrainConfig(
        **settings,
        base=base,
        data=data[0],
        out=folder / "delta.safetensors",
        max_steps=task.updates,
        batch_size=task.batch_size,
        max_length=task.max_length,
        too_long="truncate",
        learning_rate=run.learning_rate,
        warmup=WARMUP,
        seed=run.seed,
    )
    trainer = SparseTrainer(config)
    log = trainer.train().log
    read = partial(read_examples, data[1], max_length=task.max_length, too_long=config.too_long)
    return {
        "loss": held_out_loss(
            trainer.base.model, trainer.base.tokenizer, read(trainer.base.tokenizer)
        ),
        "train_losses": [round(update.loss, 4) for update in log.updates],
        "step": statistics.median(update.seconds for update in log.updates),
        "parameters": sum(layer.values.numel() for layer in trainer.model.layers.values()),
    }


def repaired(base: str, data: Path, density: float) -> Path:
    """Return a delta file that mends the base on a task's training examples; made once."""
    out = data.with_name(f"{data.stem}-repair-{density}.safetensors")
    if not out.exists():
        repair(RepairConfig(base=base, data=data, out=out, density=density))
    return out


class Steps(TrainerCallback):
    """Keep every update's loss and time."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(round(logs["loss"], 4))
            self.seconds.append(time.perf_counter() - self._begun)


def train_peft(
    kind: str, run: Run, task: Task, base: str, data: tuple[Path, Path], folder: Path
) -> dict[str, Any]:
    """Train PEFT's LoRA or SHiRA with its Trainer's AdamW, on the same batches."""
    dtype = pick_compute_dtype("auto", CPU)
    loaded = load_base(base, device=CPU, compute_dtype=dtype, fused=False, quantised=kind == "lora")
    torch.manual_seed(run.seed)
    configs = {
        "lora": LoraConfig(r=task.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        "shira": ShiraConfig(
            r=task.rank,
            random_seed=run.seed,
            target_modules=list({name.rpartition(".")[2] for name in loaded.layers}),
            task_type="CAUSAL_LM",
        ),
    }
    model = get_peft_model(loaded.model, configs[kind])
    pad, steps = loaded.tokenizer.eos_token_id, Steps()
    read = partial(
        read_examples,
        tokenizer=loaded.tokenizer,
        max_length=task.max_length,
        too_long="truncate",
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=task.updates,
            warmup_steps=math.ceil(WARMUP * task.updates),
            per_device_train_batch_size=task.batch_size,
            learning_rate=run.learning_rate,
            weight_decay=0.0,
            max_grad_norm=0.0,
            logging_steps=1,
            seed=run.seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=list(read(data[0])),
        data_collator=partial(collate, pad=pad),
        callbacks=[steps],
    )
    trainer.train()
    return {
        "loss": held_out_loss(model, loaded.tokenizer, read(data[1])),
        "train_losses": steps.losses,
        "step": statistics.median(steps.seconds),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def base_loss(base: str, task: Task, data: tuple[Path, Path], *, quantised: bool) -> float:
    """Return the held-out loss before any training."""
    dtype = pick_compute_dtype("auto", CPU)
    loaded = load_base(base, device=CPU, compute_dtype=dtype, fused=False, quantised=quantised)
    examples = read_examples(
        data[1], loaded.tokenizer, max_length=task.max_length, too_long="truncate"
    )
    return held_out_loss(loaded.model, loaded.tokenizer, examples)


def held_out_loss(model: Any, tokenizer: Any, examples: Sequence[Any]) -> float:
    """Return the mean loss over the completions' tokens."""
    pad = tokenizer.eos_token_id
    found = evaluate(model, examples, tokenizer=tokenizer, pad=pad, batch_size=8, exact_match=False)
    return found.loss


# --- step time and memory ----------------------------------------------------------------------


def speed(data: Path, results: "Results") -> None:
    """Time steps and peak memory of LoRA and the sparse methods, each in its own process."""
    sides = ("LoRA (PEFT)", "spiel-ag", "spiel-ma", "sgc", "zo, 0.1 %")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(3):
        for side in sides:
            command = [sys.executable, __file__, "--data", str(data), "--side", side]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    table = Table("method", "seconds a step", "x LoRA", "peak MB", "x LoRA")
    lora = found["LoRA (PEFT)"]
    for side in sides:
        ratios = [
            statistics.median(a[key] / b[key] for a, b in zip(found[side], lora, strict=True))
            for key in ("step", "peak")
        ]
        step, peak = (statistics.median(r[key] for r in found[side]) for key in ("step", "peak"))
        table.add_row(side, f"{step:.2f}", f"{ratios[0]:.2f}", f"{peak:.0f}", f"{ratios[1]:.2f}")
        results.append({"speed": side, "rounds": found[side], "step_x_lora": ratios[0]})
    Console(width=100).print(table)


def steps_of(side: str, base: str, source: Path) -> dict[str, float]:
    """Make some steps of one side; return their median time and the process's peak memory."""
    import resource

    task = Task(
        "speed", updates=26, batch_size=8, held_out=8, characters=999, max_length=128, rank=3
    )
    data, run = write_data(task, source), Run(task.name, side, METHODS[side][1][0], 0)
    result = train(run, task, base, data, WORK / "speed")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {"step": result["step"], "peak": peak}


# --- data and results ----------------------------------------------------------------------------


def write_data(task: Task, source: Path) -> tuple[Path, Path]:
    """Write a task's training and held-out examples; return the two files."""
    WORK.mkdir(parents=True, exist_ok=True)
    files = files_of(task)
    pairs = gsm8k if task.name == "gsm8k" else banking77
    wanted = task.updates * task.batch_size * len(SEEDS), task.held_out
    for file, part, count in zip(files, ("train", "test"), wanted, strict=True):
        everything = [(p, c) for p, c, size in pairs(source, part) if size <= task.characters]
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
        lines = [everything[i] for i in order[:count].tolist()]
        file.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in lines))
    return files


def files_of(task: Task) -> tuple[Path, Path]:
    """Return where a task's training and held-out examples lie."""
    return WORK / f"{task.name}.jsonl", WORK / f"{task.name}-held-out.jsonl"


def banking77(source: Path, part: str) -> Iterator[tuple[str, str, int]]:
    """Yield prompts, intents as text, and the queries' characters."""
    with open(source / f"banking77_{part}.csv", newline="") as file:
        for row in csv.DictReader(file):
            intent = row["category"].replace("_", " ")
            yield f"Query: {row['text']}\nIntent:", f" {intent}", len(row["text"])


def gsm8k(source: Path, part: str) -> Iterator[tuple[str, str, int]]:
    """Yield prompts, worked answers, and the characters of both question and answer."""
    for line in (source / f"gsm8k_{part}.jsonl").read_text().splitlines():
        record = json.loads(line)
        question, answer = record["question"], record["answer"]
        yield f"Question: {question}\nAnswer:", f" {answer}", len(question) + len(answer)


class Results:
    """Keep results in a file, a line each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def append(self, result: dict[str, Any]) -> None:
        """Add one result."""
        with open(self._path, "a") as file:
            file.write(json.dumps(result) + "\n")

    def runs(self) -> list[dict[str, Any]]:
        """Return the results of all finished runs."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return [result for result in map(json.loads, lines) if "task" in result]


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the table: held-out loss by method and task, mean and spread over the seeds."""
    names = [task.name for task in TASKS]
    lines = ["| held-out loss | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method in (*BASES, *METHODS, *VARIANTS):
        cells = [
            cell([r for r in results if (r["task"], r["method"]) == (n, method)]) for n in names
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(done: list[dict[str, Any]]) -> str:
    """Return mean and spread over the seeds of the best learning rate."""
    if not done or "seed" not in done[0]:
        return f"{done[0]['loss']:.3f}" if done else ""
    best = min((r for r in done if r["seed"] == 0), key=lambda r: r["loss"])["learning_rate"]
    losses = [r["loss"] for r in done if r["learning_rate"] == best]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{spread} (lr {best:g}, {len(losses)} seeds)"


if __name__ == "__main__":
    main()
