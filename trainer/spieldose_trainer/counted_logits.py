"""Logits where the loss needs them: most of a batch's tokens are prompts and padding."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from spieldose_trainer.data import IGNORED


def counted_only(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch's arguments so that logits are made only where a row's next token counts.

    The loss is the same. A model that takes no `logits_to_keep` gets its batch as it was.
    """
    labels: torch.Tensor | None = batch.get("labels")
    if labels is None or "logits_to_keep" not in signature(model.forward).parameters:
        return dict(batch)
    places = (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()
    if places.numel() in (0, labels.shape[1] - 1):  # nothing to leave out
        return dict(batch)
    # the loss compares every place with the label after it, the last one with none
    targets = nn.functional.pad(labels[:, places + 1], (1, 0), value=IGNORED)
    return dict(batch) | {"labels": targets, "logits_to_keep": torch.cat([places, places[-1:]])}
