"""A sparse weight delta: one linear layer's (`SparseDelta`), and a whole adapter's (`Adapter`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """Hold one layer's delta Δ in compressed sparse rows, Δ[r, columns[j]] = values[j]."""

    row_starts: torch.Tensor  # [R + 1] int32; row r owns entries row_starts[r]:row_starts[r + 1]
    columns: torch.Tensor  # [Z] uint16 or int32, ascending within a row
    values: torch.Tensor  # [Z] bfloat16 or float32
    width: int  # C, the layer's input columns; the arrays alone do not tell

    @property
    def shape(self) -> tuple[int, int]:
        """Return (R, C), the shape of the layer's weight."""
        return self.row_starts.numel() - 1, self.width

    @property
    def nnz(self) -> int:
        """Return Z, the number of stored entries."""
        return self.columns.numel()

    def rows(self) -> torch.Tensor:
        """Return the row of every entry, [Z] int64."""
        return entry_rows(self.row_starts)

    def flat(self) -> torch.Tensor:
        """Return the entries' flat row-major positions, [Z] int64 ascending."""
        return self.rows() * self.width + self.columns.long()

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return Δ as a dense [R, C] tensor."""
        out = torch.zeros(self.shape, dtype=dtype, device=self.values.device)
        out[self.rows(), self.columns.long()] = self.values.to(dtype)
        return out

    def plus(self, other: "SparseDelta") -> "SparseDelta":
        """Return the sum of two deltas of one shape, with float32 values."""
        positions, places = torch.cat([self.flat(), other.flat()]).unique(return_inverse=True)
        values = torch.zeros(positions.numel(), device=positions.device)
        values.index_add_(0, places, torch.cat([self.values.float(), other.values.float()]))
        return SparseDelta.from_flat(positions, values, shape=self.shape)

    def transposed(self) -> "SparseDelta":
        """Return Δᵀ."""
        height, width = self.shape
        positions = self.columns.long() * height + self.rows()
        return SparseDelta.from_flat(positions, self.values, shape=(width, height))

    @classmethod
    def from_flat(
        cls, indices: torch.Tensor, values: torch.Tensor, *, shape: tuple[int, int]
    ) -> "SparseDelta":
        """Build from flat row-major positions, [Z] int64 in any order without repeats."""
        height, width = shape
        order = torch.argsort(indices)
        rows, columns = indices[order] // width, indices[order] % width
        row_starts = torch.zeros(height + 1, dtype=torch.int32, device=indices.device)
        row_starts[1:] = torch.bincount(rows, minlength=height).cumsum(0)
        return cls(row_starts, columns.to(index_dtype(width)), values[order], width)


def entry_rows(row_starts: torch.Tensor) -> torch.Tensor:
    """Return the row of every entry, [Z] int64, from row starts, [R + 1] int32."""
    counts = row_starts.long().diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)


def index_dtype(count: int) -> torch.dtype:
    """Return the narrowest type that can name every one of `count` rows or columns."""
    return torch.uint16 if count <= 1 << 16 else torch.int32


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """Say where an adapter comes from; travels in the delta file's metadata."""

    base_model: str  # the base's hub name, or its directory's last part; for people
    base_fingerprint: str  # what decides whether a base may play it
    method: str  # e.g. spiel-ag
    density: float  # entries over weights of the target layers
    description: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)  # training settings, for people
    chat_template: str = ""  # Jinja, not looked into until it is used; empty: the base model's own


@dataclass(frozen=True, slots=True)
class Adapter:
    """Hold a sparse fine-tune of one base model: a delta for each module it touches."""

    info: AdapterInfo
    modules: Mapping[str, SparseDelta]  # by module name in the base model

    @property
    def nnz(self) -> int:
        """Return the number of entries over all modules."""
        return sum(delta.nnz for delta in self.modules.values())
