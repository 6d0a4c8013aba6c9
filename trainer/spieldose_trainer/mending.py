"""Deltas that make up for what NF4 rounds away: no others than the rounded weights suit them."""

from typing import Final

from spieldose_kernels.delta import AdapterInfo
from spieldose_trainer.repair.config import METHOD as REPAIR

MENDS: Final = "mends"  # a setting in the delta file of a run that was built over such a delta
NF4: Final = "nf4"


def mends_rounding(info: AdapterInfo) -> bool:
    """Say whether an adapter was made to play over NF4 and would spoil the original weights."""
    settings = info.settings
    residual = settings.get("start") == "residual"
    return info.method == REPAIR or residual or settings.get(MENDS) == NF4
