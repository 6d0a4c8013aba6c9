"""A token's text is what it adds to the text before it."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spieldose_server.openai_http.token_text import TokenText


def sentence_piece() -> PreTrainedTokenizerBase:
    """Decode as Llama 2 does: a text's first space is dropped."""
    words = ["<unk>", "\u2581", "a", "\u2581in", "in", "\u2581Paris", "<0xC3>", "<0xA9>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_spaces_are_part_of_a_token() -> None:
    spelled = [TokenText(sentence_piece()).spell(token) for token in (3, 4, 5)]
    assert spelled == [(text, list(text.encode())) for text in (" in", "in", " Paris")]


def test_half_a_character_has_its_byte() -> None:
    assert TokenText(sentence_piece()).spell(6) == ("\ufffd", [0xC3])


@pytest.mark.parametrize("text", ["Hello, wörld!  two", "\n\n  def f():\n\treturn 1"])
def test_tokens_make_up_their_text(real_directory: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_directory)
    spelling = TokenText(tokenizer)
    spelled = [spelling.spell(token) for token in tokenizer(text)["input_ids"]]
    assert bytes(byte for _, part in spelled for byte in part).decode() == text
