"""Who is in the next forward pass, and whose pages of KV cache may serve whom."""

from collections.abc import Callable
from typing import Any

from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from spieldose_server import prefix_cache
from spieldose_server.batch import Record, asked


class Scheduler(FIFOScheduler):
    """First in, first out; shares prefixes within a version; tells when cancelled ones are out.

    The manager drains new requests and cancellations one after the other from two queues. A
    cancellation that overtakes its request would be lost, so cancelled requests are not let in.
    """

    def __init__(
        self,
        cancelled: set[str],
        released: Callable[[str], None],
        record: Record,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._cancelled = cancelled
        self._released = released
        self._record = record

    def add_waiting_request(self, state: RequestState) -> None:
        """Queue a request unless it is cancelled already."""
        if state.request_id in self._cancelled:
            self._released(state.request_id)
        else:
            super().add_waiting_request(state)

    def _infer_request_tokens(self, state: RequestState, *arguments: Any) -> list[int]:
        """Look for the beginning of a prompt among pages that the same adapter version made."""
        before = state.position_offset
        with prefix_cache.playing(asked(state).plays):
            tokens: list[int] = super()._infer_request_tokens(state, *arguments)
        self._record.cached_tokens += state.position_offset - before
        return tokens

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Free cancelled requests, between two steps."""
        states: list[RequestState] = super().clear_cancelled_requests()
        if states:
            # a full cache lets nobody in until a request finishes, and perhaps none will any more
            self.block_new_requests = False
        for state in states:
            self._released(state.request_id)
        return states


def mark_pages(mark: Callable[..., None], state: RequestState, *arguments: Any) -> None:
    """Offer pages that a request has filled to those that play the same."""
    with prefix_cache.playing(asked(state).plays):
        mark(state, *arguments)
