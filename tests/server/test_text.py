"""Text as it streams."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spieldose_server.text import TextStream


@pytest.fixture(scope="module")
def tokenizer(tiny_directory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_directory)


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_pieces_never_hold_half_a_character(tokenizer, text: str) -> None:
    stream = TextStream(tokenizer, ())
    pieces = [stream.push([token])[0] for token in tokenizer(text)["input_ids"]]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_a_stop_string_may_begin_before_it_counts(tokenizer) -> None:
    tokens = tokenizer("xENDxEND!")["input_ids"]  # a token a letter
    for least, expected in ((0, "x"), (4, "x"), (5, "xENDx"), (8, "xENDx"), (9, "xENDxEND!")):
        stream = TextStream(tokenizer, ("END",), min_tokens=least)
        text = "".join("" if stream.stopped else stream.push([token])[0] for token in tokens)
        text += stream.finish()
        assert (least, text) == (least, expected)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 259), max_size=40))
def test_any_tokens_give_the_text_of_decoding_them_at_once(tokenizer, tokens: list[int]) -> None:
    stream = TextStream(tokenizer, ())
    streamed = "".join(stream.push([token])[0] for token in tokens) + stream.finish()
    assert streamed == tokenizer.decode(tokens, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abc", min_size=1, max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(tokenizer, text: str, stop: list[str]) -> None:
    stream = TextStream(tokenizer, stop)
    tokens = tokenizer(text)["input_ids"]
    got, taken = stream.push(tokens)
    got += stream.finish()
    # a stop string is found as soon as its last character is there
    ends = [text.index(s) + len(s) for s in stop if s in text]
    if not ends:
        assert (got, stream.stopped) == (text, False)
        return
    seen = text[: min(ends)]
    assert stream.stopped
    assert tokenizer.decode(taken) == seen
    assert got == seen[: min(seen.index(s) for s in stop if s in seen)]
