"""Every request is followed from its arrival to its end, whatever wire it comes by."""

import logging
from collections.abc import Mapping

from spieldose_server.errors import ServerError
from spieldose_server.metrics import NONE, Metrics
from spieldose_server.observed import Observed
from spieldose_server.request_log import log_request
from spieldose_server.tracing import Tracing

log = logging.getLogger(__name__)


class Observer:
    """Tell metrics, traces and the log of requests."""

    def __init__(self, metrics: Metrics, tracing: Tracing | None) -> None:
        self._metrics = metrics
        self._tracing = tracing

    def request(
        self,
        wire: str,
        request_id: str,
        carrier: Mapping[str, str],
        *,
        seconds: float | None = None,
    ) -> Observed:
        """Follow a request of CALLER that came with `carrier`, and has `seconds` left."""
        return Observed(
            wire,
            self._metrics,
            self._ended,
            request_id=request_id,
            carrier=carrier,
            seconds=seconds,
        )

    def refused(self, wire: str, error: ServerError) -> None:
        """Take note of a call that was refused before anybody looked at what it asks."""
        self._metrics.request(NONE, error.code.name)
        log.info("a call over %s was refused: %s: %s", wire, error.code.name, error)

    def _ended(self, observed: Observed) -> None:
        self._metrics.request(observed.label, observed.code.name)
        if self._tracing is not None:
            self._tracing.trace(observed)  # first: the log names the trace
        log_request(observed)
