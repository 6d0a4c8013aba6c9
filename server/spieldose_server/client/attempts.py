"""How often a call is made, and when again: until its first response is there, or it is in vain.

A server that is away is asked again after a while that doubles each time, a full one when it said.
No call of ours changes more by being made twice, and no text comes twice.

gRPC's own retries (a service config) would do the same, but with grpcio 1.85 a stream whose server
dies before its first response, and stays away, then ends never, not even at its deadline.
"""

import math
import random
import time

from spieldose_server.client.errors import Busy, ClientError, InvalidArgument, Unavailable

RETRIES = 4
FIRST_WAIT = 0.2  # seconds; 3 s in all for four
LONGEST = 1e8  # seconds, three years; gRPC takes an infinite timeout for none at all


class Attempts:
    """Count the attempts of one call, and know its deadline."""

    def __init__(self, retries: int, timeout: float | None) -> None:
        """Allow so many after the first, within so many seconds from now.

        Raises InvalidArgument for seconds that are no number.
        """
        if timeout is not None and math.isnan(timeout):
            raise InvalidArgument.of("timeout", "expected seconds, got nan")
        self._left = retries
        self._wait = FIRST_WAIT
        self._deadline = None
        if timeout is not None and timeout <= LONGEST:
            self._deadline = time.monotonic() + timeout

    @property
    def timeout(self) -> float | None:
        """Return the seconds that the next attempt has."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def wait(self, error: ClientError) -> float:
        """Return in how many seconds to try again, or raise what the last attempt ended with."""
        seconds = self._seconds(error)
        if seconds is None or self._left < 1:
            raise error
        if self._deadline is not None and time.monotonic() + seconds >= self._deadline:
            raise error  # now rather than at the deadline
        self._left -= 1
        return seconds

    def _seconds(self, error: ClientError) -> float | None:
        if isinstance(error, Busy):
            return error.retry_after
        if not isinstance(error, Unavailable):
            return None
        seconds = self._wait * random.uniform(0.8, 1.2)  # clients of one server come apart
        self._wait *= 2
        return seconds
