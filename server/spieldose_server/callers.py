"""Who calls, as far as a call's metadata, a request's headers or a client's certificate tell."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from spieldose_server.access import Access, Caller
from spieldose_server.config import TENANT
from spieldose_server.errors import InvalidRequest

MAX_TENANT = 128  # characters
AUTHORIZATION = "authorization"
BEARER = "bearer "


class Callers:
    """Tell callers apart by the access rules; without, all are who they say they are."""

    def __init__(self, access: Access | None, *, steers: bool) -> None:
        """Take the rules; `steers` says whether administrators are taken for such here.

        Without rules all who come to where one steers are.
        """
        self._access = access
        self._steers = steers

    def of(self, metadata: Mapping[str, str]) -> Caller | None:
        """Return who calls; None: `certified` will tell. Raises Unauthenticated, InvalidRequest."""
        if self._access is not None:
            given = metadata.get(AUTHORIZATION, "")
            if not given and self._access.knows_certificates:
                return None
            is_token = given.lower().startswith(BEARER)
            token = given[len(BEARER) :].strip() if is_token else ""
            return self._known(self._access.caller(token))
        name = metadata.get(TENANT, "")
        if len(name) > MAX_TENANT:
            raise InvalidRequest(
                TENANT, f"expected at most {MAX_TENANT} characters, got {len(name)}"
            )
        return self._known(Caller(name, admin=True))

    def certified(self, names: Iterable[str]) -> Caller:
        """Return whose certificate has these names. Raises Unauthenticated."""
        assert self._access is not None  # without rules nobody is asked for one
        return self._known(self._access.named(names))

    def _known(self, caller: Caller) -> Caller:
        return replace(caller, admin=caller.admin and self._steers)
