"""Events of answers as OpenAI's objects."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spieldose_server.generation import Completed, Piece
from spieldose_server.openai_http.token_text import Offsets, TokenText
from spieldose_server.sampling import TokenLogprob


@dataclass(frozen=True, slots=True)
class Head:
    """Hold what all objects of a response have."""

    id: str
    model: str
    logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def of(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return an object."""
        common = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return common | {"choices": choices} | more


@dataclass(slots=True)
class Usage:
    """Count a response's tokens; a prompt counts once, however many answers it has."""

    prompts: dict[int, int] = field(default_factory=dict)  # by place
    completion: int = 0

    def add(self, prompt: int, end: Completed) -> None:
        """Count an answer to a prompt."""
        self.prompts[prompt] = end.prompt_tokens
        self.completion += end.completion_tokens

    def object(self) -> dict[str, int]:
        """Return it as OpenAI's."""
        prompt = sum(self.prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion,
            "total_tokens": prompt + self.completion,
        }


@dataclass(slots=True)
class Choice:
    """Hold one answer as far as it has come."""

    index: int
    text: str = ""
    tokens: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    finish: str | None = None

    def add(self, event: Piece | Completed) -> None:
        """Take up what came."""
        if isinstance(event, Completed):
            self.finish = "stop" if event.stopped else "length"
        else:
            self.text += event.text
            self.tokens += zip(event.token_ids, event.logprobs, strict=False)


class ChatObjects:
    """Make what `/v1/chat/completions` answers."""

    whole, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, spelling: TokenText) -> None:
        self._spelling = spelling

    def choice(self, choice: Choice, *, logprobs: bool) -> dict[str, Any]:
        """Return a whole answer."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return self._object(choice, logprobs) | {"message": message}

    def delta(self, piece: Choice, *, first: bool, logprobs: bool) -> dict[str, Any]:
        """Return what is new in an answer."""
        delta = {"role": "assistant"} if first else {}
        if piece.finish is None:
            delta["content"] = piece.text
        return self._object(piece, logprobs and piece.finish is None) | {"delta": delta}

    def _object(self, choice: Choice, logprobs: bool) -> dict[str, Any]:
        content = [
            self._token(token, found.logprob)
            | {"top_logprobs": [self._token(*likely) for likely in found.likeliest]}
            for token, found in choice.tokens
        ]
        return {
            "index": choice.index,
            "finish_reason": choice.finish,
            "logprobs": {"content": content, "refusal": None} if logprobs else None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, spelt = self._spelling.spell(token)
        return {"token": text, "bytes": spelt, "logprob": logprob}


class CompletionObjects:
    """Make what `/v1/completions` answers."""

    whole, part, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, spelling: TokenText) -> None:
        self._spelling = spelling
        self._offsets: dict[int, Offsets] = {}  # by answer

    def choice(self, choice: Choice, *, logprobs: bool) -> dict[str, Any]:
        """Return a whole answer."""
        return {
            "index": choice.index,
            "text": choice.text,
            "finish_reason": choice.finish,
            "logprobs": self._logprobs(choice.index, choice.tokens) if logprobs else None,
        }

    def delta(self, piece: Choice, *, first: bool, logprobs: bool) -> dict[str, Any]:
        """Return what is new in an answer."""
        return self.choice(piece, logprobs=logprobs and piece.finish is None)

    def _logprobs(
        self, index: int, tokens: Sequence[tuple[int, TokenLogprob]]
    ) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {
            key: [] for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        offsets = self._offsets.setdefault(index, self._spelling.offsets())
        for token, logprob in tokens:
            text, offset = self._spelling.spell(token)[0], offsets.next(token)
            likeliest = {self._spelling.spell(t)[0]: value for t, value in logprob.likeliest}
            for key, value in zip(found, (text, logprob.logprob, likeliest, offset), strict=True):
                found[key].append(value)
        return found
