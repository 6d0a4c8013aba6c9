"""Tokens to text as they come: never half a character, never part of a stop string."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextStream:
    """Decode one request's tokens incrementally and find its stop strings."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], *, min_tokens: int = 0
    ) -> None:
        """Find none of `stop` in the first `min_tokens` tokens."""
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        self._decoded = 0  # characters the decoder has given
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    def push(self, tokens: Sequence[int], *, silent: int = 0) -> tuple[str, Sequence[int]]:
        """Return the text that is certain now, and the tokens up to a stop string, if there is one.

        `stopped` says whether there was. The last `silent` tokens have no text.
        """
        text = ""
        for taken, token in enumerate(tokens[: len(tokens) - silent], start=1):
            self._tokens.append(token)
            piece = self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
            self._decoded += len(piece)
            self._held += piece
            text += self._release()
            if self.stopped:
                return text, tokens[:taken]
        return text, tokens

    def finish(self) -> str:
        """Return what is still held back once no token follows."""
        if self.stopped:
            return ""
        whole: Any = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        self._held += whole[self._decoded :]
        text = self._release()
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self) -> str:
        stop = self._stop if len(self._tokens) >= self._min_tokens else ()
        found = [at for at in map(self._held.find, stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        # one that begins before it counts may end when it does
        keep = max((_overlap(self._held, each) for each in self._stop), default=0)
        certain = len(self._held) - keep
        text, self._held = self._held[:certain], self._held[certain:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
