"""A generation request as the server understands it, every field checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spieldose_server.errors import InvalidRequest

MAX_TEMPERATURE = 10.0
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 64
MAX_REPETITION = 10.0
MAX_ANSWERS = 16
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 256
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Say how tokens are chosen and when to stop. Raises InvalidRequest."""

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    max_tokens: int | None = None  # None: DEFAULT_MAX_TOKENS, or what the context has room for
    stop: tuple[str, ...] = ()
    seed: int | None = None  # None: drawn anew for every request
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None  # how many of the likeliest; None: not even the token's own

    @property
    def edits(self) -> bool:
        """Say whether a request's history changes its logits."""
        penalties = self.presence_penalty, self.frequency_penalty
        return self.repetition_penalty != 1 or any(penalties) or self.min_tokens > 0

    def of_answer(self, index: int) -> "SamplingParams":
        """Return what one of several answers is sampled with: each has a seed of its own."""
        if self.seed is None or index == 0:
            return self
        return replace(self, seed=(self.seed + index) % (1 << 64))

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature <= MAX_TEMPERATURE, f"0 to {MAX_TEMPERATURE:g}"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < 1 << 31, "0 to 2147483647"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("stop", len(self.stop) <= MAX_STOP_STRINGS and all(self.stop),
             f"at most {MAX_STOP_STRINGS} strings, none empty"),
            ("seed", self.seed is None or 0 <= self.seed < 1 << 64, "0 to 2**64 - 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= MAX_REPETITION,
             f"above 0 and at most {MAX_REPETITION:g}"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
            ("stop_token_ids", len(self.stop_token_ids) <= MAX_STOP_TOKENS,
             f"at most {MAX_STOP_TOKENS}"),
            ("min_tokens", self.max_tokens is None or self.min_tokens <= self.max_tokens,
             f"at most max_tokens ({self.max_tokens})"),
            ("n", 1 <= self.n <= MAX_ANSWERS, f"1 to {MAX_ANSWERS}"),
            ("logprobs", self.logprobs is None or self.logprobs <= MAX_LOGPROBS,
             f"at most {MAX_LOGPROBS}"),
        )  # fmt: skip
        for name, holds, expected in checks:
            if not holds:
                raise InvalidRequest(
                    f"sampling_params.{name}", f"expected {expected}, got {getattr(self, name)}"
                )


@dataclass(frozen=True, slots=True)
class Message:
    """Hold one turn of a chat."""

    role: str
    content: str


# a prompt is text, token ids, or messages for the chat template
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Hold what the engine needs: token ids and a limit that fits the context."""

    id: str
    tokens: list[int]
    slot: int | None  # of the adapter; None plays the base
    plays: bytes  # names the content of what plays: the key of shared prefixes
    sampling: SamplingParams
    max_tokens: int


def fit(prompt_tokens: int, sampling: SamplingParams, *, max_context: int, field: str) -> int:
    """Return how many tokens may be generated. Raises InvalidRequest if that is too many."""
    room = max_context - prompt_tokens
    if prompt_tokens == 0:
        raise InvalidRequest(field, "expected at least one token, got none")
    if room < 1:
        raise InvalidRequest(
            field, f"expected at most {max_context - 1} tokens, got {prompt_tokens}"
        )
    if sampling.max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, room)
    if sampling.max_tokens > room:
        raise InvalidRequest(
            "sampling_params.max_tokens",
            f"expected at most {room} after a prompt of {prompt_tokens}, got {sampling.max_tokens}",
        )
    return sampling.max_tokens
