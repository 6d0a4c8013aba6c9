"""Every request is followed from its arrival to its end, whatever wire it comes by."""

from collections.abc import Mapping

from spieldose_server.metrics import Metrics
from spieldose_server.observed import Observed
from spieldose_server.request_log import log_request
from spieldose_server.tracing import Tracing


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

    def _ended(self, observed: Observed) -> None:
        self._metrics.request(observed.label, observed.code.name)
        if self._tracing is not None:
            self._tracing.trace(observed)  # first: the log names the trace
        log_request(observed)
