"""A common prefix is computed once for an adapter version, and never shared across versions."""

import pytest

from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Reply
from spieldose_server.prefix_cache import page_hash, playing

from ..conftest import Running, eventually

SAMPLING = pb.SamplingParams(max_tokens=12)
PROMPT = "The quick brown fox jumps over the lazy dog. " * 5  # 225 tokens, three whole pages
PAGES = 3 * 64


def ask(running: Running, adapter: str, prompt: str = PROMPT) -> tuple[Reply, int]:
    """Return an answer, and how many of the prompt's tokens were found in the cache."""
    before = running.client.model().engine.cached_tokens
    reply = running.client.generate(prompt, adapter=adapter, sampling=SAMPLING)
    return reply, running.client.model().engine.cached_tokens - before


@pytest.mark.parametrize("adapter", ["", "a1"])
def test_the_same_prompt_again_is_found_and_answered_alike(running: Running, adapter: str) -> None:
    first, missed = ask(running, adapter)
    again, found = ask(running, adapter)
    assert (missed, found) == (0, PAGES)
    assert again == first


def test_only_what_is_common_is_found(running: Running) -> None:
    whole, _ = ask(running, "a1", PROMPT[:70] + "x" * 130)
    ask(running, "a1")
    reply, found = ask(running, "a1", PROMPT[:70] + "y" * 130)
    assert found == 64
    assert reply.token_ids != whole.token_ids


def test_the_same_content_under_two_names_shares_its_prefixes(running: Running) -> None:
    first, _ = ask(running, "a1")
    (running.directory / "copy.safetensors").write_bytes(
        (running.directory / "a1.safetensors").read_bytes()
    )
    eventually(lambda: running.state("copy") == "resident")
    reply, found = ask(running, "copy")
    assert found == PAGES and reply.token_ids == first.token_ids


def test_a_sampled_answer_does_not_depend_on_the_cache(running: Running) -> None:
    sampling = pb.SamplingParams(max_tokens=12, temperature=1.0, seed=5)
    first = running.client.generate(PROMPT, adapter="a1", sampling=sampling)
    assert running.client.generate(PROMPT, adapter="a1", sampling=sampling) == first


def test_pages_are_told_apart_by_what_plays_and_by_what_came_before() -> None:
    tokens = list(range(64))
    with playing(b"a"):
        a = page_hash(None, tokens)
        assert page_hash(None, tokens) == a
        assert page_hash(None, tokens[::-1]) != a
        assert page_hash(a, tokens) != a
        after = page_hash(a, tokens)
    with playing(b"b"):
        b = page_hash(None, tokens)
        assert b != a
        assert page_hash(b, tokens) != after
        with playing(a.to_bytes(16, "little")):  # whoever plays what looks like a page's hash
            assert page_hash(None, tokens) != after
    with pytest.raises(LookupError):
        page_hash(None, tokens)
