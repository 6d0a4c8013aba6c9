"""What can be wrong with a delta or a base.

SpieldoseError
├── BaseError              the base model cannot be loaded
├── DeltaError             a delta file cannot be used
│   ├── NotADelta          it is not a delta file at all (a pickle, a foreign safetensors file)
│   ├── TruncatedDelta     it ends before the size its own header declares
│   ├── MalformedDelta     its tensors contradict each other or its metadata
│   ├── BaseMismatch       it was trained on another base model
│   ├── ModuleMismatch     it names modules the base lacks, or has other shapes
│   └── UntrustedDelta     it needs a signature, and has none that counts
└── ArenaFull              the adapter does not fit into the memory set aside for deltas
"""

MAX_BYTES = 1000  # gRPC drops a call whose metadata takes 8 KiB; what goes there is escaped, twice


def one_line(said: object) -> str:
    """Return what a short line can hold of a text that may come from a file or a client."""
    text = str(said)[:MAX_BYTES]
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(line.encode()) > MAX_BYTES:
        line = line.encode()[: MAX_BYTES - 3].decode(errors="ignore") + "…"
    return line


class SpieldoseError(Exception):
    """Root of every error this project raises on purpose; its text is one short line."""

    def __init__(self, problem: object) -> None:
        super().__init__(one_line(problem))


class BaseError(SpieldoseError):
    """The base model cannot be loaded."""


class DeltaError(SpieldoseError):
    """A delta file cannot be used."""


class NotADelta(DeltaError):
    """The file is not a delta file."""


class TruncatedDelta(DeltaError):
    """The file ends before the size its header declares."""


class MalformedDelta(DeltaError):
    """The tensors contradict each other or the metadata."""


class BaseMismatch(DeltaError):
    """The delta was trained on another base model."""


class ModuleMismatch(DeltaError):
    """The delta's modules are not the base's modules."""


class UntrustedDelta(DeltaError):
    """No trusted key has signed the delta."""


class ArenaFull(SpieldoseError):
    """No free extent of device memory is large enough."""
