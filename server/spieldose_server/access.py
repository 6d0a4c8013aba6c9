"""Who may do what: tenants, the tokens that prove who asks, and the adapters each may play.

```toml
[[tenant]]
name = "acme"
tokens = [{ sha256 = "9f86d0…", expires = 2027-06-30 }]  # `spieldose token` makes one
adapters = ["orders", "acme-*"]  # shell patterns; none by default
base = true                      # may play the base alone; no by default
admin = false                    # may see, load, unload and pin every adapter; no by default
```

The file holds hashes only, and is read again once it changes.
"""

import hashlib
import logging
import re
import secrets
import tomllib
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from spieldose_server.errors import ConfigError, Forbidden, Unauthenticated, UnknownAdapter
from spieldose_server.files import Stamp

log = logging.getLogger(__name__)

KINDS = {"name": str, "tokens": list, "adapters": list, "base": bool, "admin": bool}
TOKEN_BYTES = 32  # random ones: a plain hash of so many cannot be turned back


@dataclass(frozen=True, slots=True)
class Caller:
    """Hold who asks and what it may do."""

    tenant: str
    adapters: tuple[str, ...] = ("*",)  # shell patterns of names
    base: bool = True
    admin: bool = True

    def may_play(self, name: str) -> bool:
        """Say whether it may play an adapter of this name."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)

    def may_see(self, name: str) -> bool:
        """Say whether it may know of an adapter of this name."""
        return self.admin or self.may_play(name)

    def check_play(self, adapter_id: str) -> None:
        """Raise UnknownAdapter, as if there were none, or Forbidden unless it may be played."""
        if not adapter_id and not self.base:
            raise Forbidden("expected an adapter_id: this tenant may not play the base alone")
        if adapter_id and not self.may_play(adapter_id.partition("@")[0]):
            raise UnknownAdapter(adapter_id)

    def check_see(self, adapter_id: str) -> None:
        """Raise UnknownAdapter, as if there were none, unless it may be shown."""
        if not self.may_see(adapter_id.partition("@")[0]):
            raise UnknownAdapter(adapter_id)

    def check_admin(self) -> None:
        """Raise Forbidden unless it may steer adapters."""
        if not self.admin:
            raise Forbidden("expected an administrator's token, got a tenant's")


CALLER: ContextVar[Caller] = ContextVar("caller")  # of the running call; not set: nobody let it in


class Access:
    """Know tenants by their tokens."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ConfigError."""
        self._path = path
        self._stamp: Stamp | None = None
        self._callers = self._read()

    def caller(self, token: str) -> Caller:
        """Return who a token belongs to. Raises Unauthenticated."""
        self._refresh()
        if not token:
            raise Unauthenticated("expected a bearer token, got none")
        caller, expires = self._callers.get(hashed(token), (None, None))
        if caller is None or (expires is not None and expires <= datetime.now(UTC)):
            raise Unauthenticated("expected a valid token, got another")
        return caller

    def _refresh(self) -> None:
        """Read the file if it has changed; what is wrong with it leaves what was read before."""
        try:
            if Stamp.of(self._path.stat()) != self._stamp:
                self._callers = self._read()
                log.info("%s was read again", self._path)
        except (OSError, ConfigError) as error:
            log.error("tenants stay as they were: %s", error)

    def _read(self) -> dict[str, tuple[Caller, datetime | None]]:
        try:
            self._stamp = Stamp.of(self._path.stat())  # before: what comes later is read again
            settings = tomllib.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._path}: expected a readable TOML file, got: {error}"
            ) from error
        tenants = settings.pop("tenant", None)
        if settings or not isinstance(tenants, list) or not tenants:
            got = f"{next(iter(settings))!r}" if settings else "none"
            raise ConfigError(f"{self._path}: expected [[tenant]] tables, got {got}")
        callers: dict[str, tuple[Caller, datetime | None]] = {}
        for number, tenant in enumerate(tenants, start=1):
            what = f"{self._path}: tenant {number}"
            _add(callers, tenant, what)
        return callers


def make_token() -> str:
    """Return a new token that nobody can guess."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def hashed(token: str) -> str:
    """Return what the file holds of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def _add(callers: dict[str, tuple[Caller, datetime | None]], tenant: Any, what: str) -> None:
    """Add a tenant's tokens. Raises ConfigError."""
    if not isinstance(tenant, dict):
        raise ConfigError(f"{what}: expected a table, got {tenant!r}")
    for key, value in tenant.items():
        if key not in KINDS:
            raise ConfigError(f"{what}: expected one of {', '.join(KINDS)}, got {key!r}")
        if type(value) is not KINDS[key]:
            raise ConfigError(f"{what}: {key}: expected a {KINDS[key].__name__}, got {value!r}")
    if not tenant.get("name"):
        raise ConfigError(f"{what}: expected a name, got none")
    patterns = tenant.get("adapters", [])
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError(f"{what}: adapters: expected names or patterns, got {patterns!r}")
    caller = Caller(
        tenant["name"], tuple(patterns), tenant.get("base", False), tenant.get("admin", False)
    )
    for token in tenant.get("tokens", []):
        digest, expires = _token(token, f"{what}: tokens")
        if digest in callers:
            raise ConfigError(f"{what}: tokens: expected each token once, got {digest} twice")
        callers[digest] = caller, expires


def _token(token: Any, what: str) -> tuple[str, datetime | None]:
    """Return a token's hash and when it expires. Raises ConfigError."""
    if not isinstance(token, dict) or "sha256" not in token or token.keys() - {"sha256", "expires"}:
        raise ConfigError(f"{what}: expected {{ sha256, expires }}, got {token!r}")
    digest, expires = token["sha256"], token.get("expires")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ConfigError(f"{what}: sha256: expected 64 hex digits, got {digest!r}")
    if isinstance(expires, date) and not isinstance(expires, datetime):
        expires = datetime.combine(expires, time(), UTC)
    if expires is not None and not (isinstance(expires, datetime) and expires.tzinfo):
        raise ConfigError(
            f"{what}: expires: expected a date, or a time with an offset, got {expires!r}"
        )
    return digest, expires
