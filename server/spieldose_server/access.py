"""Who may do what: tenants, the tokens and certificates that prove who asks, and their adapters.

```toml
[[tenant]]
name = "acme"
tokens = [{ sha256 = "9f86d0…", expires = 2027-06-30 }]  # `spieldose token` makes one
certificates = ["acme.example"]  # names in its clients' certificates, under tls_client_ca
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
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from spieldose_server.errors import ConfigError, Forbidden, Unauthenticated, UnknownAdapter
from spieldose_server.stamp import Stamp

log = logging.getLogger(__name__)

KINDS = {
    "name": str,
    "tokens": list,
    "certificates": list,
    "adapters": list,
    "base": bool,
    "admin": bool,
}
TOKEN_BYTES = 32  # random ones: a plain hash of so many cannot be turned back


@dataclass(frozen=True, slots=True)
class Caller:
    """Hold who asks and what it may do."""

    tenant: str
    adapters: tuple[str, ...] = ("*",)  # shell patterns of names
    base: bool = True
    admin: bool = False

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
            raise Forbidden("expected an administrator's token or port, got another's")


CALLER: ContextVar[Caller] = ContextVar("caller")  # of the running call; not set: nobody let it in


@dataclass(frozen=True, slots=True)
class Tenants:
    """Hold what the file says."""

    tokens: dict[str, tuple[Caller, datetime | None]] = field(default_factory=dict)  # by hash
    certificates: dict[str, Caller] = field(default_factory=dict)  # by a name in them


class Access:
    """Know tenants by their tokens and certificates."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ConfigError."""
        self._path = path
        self._stamp: Stamp | None = None
        self._tenants = self._read()

    def caller(self, token: str) -> Caller:
        """Return who a token belongs to. Raises Unauthenticated."""
        self._refresh()
        if not token:
            raise Unauthenticated("expected a bearer token, got none")
        caller, expires = self._tenants.tokens.get(hashed(token), (None, None))
        if caller is None or (expires is not None and expires <= datetime.now(UTC)):
            raise Unauthenticated("expected a valid token, got another")
        return caller

    @property
    def knows_certificates(self) -> bool:
        """Say whether any tenant has one."""
        self._refresh()
        return bool(self._tenants.certificates)

    def named(self, names: Iterable[str]) -> Caller:
        """Return whose certificate has these names; it has been verified. Raises Unauthenticated.

        Names of several tenants are nobody's.
        """
        known = self._tenants.certificates
        callers = {known[name].tenant: known[name] for name in names if name in known}
        if len(callers) != 1:
            raise Unauthenticated("expected a bearer token or a tenant's certificate, got neither")
        return callers.popitem()[1]

    def _refresh(self) -> None:
        """Read the file if it has changed; what is wrong with it leaves what was read before."""
        try:
            if Stamp.of(self._path.stat()) != self._stamp:
                self._tenants = self._read()
                log.info("%s was read again", self._path)
        except (OSError, ConfigError) as error:
            log.error("tenants stay as they were: %s", error)

    def _read(self) -> Tenants:
        try:
            self._stamp = Stamp.of(self._path.stat())  # before: what comes later is read again
            settings = tomllib.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._path}: expected a readable TOML file, got: {error}"
            ) from error
        tables = settings.pop("tenant", None)
        if settings or not isinstance(tables, list) or not tables:
            got = f"{next(iter(settings))!r}" if settings else "none"
            raise ConfigError(f"{self._path}: expected [[tenant]] tables, got {got}")
        tenants = Tenants()
        for number, table in enumerate(tables, start=1):
            _add(tenants, table, f"{self._path}: tenant {number}")
        return tenants


def make_token() -> str:
    """Return a new token that nobody can guess."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def hashed(token: str) -> str:
    """Return what the file holds of a token."""
    raw = token.encode(errors="surrogateescape")  # of bytes that were no UTF-8
    return hashlib.sha256(raw).hexdigest()


def _add(tenants: Tenants, table: Any, what: str) -> None:
    """Add a tenant's tokens and certificates. Raises ConfigError."""
    caller = _caller(table, what)
    for token in table.get("tokens", []):
        digest, expires = _token(token, f"{what}: tokens")
        if digest in tenants.tokens:
            raise ConfigError(f"{what}: tokens: expected each token once, got {digest} twice")
        tenants.tokens[digest] = caller, expires
    for name in _strings(table, "certificates", what):
        if name in tenants.certificates:
            raise ConfigError(f"{what}: certificates: expected each name once, got {name!r} twice")
        tenants.certificates[name] = caller


def _caller(table: Any, what: str) -> Caller:
    """Return a tenant as a caller. Raises ConfigError."""
    if not isinstance(table, dict):
        raise ConfigError(f"{what}: expected a table, got {table!r}")
    for key, value in table.items():
        if key not in KINDS:
            raise ConfigError(f"{what}: expected one of {', '.join(KINDS)}, got {key!r}")
        if type(value) is not KINDS[key]:
            raise ConfigError(f"{what}: {key}: expected a {KINDS[key].__name__}, got {value!r}")
    if not table.get("name"):
        raise ConfigError(f"{what}: expected a name, got none")
    patterns = _strings(table, "adapters", what)
    return Caller(table["name"], patterns, table.get("base", False), table.get("admin", False))


def _strings(table: dict[str, Any], key: str, what: str) -> tuple[str, ...]:
    """Return a list of names or patterns. Raises ConfigError."""
    found = table.get(key, [])
    if not all(isinstance(name, str) and name for name in found):
        raise ConfigError(f"{what}: {key}: expected names, got {found!r}")
    return tuple(found)


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
