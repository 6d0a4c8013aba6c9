"""The address that OpenAI's clients use."""

import asyncio
import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from spieldose_server.config import ServerConfig
from spieldose_server.errors import ConfigError
from spieldose_server.openai_http.app import OpenAI
from spieldose_server.tls import Certificates

log = logging.getLogger(__name__)
requests_log = logging.getLogger(f"{__name__}.requests")  # aiohttp's


@requests_log.addFilter
def without_content(record: logging.LogRecord) -> bool:
    """Leave out what was sent, which may hold a token or a prompt, where it was no HTTP."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        record.msg, record.args = f"not HTTP: {type(error).__name__}", ()
        record.exc_info = None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True


class Listener:
    """Serve an application on `http_listen`, by TLS if gRPC is."""

    def __init__(self, openai: OpenAI, config: ServerConfig) -> None:
        """Prepare to serve. Raises ConfigError."""
        self.port = 0  # known once started
        self._server: asyncio.Server | None = None
        self._address = config.http_listen
        self._certificates = Certificates.of(config)
        self._runner = web.AppRunner(
            openai.app(config.max_message_bytes),
            access_log=None,
            logger=requests_log,
            handler_cancellation=True,  # whoever goes away gives up its place at once
            # aiohttp (3.14) waits so long twice, and without end for 0
            shutdown_timeout=max(config.drain_seconds / 2, 0.01),
        )

    async def start(self) -> None:
        """Take the address and answer. Raises ConfigError."""
        await self._runner.setup()
        assert self._runner.server is not None
        host, _, port = self._address.rpartition(":")
        tls = self._certificates.context() if self._certificates else None
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                self._runner.server, host.strip("[]"), int(port), ssl=tls
            )
        except (OSError, UnicodeError) as error:  # the last one: of a host that is no name
            raise ConfigError(
                f"http_listen: expected a free address, got {self._address}"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]
        log.info("OpenAI's clients on %s:%d", host, self.port)

    async def stop(self) -> None:
        """Refuse new requests, and give running ones `drain_seconds` to end."""
        if self._server is not None:
            await self._accept_no_more(self._server)
        await self._runner.cleanup()
        await asyncio.sleep(0)  # TLS connections close in a callback

    async def _accept_no_more(self, server: asyncio.Server) -> None:
        """Close the address; what was accepted before is a connection by then.

        asyncio loses, without closing it, a connection it accepted just before its server closed.
        """
        for listening in server.sockets:
            asyncio.get_running_loop().remove_reader(listening)
        await asyncio.sleep(0)
        server.close()
