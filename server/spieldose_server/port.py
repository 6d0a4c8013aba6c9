"""A gRPC server on an address of its own: what it offers, and who may steer by it."""

import logging
import socket
from collections.abc import Callable, Mapping

import grpc.aio
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import _async as aio_health
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from spieldose_server.access import Access
from spieldose_server.authenticate import Authenticate
from spieldose_server.callers import Callers
from spieldose_server.client.channel import PING_SECONDS, SILENCE_SECONDS
from spieldose_server.config import ServerConfig
from spieldose_server.errors import ConfigError
from spieldose_server.malformed import RefuseMalformed
from spieldose_server.observer import Observer
from spieldose_server.tls import Certificates

log = logging.getLogger(__name__)

CHANNELZ = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
Services = Mapping[str, Callable[[grpc.aio.Server], None]]  # by name, what adds them


class Port:
    """Offer some services, health and reflection; where administrators steer, channelz too."""

    def __init__(
        self,
        address: str,
        services: Services,
        health_servicer: aio_health.HealthServicer,
        access: Access | None,
        observer: Observer,
        config: ServerConfig,
        *,
        steers: bool,
    ) -> None:
        self.address = address
        local = address.startswith("unix:")
        self._certificates = None if local else Certificates.of(config)
        self.number = 0  # known once open
        self._server = grpc.aio.server(
            interceptors=[
                Authenticate(Callers(access, steers=steers), observer),
                RefuseMalformed(),
            ],
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_concurrent_streams", config.max_connection_calls),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # who vanished without a word holds a place for no longer than that
                ("grpc.keepalive_time_ms", 1000 * SILENCE_SECONDS),
                ("grpc.http2.ping_timeout_ms", 1000 * PING_SECONDS),
                ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server
            ],
        )
        for add in services.values():
            add(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, self._server)
        names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if steers:
            channelz.add_channelz_servicer(self._server)  # type: ignore[arg-type]  # takes both
            names.append(CHANNELZ)
        reflection.enable_server_reflection(names, self._server)

    def open(self) -> None:
        """Take the address. Raises ConfigError."""
        try:
            if self.address.startswith("unix:") and _answers(self.address.removeprefix("unix:")):
                raise RuntimeError("gRPC would take it from whoever has it")
            if self._certificates is None:
                self.number = self._server.add_insecure_port(self.address)
            else:
                credentials = self._certificates.credentials()
                self.number = self._server.add_secure_port(self.address, credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"expected a free address to listen on, got {self.address}"
            ) from error

    async def start(self) -> None:
        """Begin to answer."""
        await self._server.start()

    async def stop(self, seconds: float) -> None:
        """Take no more calls, and give running ones so long to end."""
        await self._server.stop(seconds)

    def __str__(self) -> str:
        if self.address.startswith("unix:"):
            return self.address
        return f"{self.address.rpartition(':')[0]}:{self.number}"


def _answers(path: str) -> bool:
    """Say whether someone has a socket; one that a dead process left is free."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(1)
        try:
            asking.connect(path.removeprefix("//"))  # unix:///a/b is /a/b
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # nor can it be taken
            pass
        return True
