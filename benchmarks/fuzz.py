"""Read mutated delta files: every one is refused with a reason or valid, and takes little memory.

`make fuzz COUNT=100000`. Each file is read as the server does, header first and then all of it into
the device's form, and as the trainer does. What is accepted is compared with what the safetensors
library reads, and held against the format's description. The work is done in a process of its own,
whose death or silence is a finding. Inputs that fail are kept in `tests/seeds`, where the tests
read them again. The last line printed is a JSON object; the exit status says whether all was well.
"""

import hashlib
import json
import math
import os
import re
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
import tyro

from mutants import BASE, drafts, encoded, entries_of, large_drafts, mutant
from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import SUFFIX, read_delta
from spieldose_kernels.errors import MAX_BYTES, DeltaError
from spieldose_kernels.sliced import view
from spieldose_server.files import AdapterFiles, Content
from spieldose_server.stamp import Stamp

KEPT = Path(__file__).parents[1] / "tests" / "seeds"
HUNG_SECONDS = 60.0  # the first file waits for imports and compilation, 9 seconds
# Beside twice the file: what a header under 24 KiB may take as JSON (0.9 MB if made for it), a
# piece, and what allocators round up to. 100,000 mutants needed 0.21 MB of it.
CONSTANT_BYTES = 1 << 20
LARGE_BYTES = 1 << 20  # from here on the constant is not what is measured
DTYPES = (torch.float32, torch.bfloat16)
# freed memory goes back at once, so that a file's peak hides in no earlier one's
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}

T = TypeVar("T")
Outcome = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arguments:
    """Read mutated delta files, or those of a directory."""

    count: int = 100_000
    first: int = 0  # seed
    replay: Path | None = None  # a directory whose files are read instead
    keep: Path = KEPT  # where inputs that fail go
    worker: bool = False  # read in this process, and print a line each


class Fault(Exception):
    """The reader did what it must not."""


@dataclass(slots=True)
class Tally:
    """Count what happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    worst_ratio: float = 0.0  # peak memory over size, of files of LARGE_BYTES and more
    worst_excess: int = 0  # peak memory over twice the size, bytes, of any file
    complaints: list[str] = field(default_factory=list)

    def count(self, outcome: Outcome) -> None:
        """Count one file."""
        self.outcomes[outcome["outcome"]] += 1
        peak, size = outcome.get("peak", 0), outcome.get("size", 0)
        if size >= LARGE_BYTES:
            self.worst_ratio = max(self.worst_ratio, peak / size)
        self.worst_excess = max(self.worst_excess, peak - 2 * size)
        if outcome["outcome"] not in ("refused", "valid"):
            self.complaints.append(f"{outcome['name']}: {outcome['outcome']}: {outcome['reason']}")


# --- one file ------------------------------------------------------------------------------------


def judge(path: Path, dtype: torch.dtype) -> Outcome:
    """Read a file in all ways there are. Raises Fault."""
    size = path.stat().st_size
    files = AdapterFiles(path.parent, BASE, dtype=dtype)
    name, stamp = path.name.removesuffix(SUFFIX), Stamp.of(path.stat())
    with Peak() as server:
        described = attempt(lambda: files.describe(name, stamp))
        content = attempt(lambda: files.read(name, stamp))
    complete = files.is_complete(name)
    with Peak() as trainer:
        adapter = attempt(lambda: read_file(path))
    payload = path.read_bytes()
    loose = attempt(lambda: read_delta(payload, None))

    peak = max(server.bytes, trainer.bytes)
    expect(peak <= 2 * size + CONSTANT_BYTES, f"{peak} bytes of memory for a file of {size}")
    if isinstance(loose, Adapter):
        check_adapter(payload, loose)
    if isinstance(content, DeltaError):
        expect(same(adapter, content), f"read_delta: {adapter}, the server: {content}")
        if isinstance(described, DeltaError):
            expect(same(described, content), f"described: {described}, read: {content}")
    else:
        assert isinstance(content, Content)
        expect(described == content.description, f"described: {described}, read: {content}")
        expect(isinstance(adapter, Adapter) and isinstance(loose, Adapter), f"refused: {adapter}")
        expect(complete, "incomplete, but read")
        check_content(payload, content, dtype)
    outcome = "refused" if isinstance(content, DeltaError) else "valid"
    return {"outcome": outcome, "size": size, "peak": peak}


def read_file(path: Path) -> Adapter:
    """Read a file as the trainer does."""
    with open(path, "rb") as file:
        return read_delta(file, BASE)


class Peak:
    """Measure by how much this process's resident memory grew at most; of `bytes` when left."""

    bytes = 0

    def __enter__(self) -> "Peak":
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
        self._before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = max(0, resident("VmHWM") - self._before)


