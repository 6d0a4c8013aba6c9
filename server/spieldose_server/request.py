"""A generation request as the server understands it, every field checked."""

from collections.abc import Sequence
from dataclasses import dataclass

from spieldose_server.constraint import Constraint
from spieldose_server.errors import InvalidRequest
from spieldose_server.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 256
MAX_MESSAGES = 4096  # of one prompt
MAX_REQUEST_ID = 128  # characters; every chunk carries it
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """Hold one turn of a chat."""

    role: str
    content: str


# a prompt is text, token ids, or messages for the chat template
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Hold what a client asks for. Raises InvalidRequest."""

    id: str  # for people; the client's own need not be unique
    adapter_id: str  # NAME or NAME@DIGEST; empty: the base
    field: str  # of the prompt, as errors call it
    prompt: Prompt
    sampling: SamplingParams
    default_tokens: int = DEFAULT_MAX_TOKENS  # of the answer, where there is room
    constraint_field: str = ""  # of the constraint, as errors call it; empty: its own name

    @property
    def is_chat(self) -> bool:
        """Say whether messages are asked, not a text or tokens."""
        return bool(self.prompt) and isinstance(self.prompt[0], Message)

    def __post_init__(self) -> None:
        if (length := len(self.id)) > MAX_REQUEST_ID:
            raise InvalidRequest(
                "request_id", f"expected at most {MAX_REQUEST_ID} characters, got {length}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Hold what the engine needs: token ids and a limit that fits the context."""

    id: str
    tokens: list[int]
    slot: int | None  # of the adapter; None plays the base
    plays: bytes  # names the content of what plays: the key of shared prefixes
    sampling: SamplingParams
    seed: int
    max_tokens: int
    constraint: Constraint | None = None

    def __deepcopy__(self, memo: object) -> "GenerationRequest":
        """Stay the same where transformers copies the state of a request it begins anew."""
        return self

    @property
    def history_matters(self) -> bool:
        """Say whether the answer so far changes the logits."""
        asked = self.sampling
        penalties = asked.presence_penalty or asked.frequency_penalty
        edits = asked.repetition_penalty != 1 or penalties or asked.min_tokens > 0
        return bool(edits) or self.constraint is not None


def fit(prompt_tokens: int, question: Question, *, max_context: int) -> int:
    """Return how many tokens may be generated. Raises InvalidRequest if that is too many."""
    sampling, field = question.sampling, question.field
    room = max_context - prompt_tokens
    if prompt_tokens == 0:
        raise InvalidRequest(field, "expected at least one token, got none")
    if room < 1:
        raise InvalidRequest(
            field, f"expected at most {max_context - 1} tokens, got {prompt_tokens}"
        )
    if sampling.min_tokens > room:
        raise InvalidRequest(
            "sampling_params.min_tokens",
            f"expected at most {room} after a prompt of {prompt_tokens}, got {sampling.min_tokens}",
        )
    if sampling.max_tokens is None:
        return min(max(question.default_tokens, sampling.min_tokens), room)
    if sampling.max_tokens > room:
        raise InvalidRequest(
            "sampling_params.max_tokens",
            f"expected at most {room} after a prompt of {prompt_tokens}, got {sampling.max_tokens}",
        )
    return sampling.max_tokens
