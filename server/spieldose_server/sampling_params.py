"""How tokens are chosen and when an answer ends, every field checked."""

import secrets
from dataclasses import dataclass

from spieldose_server.errors import InvalidRequest

MAX_TEMPERATURE = 10.0
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 64
MAX_REPETITION = 10.0
MAX_ANSWERS = 16
MAX_LOGPROBS = 20
MAX_GRAMMAR_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Say how tokens are chosen and when to stop. Raises InvalidRequest."""

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    max_tokens: int | None = None  # None: the default, or what the context has room for
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
    json_schema: str | None = None  # that the answer fulfils
    regex: str | None = None  # that the answer matches as a whole

    def seed_of(self, index: int) -> int:
        """Return the seed of one of several answers: each has its own."""
        return secrets.randbits(64) if self.seed is None else (self.seed + index) % (1 << 64)

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
            ("json_schema", _small(self.json_schema), f"at most {MAX_GRAMMAR_BYTES} bytes"),
            ("regex", _small(self.regex), f"at most {MAX_GRAMMAR_BYTES} bytes"),
        )  # fmt: skip
        for name, holds, expected in checks:
            if not holds:
                raise _wrong(name, expected, self)
        if self.json_schema is None and self.regex is None:
            return
        for name in ("stop", "stop_token_ids", "min_tokens"):
            if getattr(self, name):
                raise _wrong(name, "none: a constrained answer ends where it is complete", self)


def _wrong(name: str, expected: str, params: SamplingParams) -> InvalidRequest:
    return InvalidRequest(
        f"sampling_params.{name}", f"expected {expected}, got {getattr(params, name)}"
    )


def _small(grammar: str | None) -> bool:
    return grammar is None or len(grammar.encode()) <= MAX_GRAMMAR_BYTES
