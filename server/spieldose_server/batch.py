"""What a forward pass holds: the engine's own states, read as our requests, and a count of them."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from spieldose_server.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class Step:
    """Record one forward pass."""

    slots: frozenset[int]  # adapters in it
    requests: int
    base_requests: int
    tokens: int
    prefilling: int  # requests whose prompt was not finished by this pass


class Record:
    """Count what the engine has done; written by its thread, read by anyone."""

    def __init__(self) -> None:
        self.steps = 0
        self.max_adapters = 0
        self.max_requests = 0
        self.generated_tokens = 0
        self.cached_tokens = 0  # of prompts, found in the KV cache
        self.recent: deque[Step] = deque(maxlen=4096)
        self.listener: Callable[[Step], None] = lambda _: None  # told of every pass

    def add(self, batch: list[FutureRequestState]) -> None:
        """Count a forward pass over these requests."""
        slots = [asked(future.state).slot for future in batch]
        step = Step(
            slots=frozenset(slot for slot in slots if slot is not None),
            requests=len(batch),
            base_requests=slots.count(None),
            tokens=sum(future.query_length for future in batch),
            prefilling=sum(not future.has_new_token for future in batch),
        )
        self.steps += 1
        self.max_adapters = max(self.max_adapters, len(step.slots))
        self.max_requests = max(self.max_requests, step.requests)
        self.generated_tokens += step.requests - step.prefilling
        self.recent.append(step)
        self.listener(step)


def asked(state: RequestState) -> GenerationRequest:
    """Return what was asked for, as it was submitted."""
    request: GenerationRequest = state.logit_processor_kwargs["request"]
    return request


def answer(state: RequestState) -> list[int]:
    """Return the answer so far; a request begun anew has it in its prompt."""
    tokens: list[int] = state.initial_tokens + state.generated_tokens
    return tokens[len(asked(state).tokens) :]
