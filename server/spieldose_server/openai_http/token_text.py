"""A single token as text and bytes: it may be half a character. And where its text begins."""

import re
from typing import Any

from tokenizers import pre_tokenizers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

HEX = re.compile("<0x([0-9A-F]{2})>")  # a byte as SentencePiece writes it
UNKNOWN = "\ufffd"


class TokenText:
    """Spell tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        # SentencePiece's decoders drop the space that a text's first token begins with
        self._first: list[int] = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        self._skipped = len(self._tokenizer.decode(self._first))
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        printable = {ord(letter) for letter in letters if ord(letter) < 256}
        rest = iter(sorted(set(range(256)) - printable))  # stand for themselves, those from 256 on
        self._bytes = {
            letter: ord(letter) if ord(letter) < 256 else next(rest) for letter in letters
        }

    def offsets(self) -> "Offsets":
        """Return a counter for the tokens of one answer."""
        return Offsets(self._tokenizer.backend_tokenizer)

    def spell(self, token: int) -> tuple[str, list[int]]:
        """Return a token's text, with U+FFFD where it is no whole character, and its bytes."""
        text: str = self._tokenizer.decode([*self._first, token])[self._skipped :]
        if UNKNOWN not in text:
            return text, list(text.encode())
        raw: str = self._tokenizer.convert_ids_to_tokens(token)
        if match := HEX.fullmatch(raw):
            return text, [int(match[1], 16)]
        known = [self._bytes.get(letter) for letter in raw]
        return text, [byte for byte in known if byte is not None]


class Offsets:
    """Say where in an answer's text its tokens begin."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._characters = 0  # of the text so far

    def next(self, token: int) -> int:
        """Return how many characters are whole before the next token."""
        before = self._characters
        self._characters += len(self._decoder.step(self._tokenizer, token) or "")
        return before