def resident(line: str) -> int:
    """Return a line of this process's status, in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{line}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def attempt(read: Callable[[], T]) -> T | DeltaError:
    """Return what is read, or the refusal. Raises Fault at any other exception."""
    try:
        return read()
    except DeltaError as error:
        text = str(error)
        expect(
            0 < len(text.encode()) <= MAX_BYTES and text.isprintable(), f"a reason like {text!r}"
        )
        error.__cause__ = error.__context__ = None  # their frames hold what was read
        return error.with_traceback(None)
    except Exception as error:
        raise Fault(f"{type(error).__name__}: {error}") from error


def expect(holds: bool, otherwise: str) -> None:
    """Raise Fault unless something holds."""
    if not holds:
        raise Fault(otherwise)


def same(one: object, other: DeltaError) -> bool:
    """Say whether two refusals are the same."""
    return type(one) is type(other) and str(one) == str(other)


# --- what is valid, by the format's description --------------------------------------------------


def check_adapter(payload: bytes, adapter: Adapter) -> None:
    """Raise Fault unless an adapter is what the file says, and what the format allows."""
    length = int.from_bytes(payload[:8], "little")
    metadata = json.loads(payload[8 : 8 + length])["__metadata__"]
    declared = json.loads(metadata["modules"])
    tensors = safetensors.torch.load(payload)
    names = {f"{m}.{part}" for m in declared for part in ("row_starts", "columns", "values")}
    expect(set(tensors) == names, f"tensors {sorted(set(tensors) ^ names)} undeclared or missing")
    expect(set(adapter.modules) == set(declared) != set(), "other modules than declared")
    expect(metadata["format"] == "spieldose.delta" and metadata["format_version"] == "1", "format")
    expect(0 <= adapter.info.density <= 1, f"density {adapter.info.density}")
    expect(adapter.info.density == float(metadata["density"]), "another density")
    for key in ("base_model", "base_fingerprint", "method", "description"):
        expect(getattr(adapter.info, key) == metadata[key], f"another {key}")
    for text in (*metadata.values(), *adapter.info.settings, *adapter.info.settings.values()):
        text.encode()
    for module, (height, width, nnz) in declared.items():
        delta = adapter.modules[module]
        for part in ("row_starts", "columns", "values"):
            got, said = getattr(delta, part), tensors[f"{module}.{part}"]
            expect(got.dtype == said.dtype and got.shape == said.shape, f"another {module}.{part}")
            expect(bytes_of(got) == bytes_of(said), f"other bytes in {module}.{part}")
        expect(delta.shape == (height, width) and delta.nnz == nnz, f"{module}: another shape")
        check_positions(module, delta.row_starts, delta.columns, height=height, width=width)
        expect(delta.values.dtype in DTYPES and delta.values.numel() == nnz, f"{module}: values")
        finite = np.isfinite(delta.values.double().numpy())
        expect(bool(finite.all()), f"{module}: a value that is no number")


def check_positions(
    module: str, row_starts: torch.Tensor, columns: torch.Tensor, *, height: int, width: int
) -> None:
    """Raise Fault unless positions are sorted, unique and inside."""
    expect(height > 0 and width > 0, f"{module}: an empty shape")
    narrow = torch.uint16 if width <= 65_536 else torch.int32
    expect(row_starts.dtype == torch.int32 and columns.dtype == narrow, f"{module}: dtypes")
    starts, inside = row_starts.numpy().astype(np.int64), columns.numpy().astype(np.int64)
    expect(starts.shape == (height + 1,), f"{module}: {starts.shape} row starts")
    expect(starts[0] == 0 and starts[-1] == inside.size, f"{module}: row starts' ends")
    expect(bool((np.diff(starts) >= 0).all()), f"{module}: row starts descend")
    expect(bool(((inside >= 0) & (inside < width)).all()), f"{module}: a column outside")
    positions = np.repeat(np.arange(height), np.diff(starts)) * width + inside
    expect(bool((np.diff(positions) > 0).all()), f"{module}: positions unsorted or repeated")


def check_content(payload: bytes, content: Content, dtype: torch.dtype) -> None:
    """Raise Fault unless what the server holds is the file's delta, for the base."""
    expect(content.digest == hashlib.sha256(payload).hexdigest(), "another digest")
    adapter = read_delta(payload, None)
    expect(adapter.info.base_fingerprint == BASE.fingerprint, "another base")
    expect(content.description.info == adapter.info, "another description")
    expect(content.description.nnz == adapter.nnz, "another number of entries")
    expect(set(content.packed.records) == set(adapter.modules), "other modules on the device")
    for module, delta in adapter.modules.items():
        expect(delta.shape == BASE.shapes.get(module), f"{module} {delta.shape} of another base")
        packed = view(
            content.packed.memory, content.packed.records[module], shape=delta.shape, dtype=dtype
        )
        rows, columns, values = packed.entries() if delta.nnz else (torch.tensor([]),) * 3
        flat = (rows * delta.width + columns).long()
        held, place = flat.unique(return_inverse=True)
        sums = torch.zeros(held.numel()).index_add_(0, place, values.float())  # padding adds 0
        expect(torch.equal(held, delta.flat()), f"{module}: other positions on the device")
        expect(torch.equal(sums, delta.values.to(dtype).float()), f"{module}: other values there")
        expect(bool(sums.isfinite().all()), f"{module}: a value that is no number on the device")


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return an array's bytes."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# --- many files ----------------------------------------------------------------------------------


