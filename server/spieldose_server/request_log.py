"""One line of the log for every request, when it has ended: who, what, how, how long."""

import logging
from typing import Any

import grpc

from spieldose_server.observed import Observed

log = logging.getLogger(__name__)

MAX_SHOWN = 200  # characters of what a client said


def log_request(observed: Observed) -> None:
    """Log a request that has ended; in JSON each of its fields stands for itself."""
    fields = request_fields(observed)
    error = f" ({fields['error']})" if "error" in fields else ""
    log.log(
        logging.ERROR if observed.code is grpc.StatusCode.INTERNAL else logging.INFO,
        "request %r adapter %s: %s%s, %d + %d tokens in %.2f s",
        fields["request_id"],
        fields["version"] or repr(fields["adapter"]),
        fields["code"],
        error,
        fields["prompt_tokens"],
        fields["completion_tokens"],
        fields["seconds"],
        extra=fields,
    )


def request_fields(observed: Observed) -> dict[str, Any]:
    """Return what is known of a request; of its prompt and answers nothing but their lengths."""
    question, answers = observed.question, observed.answers.values()
    asked = question.adapter_id if question else ""
    fields: dict[str, Any] = {
        "request_id": observed.request_id[:MAX_SHOWN],
        "wire": observed.wire,
        "tenant": observed.tenant,
        "adapter": (observed.version.name if observed.version else asked)[:MAX_SHOWN],
        "version": str(observed.version or "(base)") if observed.resolved else "",
        "code": observed.code.name,
        "prompt_tokens": max((answer.prompt_tokens for answer in answers), default=0),
        "completion_tokens": sum(answer.tokens for answer in answers),
        "seconds": _seconds(observed.ended - observed.arrived),
    }
    if observed.error:
        fields["error"] = observed.error[:MAX_SHOWN]
    if answers:
        began = min(answer.began for answer in answers)
        fields["queue_seconds"] = _seconds(began - observed.arrived)
    if firsts := [answer.first for answer in answers if answer.first]:
        fields["first_token_seconds"] = _seconds(min(firsts) - observed.arrived)
    if observed.trace_id:
        fields["trace_id"] = observed.trace_id
    return fields


def _seconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e9, 6)
