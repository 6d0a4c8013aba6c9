"""How a kernel reads a sliced delta from the arena (`sliced.py` says what lies where)."""

import triton
import triton.language as tl

from spieldose_kernels import sliced
from spieldose_kernels.cpu import vector

LANES = tl.constexpr(vector.LANES)
FIELDS = tl.constexpr(sliced.FIELDS)
ALIGNMENT = tl.constexpr(sliced.ALIGNMENT)

# which field of a record says where an array lies
STARTS, ROWS, COLUMNS, VALUES = (tl.constexpr(field) for field in (3, 4, 5, 6))


@triton.jit
def counts(table, slot):
    """Return a slot's number of slices, of wide ones, and of rows stored."""
    record = table + slot.to(tl.int64) * FIELDS
    slices = tl.load(record).to(tl.int32)
    wide = tl.load(record + 1).to(tl.int32)
    stored = tl.load(record + 2).to(tl.int32)
    return slices, wide, stored


@triton.jit
def array(memory, table, slot, FIELD: tl.constexpr):
    """Return where a slot's array lies; `memory` is the arena as the array's dtype."""
    ITEM: tl.constexpr = memory.dtype.element_ty.primitive_bitwidth // 8
    offset = tl.load(table + slot.to(tl.int64) * FIELDS + FIELD)
    # the alignment said aloud: only then are whole vectors loaded at once
    return memory + tl.multiple_of(offset // ITEM, ALIGNMENT // ITEM)