def work(arguments: Arguments) -> None:
    """Read the files in this process, and print a line each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        path = Path(root) / f"mutant{SUFFIX}"
        for made in (*drafts(), *large_drafts()):  # what is loaded or compiled once is no file's
            path.write_bytes(encoded(made, entries_of(made)))
            with_outcome(path, "")
        for name, payload in inputs(arguments):
            path.write_bytes(payload)
            del payload
            print(json.dumps(with_outcome(path, name)), flush=True)


def with_outcome(path: Path, name: str) -> Outcome:
    """Judge a file for both dtypes of the device, and name it."""
    try:
        outcomes = [judge(path, dtype) for dtype in DTYPES]
        worst = max(outcomes, key=lambda outcome: outcome["peak"])
        return {"name": name} | worst
    except Exception as error:  # also of the safetensors library, at what we have accepted
        reason = f"{type(error).__name__}: {error}"
        return {"name": name, "outcome": "fault", "reason": reason[:500]}


def inputs(arguments: Arguments) -> Iterator[tuple[str, bytes]]:
    """Return the files to read, by name."""
    if arguments.replay is None:
        for seed in range(arguments.first, arguments.first + arguments.count):
            yield str(seed), mutant(seed)
    else:
        for path in sorted(arguments.replay.iterdir())[arguments.first :]:
            yield path.name, path.read_bytes()


def names(arguments: Arguments) -> list[str]:
    """Return the names of the files to read."""
    if arguments.replay is None:
        return list(map(str, range(arguments.first, arguments.first + arguments.count)))
    return sorted(path.name for path in arguments.replay.iterdir())


def outcomes(arguments: Arguments) -> Iterator[Outcome]:
    """Have the files read by another process; by a new one after each that ends it."""
    todo = names(arguments)
    while todo:
        first = arguments.first + len(names(arguments)) - len(todo)
        command = [sys.executable, __file__, "--worker", "--first", str(first)]
        command += ["--count", str(len(todo))]
        if arguments.replay is not None:
            command += ["--replay", str(arguments.replay)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, env=os.environ | ALLOCATOR
        ) as process:
            assert process.stdout is not None
            try:
                for line in lines(process.stdout.fileno()):
                    outcome = json.loads(line)
                    assert outcome["name"] == todo.pop(0)
                    yield outcome
                reason = f"ended with {process.wait()}"
            except TimeoutError:
                reason = f"no answer in {HUNG_SECONDS:.0f} seconds"
                process.kill()
        if todo:
            yield {"name": todo.pop(0), "outcome": "crash", "reason": reason}


def lines(pipe: int) -> Iterator[bytes]:
    """Return the lines of a pipe until it closes. Raises TimeoutError if none comes for long."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(HUNG_SECONDS):
                raise TimeoutError
            if not (read := os.read(pipe, 1 << 16)):
                return
            *whole, rest = (rest + read).split(b"\n")
            yield from whole


def main() -> None:
    """Read all files, keep those that fail, print one JSON object."""
    arguments = tyro.cli(Arguments)
    if arguments.worker:
        work(arguments)
        return
    tally, begin = Tally(), time.monotonic()
    for outcome in outcomes(arguments):
        tally.count(outcome)
        if arguments.replay is not None:
            print(json.dumps(outcome), flush=True)
        if outcome["outcome"] in ("refused", "valid"):
            continue
        print(tally.complaints[-1], flush=True)
        if arguments.replay is None:
            arguments.keep.mkdir(exist_ok=True)
            kept = arguments.keep / f"mutant{outcome['name']}{SUFFIX}"
            kept.write_bytes(mutant(int(outcome["name"])))
    result = {
        "files": tally.outcomes.total(),
        "refused": tally.outcomes["refused"],
        "valid": tally.outcomes["valid"],
        "faults": tally.outcomes["fault"],
        "crashes": tally.outcomes["crash"],
        "worst_memory_ratio": round(tally.worst_ratio, 3),
        "worst_bytes_over_twice_the_size": tally.worst_excess,
        "first_seed": arguments.first,
        "seconds": math.ceil(time.monotonic() - begin),
    }
    print(json.dumps(result))
    sys.exit(bool(tally.complaints))


if __name__ == "__main__":
    main()
