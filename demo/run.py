"""The main job, end to end: train adapters, serve all from one 4-bit base, drop one in meanwhile.

Prints a table, then one JSON object on the last line. Exits non-zero if an adapter does not beat
the base.
"""

import argparse
import itertools
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fetch_base import fetch
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client
from tasks import TASKS, Task, split, write_examples

WORK = Path("build/demo")
COMMAND = Path(sys.executable).with_name("spieldose")
BATCH = 8  # training examples per update
HELD_OUT = 50  # items per task
SHOWN = 2  # of them in the table
CONCURRENT = 16  # requests at once
SAMPLING = pb.SamplingParams(max_tokens=48)

console = Console(width=120, markup=False, highlight=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out item, answered by the base or by its task's adapter."""

    task: Task
    prompt: str
    expected: str
    adapter: str  # empty for the base
    said: str

    @property
    def exact(self) -> bool:
        """Say whether the answer is the expected one."""
        return self.said == self.expected.strip()


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="any other model: a directory or a hub name")
    base = parser.parse_args().base or str(fetch())
    started = time.perf_counter()
    shutil.rmtree(WORK, ignore_errors=True)
    served = WORK / "adapters"
    served.mkdir(parents=True)
    *first, late = TASKS
    for task in first:
        train(base, task, served / f"{task.name}.safetensors")
    waiting = WORK / f"{late.name}.safetensors"
    train(base, late, waiting)
    with server(base, served) as client:
        answers, seconds, rate = play(client, waiting, served)
        steps = client.model().engine
        console.print(compare(client))
    scores = exact_match(answers)
    show(scores, rate=rate, seconds=seconds)
    print(
        json.dumps(
            {
                "exact_match": scores,
                "held_out_items_per_task": HELD_OUT,
                "mixed_batch_max_adapters": steps.max_adapters_in_step,
                "mixed_batch_max_requests": steps.max_requests_in_step,
                "delta_file_megabytes": round(waiting.stat().st_size / 1e6, 1),
                "hot_load_seconds": round(seconds, 3),
                "tokens_per_second": round(rate, 1),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    )
    if behind := not_better(scores):
        sys.exit(f"demo: expected every adapter to beat the base, got {', '.join(behind)} not")


def train(base: str, task: Task, out: Path) -> None:
    """Train one adapter with the command line a user would use."""
    examples, _ = split(task, train=BATCH * task.updates, held_out=HELD_OUT)
    data = WORK / f"{task.name}.jsonl"
    write_examples(data, examples)
    console.rule(f"training {task.name}: {task.description}")
    command = [COMMAND, "train", "--base", base, "--data", data, "--method", "spiel-ag"]
    command += ["--density", "0.01", "--learning-rate", "2e-3", "--batch-size", str(BATCH)]
    command += ["--description", task.description, "--out", out]
    subprocess.run(command, check=True)


@contextmanager
def server(base: str, adapters: Path) -> Iterator[Client]:
    """Run the server as a process of its own, and stop it by SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    console.rule(f"serving on {address}")
    command = [COMMAND, "serve", "--base", base, "--adapters", adapters, "--listen", address]
    log = WORK / "server.log"
    with open(log, "wb") as file, subprocess.Popen(command, stderr=file) as process:
        try:
            with Client(address) as client:
                client.wait(120)
                yield client
        except BaseException:
            sys.stderr.write(log.read_text())
            raise
        finally:
            process.terminate()
    if process.returncode != 0:
        sys.exit(f"demo: expected the server to drain and exit 0, got {process.returncode}: {log}")


def play(client: Client, waiting: Path, served: Path) -> tuple[list[Answer], float, float]:
    """Ask base and adapters about every held-out item at once; halfway, drop in the last adapter.

    Returns the answers, the seconds from copying the file to the new adapter's first answer, and
    generated tokens per second.
    """
    late = waiting.stem
    jobs = [
        (task, prompt, expected, adapter)
        for task in TASKS
        for prompt, expected in split(task, train=0, held_out=HELD_OUT)[1]
        for adapter in ("", task.name)
    ]
    random.Random(0).shuffle(jobs)
    jobs.sort(key=lambda job: job[3] == late)  # what needs the late adapter comes last
    dropped = threading.Event()

    def ask(job: tuple[Task, str, str, str]) -> Answer:
        task, prompt, expected, adapter = job
        if adapter == late:
            dropped.wait()
        said = first_line(client.stream(prompt, adapter=adapter, sampling=SAMPLING))
        return Answer(task, prompt, expected, adapter, said)

    def drop() -> float:
        try:
            return hot_load(client, waiting, served)
        finally:
            dropped.set()

    half = len(jobs) // 2
    started = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENT) as pool:
        asked = [pool.submit(ask, job) for job in jobs[:half]]
        asked[half // 2].result()
        dropping = pool.submit(drop)
        asked += [pool.submit(ask, job) for job in jobs[half:]]
        answers = [future.result() for future in asked]
    tokens = client.model().engine.generated_tokens
    return answers, dropping.result(), tokens / (time.perf_counter() - started)


def first_line(pieces: Iterator[str]) -> str:
    """Return the first line with anything in it; leaving the stream there cancels the request."""
    text = ""
    for piece in pieces:
        text += piece
        if "\n" in text.lstrip():
            break
    return text.strip().partition("\n")[0]


def hot_load(client: Client, file: Path, served: Path) -> float:
    """Copy a delta file to the running server; return the seconds until it has answered."""
    begun = time.perf_counter()
    shutil.copy(file, served)
    while not any(adapter.name == file.stem for adapter in client.adapters()):
        time.sleep(0.02)
    while (adapter := client.adapter(file.stem)).state == pb.ADAPTER_STATE_VALIDATING:
        time.sleep(0.02)
    if adapter.state == pb.ADAPTER_STATE_REJECTED:
        raise RuntimeError(f"expected {file.stem} to be taken up, got: {adapter.reason}")
    client.generate("Hello", adapter=file.stem, sampling=pb.SamplingParams(max_tokens=1))
    return time.perf_counter() - begun


def compare(client: Client) -> Table:
    """Ask the base and every adapter about a few held-out prompts, all at once."""
    prompts = [
        prompt for task in TASKS for prompt, _ in split(task, train=0, held_out=HELD_OUT)[1][:SHOWN]
    ]
    players = ("", *(task.name for task in TASKS))

    def ask(job: tuple[str, str]) -> str:
        prompt, adapter = job
        return first_line(client.stream(prompt, adapter=adapter, sampling=SAMPLING))

    with ThreadPoolExecutor(CONCURRENT) as pool:
        said = pool.map(ask, itertools.product(prompts, players))
        table = Table(title="one 4-bit base, one batch, a different adapter for every request")
        for heading in ("prompt", "the base says", *(f"{name} says" for name in players[1:])):
            table.add_column(heading, overflow="fold")
        for number, prompt in enumerate(prompts, start=1):
            answers = [next(said) for _ in players]
            table.add_row(prompt, *answers, end_section=number % SHOWN == 0)
    return table


def show(scores: dict[str, dict[str, float]], *, rate: float, seconds: float) -> None:
    """Print how often base and adapters were right, and how fast it went."""
    table = Table(title=f"exact match on {HELD_OUT} held-out items", min_width=44)
    for heading in ("task", "base", "adapter"):
        table.add_column(heading)
    for name, score in scores.items():
        table.add_row(name, f"{score['base']:.0%}", f"{score['adapter']:.0%}")
    console.print(table)
    console.print(f"{rate:.0f} tokens per second, {CONCURRENT} requests at a time")
    console.print(f"{seconds:.2f} s from dropping in {TASKS[-1].name} to its first answer")


def exact_match(answers: list[Answer]) -> dict[str, dict[str, float]]:
    """Return the share of exact answers by task, of base and adapter."""
    scores = {}
    for task in TASKS:
        mine = [answer for answer in answers if answer.task is task]
        played = {
            "base": [answer.exact for answer in mine if not answer.adapter],
            "adapter": [answer.exact for answer in mine if answer.adapter],
        }
        scores[task.name] = {who: sum(exact) / len(exact) for who, exact in played.items()}
    return scores


def not_better(scores: dict[str, dict[str, float]]) -> list[str]:
    """Return the tasks whose adapter does not beat the base."""
    return [name for name, score in scores.items() if score["adapter"] <= score["base"]]


if __name__ == "__main__":
    main()
