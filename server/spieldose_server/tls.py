"""The server's certificate, read again once its files change; who is connected stays so."""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from spieldose_server.config import ServerConfig
from spieldose_server.errors import ConfigError
from spieldose_server.stamp import Stamp

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pem:
    """Hold what the files say."""

    certificate: bytes
    key: bytes
    authority: bytes | None  # of clients' certificates
    context: ssl.SSLContext  # the same as HTTPS takes it

    def grpc(self) -> grpc.ServerCertificateConfiguration:
        """Return it as gRPC takes it."""
        return grpc.ssl_server_certificate_configuration(
            [(self.key, self.certificate)], root_certificates=self.authority
        )


class Certificates:
    """Give each new connection the server's certificate, from files that may change.

    Whoever opens a port needs one of its own: a change is told once.
    """

    def __init__(self, certificate: Path, key: Path, authority: Path | None) -> None:
        """Read the files. Raises ConfigError."""
        self._certificate, self._key, self._authority = certificate, key, authority
        self._stamps: list[Stamp] = []
        self._pem = self._read()

    @classmethod
    def of(cls, config: ServerConfig) -> "Certificates | None":
        """Return what the settings name; None: no TLS. Raises ConfigError."""
        if not config.tls_certificate:
            return None
        authority = Path(config.tls_client_ca) if config.tls_client_ca else None
        return cls(Path(config.tls_certificate), Path(config.tls_key), authority)

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a port is opened with; with an authority clients must have certificates."""
        return grpc.dynamic_ssl_server_credentials(
            self._pem.grpc(),
            self._renewed,  # type: ignore[arg-type]  # None, its stub leaves out: nothing new
            require_client_authentication=bool(self._authority),
        )

    def context(self) -> ssl.SSLContext:
        """Return what an HTTPS port is opened with; each handshake goes on with the newest."""

        def renew(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            self._renewed()
            connection.context = self._pem.context

        context = self._pem.context
        context.sni_callback = renew  # comes with every handshake, whether it names a server or not
        return context

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the certificate if it is another than before; gRPC asks at each handshake.

        Files that do not fit together, as between two of them being replaced, change nothing.
        """
        try:
            if self._status() == self._stamps:
                return None
            self._pem = self._read()
        except (OSError, ConfigError) as error:
            log.error("the certificate stays as it was: %s", error)
            return None
        log.info("%s was read again", self._certificate)
        return self._pem.grpc()

    def _status(self) -> list[Stamp]:
        files = [self._certificate, self._key, *([self._authority] if self._authority else [])]
        return [Stamp.of(file.stat()) for file in files]

    def _read(self) -> Pem:
        try:
            stamps = self._status()  # before: what comes later is read again
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # who comes again shows its certificate again: by a ticket it would be let in as it was
            context.num_tickets = 0
            context.options |= ssl.OP_NO_TICKET
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
            if self._authority:
                context.load_verify_locations(self._authority)
                context.verify_mode = ssl.CERT_REQUIRED
            pem = Pem(
                self._certificate.read_bytes(),
                self._key.read_bytes(),
                self._authority.read_bytes() if self._authority else None,
                context,
            )
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(
                f"expected a certificate and its key, as PEM, in {self._certificate} and "
                f"{self._key}, got: {error}"
            ) from error
        self._stamps = stamps
        return pem


def _no_password() -> str:
    raise ValueError("a key that a password protects")
