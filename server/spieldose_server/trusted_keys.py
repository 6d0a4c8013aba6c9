"""The keys one of which has to have signed an adapter, read again once their file changes.

The file holds PEM blocks of Ed25519 public keys; what stands before the first is a comment. What is
wrong with it leaves the keys that were read before. A version whose key is gone is withdrawn.
"""

import logging
import re
import threading
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from spieldose_kernels.errors import UntrustedDelta
from spieldose_kernels.signature import Signature
from spieldose_server.config import ServerConfig
from spieldose_server.errors import ConfigError
from spieldose_server.stamp import Stamp

log = logging.getLogger(__name__)

BLOCK = re.compile(rb"^(?=-----BEGIN )", re.MULTILINE)


class TrustedKeys:
    """Know whose signatures count."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ConfigError."""
        self._path = path
        self._reading = threading.Lock()  # or one loader saw the new stamp beside the old keys
        self._stamp: Stamp | None = None
        self._keys = self._read()

    @classmethod
    def of(cls, config: ServerConfig) -> "TrustedKeys | None":
        """Return what the settings name; None: nothing has to be signed. Raises ConfigError."""
        return cls(Path(config.trusted_keys)) if config.trusted_keys else None

    def current(self) -> tuple[Ed25519PublicKey, ...]:
        """Return the keys as they are now: others once the file has changed."""
        with self._reading:
            try:
                if Stamp.of(self._path.stat()) != self._stamp:
                    self._keys = self._read()
                    log.info("%s was read again", self._path)
            except (OSError, ConfigError) as error:
                log.error("trusted keys stay as they were: %s", error)
            return self._keys

    def check(self, signature: Signature | None) -> None:
        """Raise UntrustedDelta unless one of the keys made a signature."""
        if signature is None:
            raise UntrustedDelta("expected a signature by a trusted key, got none")
        if not signature.is_by(self.current()):
            raise UntrustedDelta("expected a signature by a trusted key, got one by no such key")

    def _read(self) -> tuple[Ed25519PublicKey, ...]:
        try:
            self._stamp = Stamp.of(self._path.stat())  # before: what comes later is read again
            _, *blocks = BLOCK.split(self._path.read_bytes())
            keys = tuple(map(load_pem_public_key, blocks))
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{self._path}: expected public keys as PEM, got: {error}") from error
        found = tuple(key for key in keys if isinstance(key, Ed25519PublicKey))
        if not found or len(found) < len(keys):
            got = "another kind" if keys else "none"
            raise ConfigError(f"{self._path}: expected Ed25519 public keys, got {got}")
        return found
