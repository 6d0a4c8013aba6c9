"""Let requests share the KV cache of a common prefix, within one adapter version and never across.

transformers finds shared pages by a hash chain over their token ids, which says nothing of the
adapter that made them. Here the chain of every request begins with what the request plays: the
content digest of its adapter version. A page is found only by those who play the very same content,
whatever slot or name it has. The hashes are keyed with a secret of the process, so that nobody can
make prompts that collide. transformers is pinned: this file leans on its insides.
"""

import secrets
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from typing import Any

from transformers.generation.continuous_batching.cache_allocators import cache_allocator

HASH_BYTES = 16
SECRET = secrets.token_bytes(32)

_playing: ContextVar[bytes] = ContextVar("playing")  # what the request at hand plays


@contextmanager
def playing(what: bytes) -> Iterator[None]:
    """Hash pages as those of a request that plays `what`, while the block runs."""
    token = _playing.set(what)
    try:
        yield
    finally:
        _playing.reset(token)


def page_hash(parent: int | None, tokens: list[int]) -> int:
    """Return the hash of a page of tokens, from that of the page before it."""
    before = _playing.get() if parent is None else parent.to_bytes(HASH_BYTES, "little")
    digest = blake2b(before, key=SECRET, digest_size=HASH_BYTES, person=b"first" * (parent is None))
    digest.update(array("i", tokens).tobytes())
    return int.from_bytes(digest.digest(), "little")


def install() -> None:
    """Have transformers hash pages so; outside of `playing` it then fails instead of sharing."""
    module: Any = cache_allocator
    module.compute_block_hash = page_hash
