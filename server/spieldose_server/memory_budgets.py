"""How much memory adapters may take where the configuration does not say."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from spieldose_server.config import ServerConfig
from spieldose_server.errors import ConfigError

DEVICE_SHARE = 1 / 2  # of what is free there beside the KV cache; activations need some of the rest
HOST_SHARE = 1 / 4  # of what is free there
SHARED_SHARE = 1 / 8  # the same where the device is the host: a second copy in the same memory
GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")

log = logging.getLogger(__name__)


def budgeted(config: ServerConfig, model: PreTrainedModel) -> ServerConfig:
    """Give a configuration the budgets it leaves open, by the memory that is free now.

    Raises ConfigError if none is free beside the KV cache, which has yet to be made.
    """
    device = model.device
    host, shared = free_memory(), device.type == "cpu"
    free = host if shared else torch.cuda.mem_get_info(device)[0]
    free = max(0, free - kv_bytes(model, config.kv_tokens))
    adapter_memory = config.adapter_memory or int(free * DEVICE_SHARE)
    host_memory = config.host_memory or int(host * (SHARED_SHARE if shared else HOST_SHARE))
    if min(adapter_memory, host_memory) < 1:
        raise ConfigError(
            f"adapter_memory, host_memory: expected free memory on {device} and the host beside "
            f"{config.kv_tokens} kv_tokens, got {free} and {host} bytes"
        )
    log.info("room for adapters: %d bytes on %s, %d to wait", adapter_memory, device, host_memory)
    return replace(config, adapter_memory=adapter_memory, host_memory=host_memory)


def kv_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes that so many tokens take in a model's KV cache."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    numbers = 2 * config.num_hidden_layers * width * getattr(config, "num_key_value_heads", heads)
    return int(numbers * model.dtype.itemsize * tokens)


def free_memory(process: Path = GROUPS_OF_PROCESS, root: Path = GROUPS) -> int:
    """Return the bytes of host memory that this process may still take.

    They are what the machine has left, or what a control group (version 2) that it is in has left:
    a container's limit is one.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups(process, root)])


def _left_in_groups(process: Path, root: Path) -> Iterator[int]:
    for line in process.read_text().splitlines() if process.exists() else ():
        hierarchy, _, path = line.split(":", 2)
        group = root / path.lstrip("/")
        for one in (group, *group.parents) if hierarchy == "0" else ():
            with suppress(OSError, ValueError):  # no limit there, or none to read, or "max"
                limit = int((one / "memory.max").read_text())
                used = int((one / "memory.current").read_text())
                yield max(0, limit - used + _reclaimable(one))


def _reclaimable(group: Path) -> int:
    """Return the bytes of files' cache that a group gives up when it needs them."""
    lines = (group / "memory.stat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
